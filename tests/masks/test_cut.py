"""The public selection: exact counts, nesting, ties in layer order, and errors that name the tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, cut, select_kth

layers = st.lists(
    st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), st.floats(width=32, allow_nan=False)), max_size=25),
    min_size=1,
    max_size=4,
)


def by_sorting(scores: dict[str, Tensor], count: int, keep: Masks | None, magnitude: bool) -> dict[str, Tensor]:
    """The definition: sort (score, layer, flat index) of what is kept, and remove the first ``count``."""
    rows = [
        (abs(float(value)) if magnitude else float(value), layer, index)
        for layer, (name, score) in enumerate(scores.items())
        for index, value in enumerate(score.reshape(-1))
        if keep is None or keep[name].reshape(-1)[index]
    ]
    result = {name: torch.ones(s.shape, dtype=torch.bool) if keep is None else keep[name] for name, s in scores.items()}
    for _, layer, index in sorted(rows)[:count]:
        result[list(scores)[layer]].view(-1)[index] = False
    return result


@given(layers, st.data(), st.booleans(), st.booleans())
def test_cut_is_the_sorted_definition(
    lists: list[list[float]], data: st.DataObject, magnitude: bool, masked: bool
) -> None:
    scores = {f"layer{9 - i}": torch.tensor(values, dtype=torch.float32) for i, values in enumerate(lists)}
    keep = None
    if masked:
        draw = data.draw
        keep = Masks.from_bools(
            {
                name: torch.tensor(draw(st.lists(st.booleans(), min_size=len(s), max_size=len(s))), dtype=torch.bool)
                for name, s in scores.items()
            }
        )
    alive = keep.count() if keep is not None else sum(map(len, scores.values()))
    count = data.draw(st.integers(0, alive))
    masks = cut(scores, count, keep, magnitude=magnitude)
    expected = by_sorting(scores, count, keep, magnitude)
    assert masks == Masks.from_bools(expected) and masks.names() == tuple(scores)
    assert masks.count() == alive - count
    assert keep is None or masks <= keep


@given(layers, st.data())
def test_two_cuts_are_one(lists: list[list[float]], data: st.DataObject) -> None:
    scores = {f"layer{i}": torch.tensor(values, dtype=torch.float32) for i, values in enumerate(lists)}
    total = sum(map(len, scores.values()))
    once = data.draw(st.integers(0, total))
    again = data.draw(st.integers(0, total - once))
    first = cut(scores, once)
    assert cut(scores, again, first) == cut(scores, once + again) <= first


@pytest.mark.acceptance("double-win", "A-7")
def test_equal_weights_are_cut_in_layer_order_on_every_run(tmp_path: Path) -> None:
    scores = {"b": torch.ones(4, 5), "a": torch.ones(3, 3), "c": torch.ones(11)}
    masks = cut(scores, 24)
    assert [kept for _, _, kept, _ in masks.layers()] == [0, 5, 11]
    assert masks["a"].view(-1).tolist() == [False] * 4 + [True] * 5, "the first flat indices go first"
    assert cut({name: score.clone() for name, score in scores.items()}, 24) == masks
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert loaded == masks and cut(scores, 7, loaded) == cut(scores, 7, masks) == cut(scores, 31)


@pytest.mark.acceptance("double-win", "A-7")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_and_type_do_not_change_ties(dtype: torch.dtype) -> None:
    score = torch.randn(8, 4, 3, 3).round().to(dtype)
    plain = cut({"w": score}, 100)
    assert cut({"w": score.to(memory_format=torch.channels_last)}, 100) == plain
    assert cut({"w": score.double()}, 100) == plain


@pytest.mark.acceptance("double-win", "A-10")
def test_nothing_all_but_one_and_all_can_be_cut() -> None:
    scores = {"a": torch.randn(10), "b": torch.randn(4, 4)}
    assert cut(scores, 0) == Masks.full(scores)
    single = cut(scores, 25)
    best = torch.cat([score.view(-1) for score in scores.values()]).max()
    assert single.count() == 1
    assert [float(scores[name][single[name]]) for name in single if single[name].any()] == [best]
    assert cut(scores, 26).count() == 0


def test_magnitude_orders_by_absolute_value() -> None:
    scores = {"w": torch.tensor([-3.0, 1.0, -2.0, 0.5])}
    assert cut(scores, 2)["w"].tolist() == [False, True, False, True]
    assert cut(scores, 2, magnitude=True)["w"].tolist() == [True, False, True, False]
    assert cut({"w": scores["w"].abs()}, 2) == cut(scores, 2, magnitude=True)


def test_parameters_are_taken_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.tensor([-3.0, 1.0]))
    assert cut({"w": weight}, 1, magnitude=True)["w"].tolist() == [True, False]
    assert select_kth([weight], 1).value == 1.0


def test_kth_takes_names_or_a_list_and_any_mask() -> None:
    tensors = {"a": torch.tensor([4.0, -1.0]), "b": torch.tensor([[2.0, -2.0]])}
    value, below, equal = select_kth(tensors, 2)
    assert (value, below, equal) == (2.0, 1, 2) and isinstance(below, int) and isinstance(value, float)
    assert select_kth(list(tensors.values()), 4).value == 4.0
    assert select_kth(tensors, 1, magnitude=False) == (-2.0, 0, 1)
    keep = {"a": torch.tensor([True, False]), "b": torch.tensor([[False, True]])}
    for mask in (keep, Masks.from_bools(keep), list(keep.values())):
        given = tensors if not isinstance(mask, list) else list(tensors.values())
        assert select_kth(given, 1, mask) == (2.0, 0, 1)


ONE = {"w": torch.tensor([1.0, 2.0])}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cut(ONE, 3), "cannot remove 3 weights: expected from 0 to 2"),
        (lambda: cut(ONE, -1), "cannot remove -1 weights"),
        (lambda: cut(ONE, 1, Masks.full({"v": torch.zeros(2)})), r"w is \(2,\), its mask absent"),
        (lambda: cut(ONE, 1, Masks.full({"w": torch.zeros(3)})), r"w is \(2,\), its mask \(3,\)"),
        (lambda: cut({"good": ONE["w"], "bad.weight": torch.tensor([float("nan")])}, 1), r"NaN in bad.weight"),
        (lambda: cut({"w": torch.tensor([1, 2])}, 1), "w: expected a float tensor"),
        (lambda: cut({}, 0), "at least one tensor"),
        (lambda: select_kth(ONE, 0), "k must be from 1 to 2"),
        (lambda: select_kth(ONE, 1, Masks.full({"w": torch.zeros(3)})), "do not fit"),
        (lambda: select_kth([torch.tensor([float("nan")])], 1), "NaN in tensor 0"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()

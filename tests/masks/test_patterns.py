"""Patterns: masks written out by hand, counts, ties, remainders, and what holds in every group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, cut
from sparse_robust.masks.patterns import PATTERNS, UNSTRUCTURED, Pattern


def bits(text: str) -> Tensor:
    """Rows of 1 and 0, a row an output."""
    return torch.tensor([[c == "1" for c in row] for row in text.split()])


def chosen(pattern: str, score: Tensor, count: int | None = None, keep: Tensor | None = None, **how: bool) -> Tensor:
    """The mask that a pattern makes of one layer's scores."""
    tiles = Pattern.parse(pattern)
    before = Masks.from_bools({"w": torch.ones_like(score, dtype=torch.bool) if keep is None else keep})
    thinned = tiles.thin({"w": score}, before, **how)
    return tiles.select({"w": score}, thinned.count() if count is None else count, thinned, **how)["w"]


SCORE = torch.tensor(
    [
        [8.0, 1.0, 5.0, 6.0, 2.0, 2.0, 2.0, 2.0],
        [0.0, 0.0, 3.0, 0.0, 9.0, 7.0, 8.0, 1.0],
    ]
)


@pytest.mark.parametrize(
    ("pattern", "count", "expected"),
    [
        ("unstructured", 5, "10010000 00001110"),
        ("2:4", None, "10010011 00111010"),  # of equal scores the first inputs go first
        ("1:4", None, "10000001 00101000"),
        ("3:4", None, "10110111 01111110"),
        ("2:4", 5, "10010000 00101010"),  # of the eight that 2:4 leaves, the two 2s and the 0 go
        ("block:1x4", 8, "11110000 00001111"),
        ("block:2x2", 8, "00111100 00111100"),  # means 2.25, 3.5, 5, 3.25
        ("block:2x4", 8, "00001111 00001111"),  # 23/8 and 33/8
        ("channel", 8, "00000000 11111111"),  # 28 and 28: a tie, the first goes first
    ],
)
def test_masks_written_by_hand(pattern: str, count: int | None, expected: str) -> None:
    assert torch.equal(chosen(pattern, SCORE, count), bits(expected))


def test_convolutions_are_grouped_along_their_inputs_at_each_place_of_the_kernel() -> None:
    score = torch.zeros(2, 8, 1, 2)
    score[0, [1, 2, 4, 7], 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    score[0, [0, 3, 5, 6], 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    score[1, [0, 1, 4, 5], 0, 0] = 1.0
    score[1, [2, 3, 6, 7], 0, 1] = 1.0
    assert torch.equal(chosen("2:4", score), score > 0)
    by_group = chosen("2:4", torch.randn(6, 12, 3, 3)).permute(0, 2, 3, 1).reshape(-1, 4)
    assert (by_group.sum(1) == 2).all()


def test_a_block_of_a_convolution_is_so_many_outputs_and_inputs_at_one_place() -> None:
    score = torch.zeros(4, 4, 3, 3)
    score[2:4, 0:2, 1, 2] = 1.0
    assert torch.equal(chosen("block:2x2", score, 4), score > 0)
    assert torch.equal(chosen("block:2x2", -1 - score, 4 * 35), score == 0)


def test_a_channel_is_everything_that_feeds_an_output() -> None:
    score = torch.rand(5, 3, 3, 3)
    score[[1, 4]] += 1
    expected = torch.zeros_like(score, dtype=torch.bool)
    expected[[1, 4]] = True
    assert torch.equal(chosen("channel", score, 54), expected)
    assert torch.equal(chosen("channel", -score, 54, magnitude=True), expected)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (2, 3)])
@pytest.mark.parametrize("shape", [(3, 8), (5, 7), (4, 3, 3, 3), (6, 1, 3, 3), (2, 9, 5), (3, 6, 2, 2, 2)])
def test_n_of_m_holds_in_every_group_and_a_rest_keeps_as_if_it_were_padded(
    n: int, m: int, shape: tuple[int, ...]
) -> None:
    mask = chosen(f"{n}:{m}", torch.randn(shape))
    rows = mask.flatten(2).transpose(1, 2).reshape(-1, shape[1]) if len(shape) > 2 else mask
    for row in rows:
        for group in row.split(m):
            assert int(group.sum()) == min(n, len(group))
    assert int(mask.sum()) == Pattern.parse(f"{n}:{m}").capacity(Masks.full({"w": torch.empty(shape)}))["w"]


def test_edge_blocks_go_by_the_mean_of_what_they_have() -> None:
    score = torch.tensor([[1.0, 1.0, 3.0], [1.0, 1.0, 3.0], [2.0, 2.0, 0.0]])
    # means: 1, 3 (two weights), 2 (two weights), 0 (one weight)
    assert torch.equal(chosen("block:2x2", score, 4), bits("001 001 110"))
    assert torch.equal(chosen("block:2x2", score, 2), bits("001 001 000"))
    assert torch.equal(chosen("block:2x2", score, 8), bits("111 111 110"))


def test_whole_tiles_come_to_the_nearest_count_and_never_to_none() -> None:
    score = torch.arange(24.0).reshape(3, 8)
    counts = {count: int(chosen("channel", score, count).sum()) for count in (0, 1, 8, 11, 12, 13, 20, 21, 24)}
    assert counts == {0: 0, 1: 8, 8: 8, 11: 8, 12: 8, 13: 16, 20: 16, 21: 24, 24: 24}


def test_layers_of_different_fan_in_compete_by_the_mean() -> None:
    scores = {"wide": torch.full((2, 100), 1.0), "narrow": torch.full((3, 2), 2.0)}
    scores["wide"][1] = 3.0
    masks = Pattern.parse("channel").select(scores, 106, Masks.full(scores))
    assert [kept for _, _, kept, _ in masks.layers()] == [100, 6] and masks["wide"][1].all()


def test_what_is_pruned_already_stays_so_and_has_no_say() -> None:
    keep = bits("01111111 11111111")
    assert not chosen("2:4", SCORE, keep=keep)[0, 0] and int(chosen("2:4", SCORE, keep=keep).sum()) == 8
    few = bits("00010000 00000011")
    assert torch.equal(chosen("2:4", SCORE, keep=few), few), "groups that have fewer than N left keep all of them"
    channels = chosen("channel", torch.tensor([[9.0, 1.0], [5.0, 5.0]]), 2, keep=bits("01 11"))
    assert torch.equal(channels, bits("00 11")), "the 9 is pruned, so the mean of its channel is 1"
    nan = torch.tensor([[float("nan"), 1.0], [5.0, 5.0]])
    assert torch.equal(chosen("channel", nan, 2, keep=bits("01 11")), bits("00 11"))


shapes = st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3))


@given(shapes, st.integers(0, 2**31), st.integers(0, 10), st.sampled_from(["2:4", "1:3", "unstructured"]))
def test_counts_of_single_weights_are_exact_and_ties_go_in_flat_order(
    shape: tuple[int, int, int], seed: int, part: int, pattern: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randint(3, shape, generator=generator).float() for name in ("b", "a")}
    tiles, full = Pattern.parse(pattern), Masks.full(scores)
    thinned = tiles.thin(scores, full)
    assert {name: kept for name, _, kept, _ in thinned.layers()} == tiles.capacity(full)
    count = thinned.count() * part // 10
    masks = tiles.select(scores, count, thinned)
    assert masks.count() == count and masks <= thinned
    assert masks == cut(scores, thinned.count() - count, thinned), "the one selection there is"
    if tiles.limit is not None:  # a kept weight is above the pruned ones of its group, or later at the same score
        for name in scores:
            for kept, score in zip(rows(thinned[name], tiles), rows(scores[name], tiles), strict=True):
                order = sorted(range(len(score)), key=lambda i: (score[i], i))
                assert kept == [i in order[-min(len(score), tiles.limit) :] for i in range(len(score))]


def rows(tensor: Tensor, tiles: Pattern) -> list[list[float]]:
    """The groups of an N:M pattern, the slow way."""
    out, inputs, places = tensor.shape
    step = tiles.columns or inputs
    return [
        [tensor[o, i, place].item() for i in range(first, min(first + step, inputs))]
        for o in range(out)
        for place in range(places)
        for first in range(0, inputs, step)
    ]


@given(shapes, st.integers(0, 2**31), st.integers(0, 10), st.sampled_from(["block:2x3", "block:2x1", "channel"]))
def test_whole_tiles_are_ranked_by_their_means(shape: tuple[int, int, int], seed: int, part: int, pattern: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randint(3, shape, generator=generator).double() for name in ("b", "a")}
    keep = Masks.from_bools({name: torch.rand(shape, generator=generator) < 0.8 for name in scores})
    tiles = Pattern.parse(pattern)
    count = keep.count() * part // 10
    masks = tiles.select(scores, count, keep)
    groups = []  # (mean, layer and place, indices), the slow way
    for layer, name in enumerate(scores):
        out, inputs, places = shape
        high, wide = tiles.rows, tiles.columns or inputs
        for o in range(0, out, high):
            for place in range(places) if tiles.columns else [0]:
                for i in range(0, inputs, wide):
                    where = torch.zeros(shape, dtype=torch.bool)
                    where[o : o + high, i : i + wide, place if tiles.columns else slice(None)] = True
                    where &= keep[name]
                    if where.any():
                        groups.append((float(scores[name][where].mean()), (layer, o, place, i), name, where))
    groups.sort(key=lambda group: group[:2])
    kept = [sum(int(where.sum()) for *_, where in groups[n:]) for n in range(len(groups) + (count == 0))]
    best = min(range(len(kept)), key=lambda n: (abs(kept[n] - count), -n)) if kept else 0
    expected = {name: torch.zeros(shape, dtype=torch.bool) for name in scores}
    for _, _, name, where in groups[best:]:
        expected[name] |= where
    assert masks == Masks.from_bools(expected)


def test_names_are_read_and_nonsense_is_refused() -> None:
    assert Pattern.parse("unstructured") == UNSTRUCTURED and not UNSTRUCTURED.whole
    assert Pattern.parse(" 2 : 4 ") == Pattern("2:4", columns=4, limit=2)
    assert Pattern.parse("block:4x2") == Pattern("block:4x2", 4, 2) and Pattern.parse("block:4x2").whole
    assert Pattern.parse("channel").whole and set(PATTERNS) == {"unstructured", "N:M", "block:RxC", "channel"}
    for text, message in {
        "4:2": "1 <= N < M, got '4:2'",
        "4:4": "1 <= N < M",
        "0:4": "1 <= N < M",
        "block:1x1": "at least two weights",
        "block:0x4": "at least two weights",
        "block": "unknown pattern 'block'. Known: unstructured, N:M, block:RxC, channel",
    }.items():
        with pytest.raises(UsageError, match=message):
            Pattern.parse(text)


@pytest.mark.parametrize("pattern", ["unstructured", "1:2", "block:2x2", "channel"])
def test_nan_is_named(pattern: str) -> None:
    score = torch.ones(4, 4)
    score[1, 1] = float("nan")
    with pytest.raises(UsageError, match="NaN in w"):
        chosen(pattern, score, 8)

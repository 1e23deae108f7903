"""Which images are used: sizes, hold-outs and subsets."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_robust.data import Data, DataSpec
from sparse_robust.data.data import assemble
from sparse_robust.data.source import Source, memory_split
from sparse_robust.data.split import TEST_IDS
from sparse_robust.data.subsets import hold_out, stratified, subset_size
from sparse_robust.data.torchvision_sets import SETS
from sparse_robust.errors import UsageError

# name: (training file, test file, training images in use, validation, images at 10 % and at 1 %)
REAL = {
    "CIFAR10": (50_000, 10_000, 45_000, 5_000, 4_500, 450),
    "CIFAR100": (50_000, 10_000, 45_000, 5_000, 4_500, 450),
    "SVHN": (73_257, 26_032, 68_257, 5_000, 6_825, 682),
}


def fake(name: str, **choices: object) -> Data:
    """A set with the real sizes and the real rule, its images one pixel, its classes in turn."""
    n_train, n_test = REAL[name][:2]
    classes = 100 if name == "CIFAR100" else 10
    splits = []
    for n, first_id in ((n_train, 0), (n_test, TEST_IDS)):
        pixels = (torch.arange(n) % 251).to(torch.uint8).reshape(n, 1, 1)
        splits.append(memory_split(pixels, torch.arange(n) % classes, first_id=first_id))
    entry = SETS[name]
    source = Source(
        tuple(map(str, range(classes))), splits[0], splits[1], held_out=entry.held_out,
        last=isinstance(entry.held_out, int),
    )  # fmt: skip
    return assemble(source, DataSpec(name, **choices))  # type: ignore[arg-type]


@pytest.mark.acceptance("double-win", "A-27")
@pytest.mark.parametrize("name", REAL)
def test_split_and_subset_sizes(name: str) -> None:
    _, n_test, n_train, n_validation, tenth, hundredth = REAL[name]
    data = fake(name)
    assert (len(data.train), len(data.validation), len(data.test)) == (n_train, n_validation, n_test)
    assert torch.equal(data.train.ids, torch.arange(n_train))
    assert torch.equal(data.validation.ids, torch.arange(n_train, n_train + n_validation))
    for subset in ("first_n", "stratified"):
        for fraction, count in ((0.1, tenth), (0.01, hundredth)):
            part = fake(name, subset=subset, fraction=fraction)
            assert len(part.train) == count
            assert torch.equal(part.validation.ids, data.validation.ids), "validation is never reduced"
            assert not set(part.train.ids.tolist()) & set(part.validation.ids.tolist())
            if subset == "first_n":
                assert torch.equal(part.train.ids, torch.arange(count))
            else:
                counts = torch.bincount(part.train.labels, minlength=data.num_classes)
                assert int(counts.max() - counts.min()) <= 1


@pytest.mark.acceptance("double-win", "A-27", "A-41")
def test_stratified_subsets_follow_their_seed() -> None:
    ids = [fake("CIFAR10", fraction=0.01, subset_seed=seed).train.ids for seed in (0, 0, 1)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])
    larger = fake("CIFAR10", fraction=0.1, subset_seed=0).train.ids
    assert set(ids[0].tolist()) <= set(larger.tolist()), "a smaller subset lies within a larger one"


@given(st.integers(1, 200_000), st.integers(1, 1000))
def test_size_is_the_floor_of_the_typed_decimal(n: int, thousandths: int) -> None:
    exact = Fraction(thousandths, 1000) * n
    if exact < 1:
        with pytest.raises(UsageError, match=r"training images is none"):
            subset_size(n, thousandths / 1000)
    else:
        assert subset_size(n, thousandths / 1000) == exact.__floor__()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.data(), st.integers(0, 5))
def test_stratified_keeps_proportions(labels: list[int], draw: st.DataObject, seed: int) -> None:
    classes = torch.tensor(labels)
    ids = torch.arange(len(labels)) * 7 + 1
    count = draw.draw(st.integers(1, len(labels)))
    chosen = stratified(classes, ids, count, seed)
    assert len(chosen) == count and torch.equal(chosen, chosen.unique())
    for c in set(labels):
        share = count * labels.count(c) / len(labels)
        assert abs(int((classes[chosen] == c).sum()) - share) < 1


@given(st.integers(2, 60), st.data(), st.booleans())
def test_hold_out_splits_without_overlap(n: int, draw: st.DataObject, last: bool) -> None:
    held = draw.draw(st.one_of(st.integers(0, n - 1), st.floats(0, 0.9)))
    labels = torch.arange(n) % 3
    kept, out = hold_out(labels, torch.arange(n), held, last=last)
    assert torch.equal(torch.cat([kept, out]).sort().values, torch.arange(n))
    assert len(kept) >= 1
    if isinstance(held, int):
        assert len(out) == held
    if last and len(out):
        assert int(kept.max()) < int(out.min())


def test_the_choice_depends_on_ids_not_on_neighbours() -> None:
    """Dropping other images of a class does not change the order in which its images are chosen."""
    labels, ids = torch.zeros(50, dtype=torch.int64), torch.arange(50)
    few = set(ids[stratified(labels, ids, 10, 0)].tolist())
    rest = ids[torch.tensor([i in few or i % 2 == 0 for i in range(50)])]
    assert set(rest[stratified(labels[: len(rest)], rest, 10, 0)].tolist()) == few


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"fraction": 0}, r"data fraction must be above 0 and at most 1, got 0"),
        ({"fraction": 1.5}, r"data fraction must be above 0 and at most 1, got 1.5"),
        ({"fraction": float("nan")}, r"data fraction must be"),
        ({"fraction": -0.1}, r"data fraction must be"),
        ({"fraction": 1e-6}, r"fraction 1e-06 of 45000 training images is none"),
        ({"validation": 50_000}, r"50000 images cannot be held out of 50000"),
        ({"validation": 1.0}, r"data validation must be a whole number of images or a share"),
        ({"validation": -1}, r"data validation must be"),
        ({"subset": "fist_n"}, r"unknown data subset 'fist_n'. Did you mean 'first_n'"),
        ({"statistics": "sorce"}, r"unknown data statistics 'sorce'. Did you mean 'source'"),
        ({"channels": 2}, r"data channels must be 1 or 3, got 2"),
        ({"resize": 0}, r"data resize must be at least 1, got 0"),
        ({"crop": 1.2}, r"data crop must be"),
    ],
)
def test_impossible_choices_are_refused(choices: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fake("CIFAR10", **choices)


def test_without_validation_images() -> None:
    data = fake("CIFAR10", validation=0)
    assert (len(data.train), len(data.validation)) == (50_000, 0)
    assert len(fake("CIFAR10", validation=0.5).validation) == 25_000

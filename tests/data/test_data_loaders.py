"""Order, ranks, resuming, evaluation: what a batch holds is a function of (seed, epoch, step) alone."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.data import Augment, Batch, Data, DataSpec, eval_loader, load_data, train_loader
from sparse_robust.errors import UsageError


def joined(batches: Iterable[Batch]) -> Batch:
    return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


@pytest.fixture(params=["memory", "memory, resized late", "disk", "stream"])
def data(
    request: pytest.FixtureRequest, small_data: Callable[..., Data], picture_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Data:  # fmt: skip
    """27 training images in each of the forms that images come in."""
    if request.param == "memory":
        return small_data(31)
    if request.param == "memory, resized late":
        monkeypatch.setattr("sparse_robust.data.split.RESIDENT_BYTES", 10)
        return small_data(31, resize=9, crop=0.8)
    if request.param == "disk":
        root = picture_folder({"train": 9, "val": 1, "test": 3}, classes=("a", "b", "c"), size=None)
        return load_data(DataSpec(f"folder:{root}", resize=12, augment="rrc"))
    root = picture_folder({"train": 9, "validation": 1, "test": 3}, classes=("a", "b", "c"), size=None)
    pytest.importorskip("datasets")
    return load_data(DataSpec(f"hf:{root}", resize=12, augment="rrc", streaming=True, shuffle_buffer=7))


@pytest.mark.acceptance("double-win", "A-41")
def test_same_seed_same_batches_and_seed_0_is_a_seed(data: Data) -> None:
    def run(seed: int, epoch: int) -> Batch:
        return joined(train_loader(data, 8, seed=seed).epoch(epoch))

    first = run(0, 0)
    assert sorted(first.ids.tolist()) == sorted(data.train.ids.tolist()), "an epoch is each image once"
    assert first.x.dtype == torch.float32 and first.x.shape[1:] == (data.in_chans, *data.size)
    assert float(first.x.min()) >= 0 and float(first.x.max()) <= 1
    assert equal(first, run(0, 0))
    assert not torch.equal(first.ids, run(1, 0).ids) and not torch.equal(first.ids, run(0, 1).ids)


def test_starting_late_yields_the_rest_of_the_pass(data: Data) -> None:
    loader = train_loader(data, 5, seed=4)
    whole = list(loader.epoch(2))
    assert len(whole) == len(loader) == 6
    for start in (0, 1, 4, 6):
        rest = list(train_loader(data, 5, seed=4).epoch(2, start=start))
        assert len(rest) == 6 - start
        assert all(equal(a, b) for a, b in zip(rest, whole[start:], strict=True))
    with pytest.raises(UsageError, match=r"start must be within the 6 steps of an epoch, got 7"):
        loader.epoch(0, start=7)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_a_single_rank(data: Data, world: int) -> None:
    single = list(train_loader(data, 6, seed=1).epoch(1))
    ranks = [list(train_loader(data, 6, seed=1, rank=rank, world=world).epoch(1)) for rank in range(world)]
    left_out = [batch for batch in single if len(batch.y) < 2 * world]
    assert {len(steps) for steps in ranks} == {len(single) - len(left_out)}
    for step, whole in enumerate(single[: len(ranks[0])]):
        for rank in range(world):
            assert equal(ranks[rank][step], Batch(*(tensor[rank::world] for tensor in whole)))


def test_an_image_is_augmented_alike_in_any_batch(data: Data) -> None:
    one, other = (joined(train_loader(data, size, seed=3).epoch(0)) for size in (4, 9))
    where = {int(i): p for p, i in enumerate(other.ids)}
    order = torch.tensor([where[int(i)] for i in one.ids])
    assert torch.equal(one.x, other.x[order]) and torch.equal(one.y, other.y[order])


def test_the_short_batch_is_kept_dropped_or_left_out(small_data: Callable[..., Data]) -> None:
    data = small_data(31)  # 27 train
    assert [len(b.y) for b in train_loader(data, 12, seed=0).epoch(0)] == [12, 12, 3]
    assert [len(b.y) for b in train_loader(data, 12, seed=0, drop_last=True).epoch(0)] == [12, 12]
    assert [len(b.y) for b in train_loader(data, 13, seed=0).epoch(0)] == [13, 13], "one image has no batch statistics"
    assert [len(b.y) for b in train_loader(data, 1, seed=0).epoch(0)] == 27 * [1]
    for rank in range(2):
        assert len(train_loader(data, 12, seed=0, rank=rank, world=2)) == 2, "no rank may have a single image"
    with pytest.raises(UsageError, match=r"27 training images make no step of 64 on 1 ranks"):
        train_loader(data, 64, seed=0, drop_last=True)


@pytest.mark.acceptance("double-win", "A-31")
@pytest.mark.parametrize(("batch", "world"), list(itertools.product((1, 2, 3, 7, 100), (1, 2, 3, 8))))
def test_evaluation_counts_each_image_once(small_data: Callable[..., Data], batch: int, world: int) -> None:
    split = small_data().test
    assert len(split) == 7
    loaders = [eval_loader(split, batch, rank=rank, world=world) for rank in range(world)]
    seen = [b for loader in loaders for b in loader]
    assert sorted(torch.cat([b.ids for b in seen]).tolist()) == split.ids.tolist()
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders], "iterable again"
    assert all(len(b.y) > 0 for b in seen), "no padding, no empty batch"


@pytest.mark.acceptance("double-win", "A-31")
def test_accuracy_does_not_depend_on_batches_or_ranks(data: Data) -> None:
    """Predictions by nearest class mean: integer counts, equal for every way to pass over the split."""
    split = data.test

    def correct(batches: Iterable[Batch]) -> Tensor:
        total = torch.zeros(2, dtype=torch.int64)
        for x, y, _ in batches:
            prediction = (x.double().mean((1, 2, 3)) * 1e4).long() % data.num_classes
            total += torch.tensor([int((prediction == y).sum()), len(y)])
        return total

    expected = correct(eval_loader(split, 1))
    assert int(expected[1]) == len(split)
    for batch, world in ((3, 1), (3, 2), (100, 1), (4, 3)):
        parts = [correct(eval_loader(split, batch, rank=r, world=world)) for r in range(world)]
        assert torch.equal(torch.stack(parts).sum(0), expected)


def test_evaluation_neither_shuffles_nor_augments(small_data: Callable[..., Data]) -> None:
    data = small_data()
    seen = joined(eval_loader(data.test, 3))
    assert torch.equal(seen.ids, data.test.ids) and torch.equal(seen.y, data.test.labels)
    assert torch.equal(seen.x, data.test.images(torch.arange(7)).float() / 255)


def test_limit_spreads_over_the_file(small_data: Callable[..., Data]) -> None:
    split = small_data().test
    assert joined(eval_loader(split, 2, limit=3)).ids.tolist() == split.ids[[0, 2, 4]].tolist()
    assert len(joined(eval_loader(split, 2, limit=70)).ids) == 7
    ranks = [joined(eval_loader(split, 2, limit=5, rank=r, world=2)).ids for r in range(2)]
    assert sorted(torch.cat(ranks).tolist()) == joined(eval_loader(split, 9, limit=5)).ids.tolist()


@pytest.mark.parametrize("data", ["disk"], indirect=True)
def test_ctrl_c_is_not_for_the_workers(data: Data) -> None:
    """A terminal sends it to them, too; the main process needs their batches until it can save."""
    batches = train_loader(data, 3, seed=1, workers=1).epoch(0)
    first = [next(batches)]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGINT)
    assert equal(joined([*first, *batches]), joined(train_loader(data, 3, seed=1).epoch(0)))


@pytest.mark.parametrize("workers", [2])
def test_workers_change_nothing(data: Data, workers: int) -> None:
    loader = train_loader(data, 6, seed=1, workers=workers)
    alone = train_loader(data, 6, seed=1)
    for epoch, start in ((0, 0), (1, 2)):
        both = zip(loader.epoch(epoch, start=start), alone.epoch(epoch, start=start), strict=True)
        assert all(equal(a, b) for a, b in both)
    assert equal(joined(eval_loader(data.test, 2, workers=workers)), joined(eval_loader(data.test, 2)))


def test_an_abandoned_pass_leaves_no_trace(data: Data) -> None:
    loader = train_loader(data, 6, seed=1, workers=1)
    next(iter(loader.epoch(0)))
    assert equal(joined(loader.epoch(1)), joined(train_loader(data, 6, seed=1).epoch(1)))


def test_resizing_early_and_late_agree(small_data: Callable[..., Data], monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"resize": 9, "crop": 0.8}
    early = small_data(31, **choices)
    views = joined(eval_loader(early.test, 3)), joined(train_loader(early, 5, seed=0).epoch(0))
    monkeypatch.setattr("sparse_robust.data.split.RESIDENT_BYTES", 10)
    late = small_data(31, **choices)
    assert equal(views[0], joined(eval_loader(late.test, 3)))
    assert equal(views[1], joined(train_loader(late, 5, seed=0).epoch(0)))
    assert early.digest == late.digest


def test_random_resized_crops_of_images_in_memory(small_data: Callable[..., Data]) -> None:
    data = small_data(31, resize=14, augment="rrc", channels=3)
    seen = joined(train_loader(data, 8, seed=0).epoch(0))
    assert seen.x.shape == (27, 3, 14, 14) and len(seen.x.flatten(1).unique(dim=0)) == 27
    plain = joined(train_loader(data, 8, seed=0, augment=Augment(area=(1.0, 1.0), ratio=(1.0, 1.0))).epoch(0))
    whole = torch.stack([data.train.images(data.train.ids.eq(i).nonzero().flatten())[0] for i in plain.ids])
    assert (plain.x - whole.float() / 255).abs().max() <= 1.001 / 255, "a crop of everything is a resize"


def test_impossible_loaders_are_refused(small_data: Callable[..., Data]) -> None:
    data = small_data()
    for arguments, message in (
        ({"batch_size": 0}, r"batch_size of at least 1"),
        ({"batch_size": 1, "world": 2}, r"batch_size is over all ranks: expected at least 2"),
        ({"batch_size": 4, "rank": 2, "world": 2}, r"rank from 0 to world - 1, got rank 2 of world 2"),
        ({"batch_size": 4, "workers": -1}, r"workers of at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            train_loader(data, seed=0, **arguments)
    with pytest.raises(UsageError, match=r"limit must be at least 1 image"):
        eval_loader(data.test, 2, limit=0)


def test_a_network_learns_from_the_batches() -> None:
    data = load_data(DataSpec("digits", fraction=0.5))
    model = nn.Linear(64, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for epoch in range(4):
        for x, y, _ in train_loader(data, 50, seed=0, augment="none").epoch(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.flatten(1)), y).backward()
            optimizer.step()
    correct = sum(int((model(x.flatten(1)).argmax(1) == y).sum()) for x, y, _ in eval_loader(data.test, 100))
    assert correct / len(data.test) > 0.8


@pytest.mark.gpu
def test_batches_on_the_device_equal_those_of_the_cpu(small_data: Callable[..., Data]) -> None:
    data = small_data(31)
    here, there = (joined(train_loader(data, 5, seed=0, device=device).epoch(0)) for device in ("cpu", "cuda"))
    assert there.x.is_cuda and equal(here, Batch(*(tensor.cpu() for tensor in there)))

"""Batches: which images, in which order, on which rank, as pure functions of (seed, epoch, step, sample id)."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from sparse_robust.data.augment import Augment, crop_and_resize, crop_boxes, draws, make_augment, shift_and_mirror
from sparse_robust.data.data import Data
from sparse_robust.data.images import fit, resize, send, to_unit
from sparse_robust.data.split import Example, MemorySplit, ReaderSplit, Split, StreamSplit
from sparse_robust.data.subsets import random_order
from sparse_robust.errors import UsageError
from sparse_robust.seeding import derive_seed


class Batch(NamedTuple):
    """A batch: ``x`` float32 [n,C,H,W] in [0,1], ``y`` int64 [n] classes, ``ids`` int64 [n] sample ids."""

    x: Tensor
    y: Tensor
    ids: Tensor


@dataclass(frozen=True)
class _How:
    """What is done to the images of a pass: None augments nothing."""

    augment: Augment | None
    seed: int

    def images(self, split: ReaderSplit | StreamSplit, native: list[Tensor], ids: Tensor, epoch: int) -> Tensor:
        """Images decoded one by one, uint8 [C,h,w] each, to uint8 [n,C,H,W]."""
        size, augment = split.view.size, self.augment
        if augment is None:
            return torch.cat([fit(image[None], size, split.view.crop) for image in native])
        drawn = draws(ids, self.seed, epoch)
        if augment.area is None:
            shown = [fit(image[None], size, 1.0) for image in native]
        else:
            heights, widths = (torch.tensor([image.shape[d] for image in native]) for d in (1, 2))
            boxes = crop_boxes(drawn, heights, widths, augment).tolist()
            shown = [
                resize(image[None, :, top : top + height, left : left + width], *size)
                for image, (top, left, height, width) in zip(native, boxes, strict=True)
            ]
        return shift_and_mirror(torch.cat(shown), drawn, augment)


class _MemoryFeed:
    """Batches of images that live on the device as uint8 and are augmented there."""

    def __init__(self, split: MemorySplit, how: _How, device: torch.device) -> None:
        self.split, self.how, self.device = split, how, device
        whole = how.augment is not None and how.augment.area is not None
        sized = None if whole else split.sized
        self.resident = sized is not None
        self.pixels = (split.pixels if sized is None else sized).to(device)
        self.labels = split.labels.to(device)

    def batches(self, plan: list[Tensor], epoch: int) -> Iterator[Batch]:
        for positions in plan:
            ids, chosen = self.split.ids[positions], send(positions, self.device)
            images = self._images(self.pixels[chosen], ids, epoch)
            yield Batch(to_unit(images), self.labels[chosen], send(ids, self.device))

    def _images(self, images: Tensor, ids: Tensor, epoch: int) -> Tensor:
        augment, view = self.how.augment, self.split.view
        if augment is None:
            return images if self.resident else fit(images, view.size, view.crop)
        drawn = draws(ids, self.how.seed, epoch)
        if augment.area is not None:
            count, _, height, width = images.shape
            heights, widths = torch.full((count,), height), torch.full((count,), width)
            images = crop_and_resize(images, crop_boxes(drawn, heights, widths, augment), view.size)
        elif not self.resident:
            images = fit(images, view.size, view.crop)
        return shift_and_mirror(images, drawn, augment)


class _Reading(Dataset[tuple[Tensor, Tensor, Tensor] | str]):
    """What a worker process runs: (epoch, positions) -> one batch in uint8, or what is wrong with an image of it.

    Errors travel as text: raised over there, they would arrive wrapped in the worker's traceback.
    """

    def __init__(self, split: ReaderSplit, how: _How) -> None:
        self.split, self.how = split, how

    def __getitem__(self, request: tuple[int, Tensor]) -> tuple[Tensor, Tensor, Tensor] | str:
        epoch, positions = request
        ids = self.split.ids[positions]
        try:
            native = [self.split.native(int(p)) for p in positions]
        except UsageError as error:
            return str(error)
        return self.how.images(self.split, native, ids, epoch), self.split.labels[positions], ids


class _Plan(Sampler[tuple[int, Tensor]]):
    """The requests of the next pass."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def _leave_ctrl_c(worker: int) -> None:
    """Leave it to the main process, which may still want batches until it can save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _ReaderFeed:
    """Batches that worker processes decode and augment. The workers stay between passes; one pass runs at a time."""

    def __init__(self, split: ReaderSplit, how: _How, device: torch.device, workers: int) -> None:
        self.device, self.plan = device, _Plan()
        self.loader: DataLoader[Any] = DataLoader(
            _Reading(split, how), batch_size=None, sampler=self.plan, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=device.type == "cuda", worker_init_fn=_leave_ctrl_c,
        )  # fmt: skip

    def batches(self, plan: list[Tensor], epoch: int) -> Iterator[Batch]:
        self.plan.requests = [(epoch, positions) for positions in plan]
        for read in self.loader:
            if isinstance(read, str):
                raise UsageError(read)
            x, y, i = (tensor.to(self.device, non_blocking=True) for tensor in read)
            yield Batch(to_unit(x), y, i)


class _StreamFeed:
    """Batches of a stream: this process reads it in order and threads decode what belongs to this rank.

    Each rank reads the whole stream, so that the batches do not depend on the number of ranks; what it skips is not
    decoded.
    """

    def __init__(self, split: StreamSplit, how: _How, device: torch.device, workers: int) -> None:
        self.split, self.how, self.device, self.threads = split, how, device, max(1, workers)

    def batches(self, plan: list[Tensor], epoch: int) -> Iterator[Batch]:
        """Here the positions of the plan count in the order of the pass, not of the file."""
        shuffled = self.how.augment is not None
        passing = enumerate(self._shuffled(epoch) if shuffled else self.split.examples())
        with ThreadPoolExecutor(self.threads) as pool:
            waiting: deque[Any] = deque()
            for positions in plan:
                wanted = set(positions.tolist())
                chosen: list[Example] = []
                while len(chosen) < len(wanted):
                    position, example = next(passing)
                    if position in wanted:
                        chosen.append(example)
                waiting.append(pool.submit(self._decode, chosen, epoch))
                if len(waiting) > self.threads:
                    yield self._placed(*waiting.popleft().result())
            while waiting:
                yield self._placed(*waiting.popleft().result())

    def _decode(self, examples: list[Example], epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.tensor([example.id for example in examples])
        native = [self.split.decode(example) for example in examples]
        return self.how.images(self.split, native, ids, epoch), torch.tensor([e.target for e in examples]), ids

    def _placed(self, images: Tensor, labels: Tensor, ids: Tensor) -> Batch:
        images, labels, ids = (send(tensor, self.device) for tensor in (images, labels, ids))
        return Batch(to_unit(images), labels, ids)

    def _shuffled(self, epoch: int) -> Iterator[Example]:
        """One pass in random order: the next example is drawn from a buffer that the stream refills."""
        generator = torch.Generator().manual_seed(derive_seed("stream order", self.how.seed, epoch))
        buffer: list[Example] = []
        for example in self.split.examples():
            if len(buffer) < self.split.buffer:
                buffer.append(example)
                continue
            drawn = int(torch.randint(len(buffer), (1,), generator=generator))
            yield buffer[drawn]
            buffer[drawn] = example
        for drawn in torch.randperm(len(buffer), generator=generator).tolist():
            yield buffer[drawn]


class TrainLoader:
    """Training batches of one rank; see `train_loader`."""

    def __init__(
        self, split: Split, batch_size: int, *, how: _How, device: torch.device, rank: int, world: int, workers: int,
        drop_last: bool,
    ) -> None:  # fmt: skip
        self.split, self.batch_size, self.rank, self.world = split, batch_size, rank, world
        self.how, self.feed = how, _feed(split, how, device, workers)
        steps, rest = divmod(len(split), batch_size)
        # A rank without an image could not take part in the step.
        self.steps = steps + (rest >= min(2 * world, batch_size) and not drop_last)

    def __len__(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self.steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Iterate over the batches of ``epoch`` (from 0 on) from step ``start`` on: exactly those of a whole pass."""
        if not 0 <= start <= self.steps:
            raise UsageError(f"start must be within the {self.steps} steps of an epoch, got {start}.")
        order = torch.arange(len(self.split))
        if not isinstance(self.split, StreamSplit):
            order = random_order(self.split.ids, "order", self.how.seed, epoch)
        batches = [order[s * self.batch_size : (s + 1) * self.batch_size] for s in range(start, self.steps)]
        return self.feed.batches([batch[self.rank :: self.world] for batch in batches], epoch)


class EvalLoader(Iterable[Batch]):
    """Every image once over all ranks, in file order, not augmented; see `eval_loader`.

    ``world`` tells `evaluate` whether what it saw is a shard that has to be merged with others, ``images`` how many
    this rank will give.
    """

    def __init__(self, plan: list[Tensor], feed: _MemoryFeed | _ReaderFeed | _StreamFeed, world: int = 1) -> None:
        self.plan, self.feed, self.world = plan, feed, world
        self.images = sum(map(len, plan))

    def __len__(self) -> int:
        """Batches of this rank; ranks may differ by one."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return self.feed.batches(self.plan, 0)


def train_loader(
    data: Data, batch_size: int, *, seed: int, augment: str | Augment = "auto", device: torch.device | str = "cpu",
    rank: int = 0, world: int = 1, workers: int = 0, drop_last: bool = False,
) -> TrainLoader:  # fmt: skip
    """Return the loader of the training images.

    Order and augmentation depend on (seed, epoch, sample id) alone: rank r of ``world`` gets ``[r::world]`` of the very
    batches that a single rank gets. The short batch at the end is kept, unless it leaves a rank fewer than the two
    images that batch statistics need. Images in memory stay on ``device`` as uint8; others are decoded by ``workers``
    processes.

    Args:
        batch_size: images of a step, over all ranks together.
        seed: any integer.
        augment: none, shift, crop-flip, rrc, auto, or an `Augment`.
        drop_last: leave the short batch out.

    Raises:
        UsageError: for sizes that cannot be, an unknown augmentation, or when no step would be left.
    """
    _check(batch_size, rank, world, workers)
    if batch_size < world:
        raise UsageError(
            f"batch_size is over all ranks: expected at least {world}, one image a rank, got {batch_size}."
        )
    how = _How(make_augment(augment, data), seed)
    loader = TrainLoader(
        data.train, batch_size, how=how, device=torch.device(device), rank=rank, world=world, workers=workers,
        drop_last=drop_last,
    )  # fmt: skip
    if len(loader) == 0:
        raise UsageError(
            f"{data.name}: {len(data.train)} training images make no step of {batch_size} on {world} ranks: use a "
            "smaller batch or more data."
        )
    return loader


def eval_loader(
    split: Split, batch_size: int, *, device: torch.device | str = "cpu", rank: int = 0, world: int = 1,
    workers: int = 0, limit: int | None = None,
) -> EvalLoader:  # fmt: skip
    """Return a loader that passes over a split once, as often as it is iterated: no padding, no augmentation.

    Rank r gets every ``world``-th image from the r-th on, so the ranks together see each image once. Their numbers of
    batches may differ by one: gather results after the pass, not batch by batch.

    Args:
        batch_size: images of a batch, over all ranks together.
        limit: use only so many images, evenly spaced over the file (files are often sorted by class); the first ones
            of a stream.

    Raises:
        UsageError: for sizes that cannot be.
    """
    _check(batch_size, rank, world, workers)
    positions = torch.arange(len(split))
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1 image, got {limit}.")
    if limit is not None and limit < len(split):
        positions = torch.arange(limit)
        positions = positions if isinstance(split, StreamSplit) else positions * len(split) // limit
    mine = positions[rank::world]
    plan = list(mine.split(max(1, batch_size // world))) if len(mine) else []
    return EvalLoader(plan, _feed(split, _How(None, 0), torch.device(device), workers), world)


def _feed(split: Split, how: _How, device: torch.device, workers: int) -> _MemoryFeed | _ReaderFeed | _StreamFeed:
    if isinstance(split, MemorySplit):
        return _MemoryFeed(split, how, device)
    if isinstance(split, ReaderSplit):
        return _ReaderFeed(split, how, device, workers)
    assert isinstance(split, StreamSplit)
    return _StreamFeed(split, how, device, workers)


def _check(batch_size: int, rank: int, world: int, workers: int) -> None:
    if batch_size < 1 or workers < 0:
        raise UsageError(
            f"expected batch_size of at least 1 and workers of at least 0, got {batch_size} and {workers}."
        )
    if not 0 <= rank < world:
        raise UsageError(f"expected a rank from 0 to world - 1, got rank {rank} of world {world}.")

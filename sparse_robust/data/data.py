"""A data set ready for use: three splits that share no image, their form, their statistics, a digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch

from sparse_robust.data.images import to_channels
from sparse_robust.data.source import Source
from sparse_robust.data.spec import DataSpec
from sparse_robust.data.split import (
    RESIDENT_BYTES,
    TEST_IDS,
    VALIDATION_IDS,
    MemorySplit,
    ReaderSplit,
    Split,
    StreamSplit,
    View,
)
from sparse_robust.data.statistics import statistics
from sparse_robust.data.subsets import hold_out, stratified, subset_size
from sparse_robust.errors import UsageError
from sparse_robust.files import canonical_json

# Held out as test images where a set has none: always the same ones.
TEST_SHARE = 0.2
# Images on disk are taken into memory by themselves if all have one size, of at most this side.
SMALL_SIDE = 96


@dataclass(frozen=True, eq=False)
class Data:
    """A data set as `load_data` returns it.

    Attributes:
        name: as in its spec.
        train, validation, test: the splits; no image is in two of them.
        classes: names, in the order of the labels.
        mean, std: one number a channel, in [0,1] pixel units.
        in_chans: channels of an image.
        size: (height, width) that a network sees.
        attribution: authors, reference and licence in a line.
        digest: SHA-256 over the splits, the classes and the statistics; equal for equal data on every machine.
        flips: mirroring an image keeps its class.
        augment: name of the augmentation that its spec asks for.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_chans: int
    size: tuple[int, int]
    attribution: str
    digest: str
    flips: bool = True
    augment: str = "auto"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)


def assemble(source: Source, spec: DataSpec) -> Data:
    """Turn what a reader found into what its user asked for.

    Raises:
        UsageError: for labels out of range, a single class, a fraction that leaves no image, a hold-out that leaves
            none, or missing statistics.
    """
    train, validation, test = _alike(_three(source, spec), spec)
    for role, split in (("training", train), ("validation", validation), ("test", test)):
        _check_labels(spec.name, role, split, source.classes)
    train = _subset(train, spec)
    mean, std = statistics(spec.statistics, source.reference, train, spec.name)
    parts = [train.digest(), validation.digest(), test.digest(), list(source.classes), mean, std]
    return Data(
        name=spec.name,
        train=train,
        validation=validation,
        test=test,
        classes=source.classes,
        mean=mean,
        std=std,
        in_chans=train.view.channels,
        size=train.view.size,
        attribution=source.attribution,
        digest=hashlib.sha256(canonical_json(parts).encode()).hexdigest(),
        flips=source.flips,
        augment=spec.augment,
    )


def _three(source: Source, spec: DataSpec) -> tuple[Split, Split, Split]:
    """Training, validation and test images: those of the source's own files first, the rest held out."""
    train, validation, test = source.train, source.validation, source.test
    if test is None:
        # Without a test split of its own the labelled validation images are the test, as with ImageNet and VisDA.
        test, validation = (_renumbered(validation), None) if validation is not None else (None, None)
    if test is None:
        train, test = _cut(train, TEST_SHARE, last=False, name=spec.name)
        test = _renumbered(test)
    if validation is not None:
        if spec.validation is not None:
            raise UsageError(f"{spec.name} has validation images of its own: leave data validation unset.")
        return train, validation, test
    held = source.held_out if spec.validation is None else spec.validation
    train, validation = _cut(train, held, last=source.last, name=spec.name)
    return train, validation, test


def _cut(train: Split, held: int | float, *, last: bool, name: str) -> tuple[Split, Split]:
    if isinstance(train, StreamSplit):
        if not isinstance(held, int) or not 0 <= held < len(train):
            raise UsageError(
                f"{name} is streamed and lacks a validation or test split of its own: say how many of its {len(train)} "
                "training images, the first ones, validate (data validation: a whole number)."
            )
        positions = torch.arange(len(train))
        return train.select(positions[held:]), train.select(positions[:held])
    kept, out = hold_out(train.labels, train.ids, held, last=last)
    return train.select(kept), train.select(out)


def _renumbered(split: Split) -> Split:
    """The split with ids in the range of test images."""
    assert isinstance(split, MemorySplit | ReaderSplit | StreamSplit)
    return replace(split, ids=split.ids % VALIDATION_IDS + TEST_IDS)


def _alike(splits: tuple[Split, Split, Split], spec: DataSpec) -> list[Split]:
    """The splits framed; all in memory or none, all of one size."""
    framed = [_framed(split, spec) for split in splits]
    if len({split.view for split in framed if len(split)}) > 1:
        framed = [_framed(split, replace(spec, storage="disk")) for split in splits]
    sizes = {split.view for split in framed if len(split)}
    if len(sizes) > 1:
        shown = " and ".join(sorted("x".join(map(str, view.size)) for view in sizes))
        raise UsageError(
            f"{spec.name}: training, validation and test images differ in size ({shown}): set data resize."
        )
    return framed


def _framed(split: Split, spec: DataSpec) -> Split:
    """The split as the spec wants to see it: channels, size, crop, in memory or not."""
    channels = spec.channels or split.view.channels
    size = (spec.resize, spec.resize) if spec.resize else split.view.size
    view = View(size, spec.crop or split.view.crop, channels)
    if isinstance(split, MemorySplit):
        return replace(split, pixels=to_channels(split.pixels, channels), view=view)
    assert isinstance(split, ReaderSplit | StreamSplit)
    split = replace(split, view=view)
    return _stored(split, spec) if isinstance(split, ReaderSplit) else split


def _stored(split: ReaderSplit, spec: DataSpec) -> Split:
    """Images on disk, taken into memory when the spec says so or, by default, when they are small and of one size."""
    if spec.storage == "disk" or len(split) == 0:
        return split
    probed = torch.arange(min(32, len(split))) * len(split) // min(32, len(split))
    shapes = {tuple(split.native(int(p)).shape) for p in probed}
    _, height, width = next(iter(shapes))
    small = len(shapes) == 1 and max(height, width) <= SMALL_SIDE
    if spec.storage == "auto" and not (small and len(split) * split.view.channels * height * width <= RESIDENT_BYTES):
        return split
    pixels = [split.native(p) for p in range(len(split))] if small else []
    if len({image.shape for image in pixels}) == 1:
        # Small images keep their size and are seen whole, unless the spec says otherwise.
        size = (spec.resize, spec.resize) if spec.resize else (height, width)
        view = View(size, spec.crop or 1.0, split.view.channels)
        return MemorySplit(torch.stack(pixels), split.targets, split.ids, view)
    if spec.storage == "auto":
        return split
    stored = torch.cat([split.images(torch.tensor([p])) for p in range(len(split))])
    return MemorySplit(stored, split.targets, split.ids, replace(split.view, crop=1.0))


def _check_labels(name: str, role: str, split: Split, classes: tuple[str, ...]) -> None:
    if isinstance(split, StreamSplit) and split.known_labels is None:
        return  # each label is checked as it comes past
    labels = split.labels
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero().flatten()
    if len(wrong):
        first = int(wrong[0])
        raise UsageError(
            f"{name}: {len(wrong)} of {len(labels)} {role} labels are out of range, first that of image "
            f"{int(split.ids[first]) % TEST_IDS}: expected 0..{len(classes) - 1}, got {int(labels[first])}."
        )
    present = torch.unique(labels)
    if role == "training" and len(present) < 2:
        seen = classes[int(present[0])] if len(present) else "none"
        raise UsageError(f"{name}: expected training images of two classes or more, got one ({seen}).")


def _subset(train: Split, spec: DataSpec) -> Split:
    count = subset_size(len(train), spec.fraction)
    if count == len(train):
        return train
    if spec.subset == "first_n":
        return train.select(torch.arange(count))
    if isinstance(train, StreamSplit):
        raise UsageError(f"{spec.name} is streamed: only the first images of it can be taken. Set subset: first_n.")
    return train.select(stratified(train.labels, train.ids, count, "subset", spec.subset_seed))

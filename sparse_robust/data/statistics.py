"""Channel means and deviations that a network normalises with; never taken from test images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_robust.data.split import MemorySplit, Split, StreamSplit
from sparse_robust.errors import UsageError

Moments = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET: Moments = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# CIFAR and SVHN as released with Double-Win-LTH (VITA-Group, MIT licence); the SVHN deviations are about 0.6 of those
# that its images have. The others are those of the torchvision and timm examples.
REFERENCE: dict[str, Moments] = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "SVHN": ((0.4377, 0.4438, 0.4728), (0.1201, 0.1231, 0.1052)),
    "MNIST": ((0.1307,), (0.3081,)),
    "FashionMNIST": ((0.2860,), (0.3530,)),
    "ImageNet": IMAGENET,
}
# Images that are decoded to compute the statistics of a set that is not in memory.
SAMPLE = 2000


def statistics(how: str, known: Moments | None, train: Split, name: str) -> Moments:
    """Return (mean, std), one number a channel, in [0,1] pixel units.

    Args:
        how: as `DataSpec.statistics`.
        known: published statistics of the source.
        train: the training images in use.
        name: of the data set, for errors.

    Raises:
        UsageError: if published ones are asked for and there are none, or if a channel is constant.
    """
    if how == "reference" and known is None:
        raise UsageError(f"{name} has no published statistics: use statistics source, computed or imagenet.")
    if how == "imagenet":
        known = IMAGENET
    if known is None or how == "computed":
        return computed(train, name)
    return _in_channels(known, train.view.channels)


def computed(train: Split, name: str) -> Moments:
    """Compute the statistics over all pixels of the training images (2,000 evenly spaced ones if they are on disk)."""
    # Sums of whole numbers are exact: the statistics do not depend on the order of summation.
    total = 0
    sums = squares = torch.zeros(train.view.channels, dtype=torch.int64)
    for part in _parts(train):
        total += part.numel() // part.shape[1]
        sums = sums + part.sum((0, 2, 3), dtype=torch.int64)
        squares = squares + (part.to(torch.int32) ** 2).sum((0, 2, 3), dtype=torch.int64)
    mean = sums.double() / total / 255
    std = (squares.double() / total / 255**2 - mean**2).clamp_min(0).sqrt()
    if bool((std == 0).any()):
        raise UsageError(f"every training pixel of a channel of {name} has one value: there is nothing to learn from.")
    return tuple(mean.tolist()), tuple(std.tolist())


def _parts(train: Split) -> Iterator[Tensor]:
    if isinstance(train, MemorySplit):
        yield from train.pixels.split(1024)
        return
    count = min(SAMPLE, len(train))
    # A stream is read from its beginning; reading all of it for a few images would cost more than it is worth.
    positions = torch.arange(count) if isinstance(train, StreamSplit) else torch.arange(count) * len(train) // count
    for chosen in positions.split(count if isinstance(train, StreamSplit) else 128):
        yield from train.images(chosen).split(128)


def _in_channels(known: Moments, channels: int) -> Moments:
    """Published statistics for another number of channels: repeated for colour, averaged for grey."""
    mean, std = known
    if len(mean) == channels:
        return known
    if channels == 3:
        return mean * 3, std * 3
    return (sum(mean) / len(mean),), (sum(std) / len(std),)

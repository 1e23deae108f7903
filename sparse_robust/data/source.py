"""What a reader of a data set returns: its images as they come, before any choice of the user."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_robust.data.split import MemorySplit, ReaderSplit, Split, View
from sparse_robust.data.statistics import Moments

# The input of ImageNet networks: shorter side 256, centre 224.
LARGE_SIZE, LARGE_CROP = 224, 0.875


@dataclass(frozen=True)
class Source:
    """A data set as its files have it.

    Attributes:
        classes: names, in the order of the labels.
        train: training images in file order, ids from 0.
        test: test images, or None if the set has none of its own.
        validation: validation images, or None if the set has none of its own.
        held_out: images or share of the training images that validate when it has none of its own.
        last: these are the last ones of the file; otherwise the classes in proportion.
        attribution: authors, reference and licence in a line.
        reference: published (mean, std).
        flips: mirroring an image keeps its class.
    """

    classes: tuple[str, ...]
    train: Split
    test: Split | None
    validation: Split | None = None
    held_out: int | float = 0.1
    last: bool = False
    attribution: str = ""
    reference: Moments | None = None
    flips: bool = True


def memory_split(pixels: Tensor, labels: Tensor | Sequence[int], *, first_id: int | Tensor = 0) -> MemorySplit:
    """Wrap uint8 [N,h,w] or [N,C,h,w] and labels; ``first_id`` is the first id, or all of them."""
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels
    ids = first_id if isinstance(first_id, Tensor) else torch.arange(len(pixels)) + first_id
    view = View((pixels.shape[2], pixels.shape[3]), 1.0, pixels.shape[1])
    return MemorySplit(pixels.contiguous(), torch.as_tensor(labels).to(torch.int64), ids.to(torch.int64), view)


def reader_split(
    read: Callable[[int], Any],
    labels: Sequence[int],
    describe: Callable[[int], str],
    *,
    channels: int,
    first_id: int = 0,
) -> ReaderSplit:
    """Wrap a reader of ``len(labels)`` images."""
    positions = torch.arange(len(labels))
    view = View((LARGE_SIZE, LARGE_SIZE), LARGE_CROP, channels)
    return ReaderSplit(read, positions, torch.as_tensor(labels).to(torch.int64), positions + first_id, view, describe)

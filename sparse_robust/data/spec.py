"""What names a data set and the part of it that is used."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from sparse_robust.errors import UsageError, unknown

Subset = Literal["stratified", "first_n"]
Statistics = Literal["source", "reference", "computed", "imagenet"]
Storage = Literal["auto", "memory", "disk"]
AUGMENTS = ("auto", "none", "shift", "crop-flip", "rrc")


@dataclass(frozen=True)
class DataSpec:
    """A data set, the share of its training images, and the form in which a network sees them.

    Raises:
        UsageError: for a value out of its range, naming the field.
    """

    name: str
    """fashion-mnist-source, fashion-mnist-target, digits, fashion-mnist, torchvision:NAME, hf:NAME or folder:PATH."""
    root: str | None = None
    """Folder of the files; None looks where the source puts them, then in SPARSE_ROBUST_DATA."""
    download: bool = False
    """Fetch a torchvision set that is not there."""
    fraction: float = 1.0
    """Share of the training images that is used, in (0, 1]: floor(n * fraction); validation is never reduced."""
    subset: Subset = "stratified"
    """Which of them: the classes in proportion, or the first ones in file order."""
    subset_seed: int = 0
    """Seed of the stratified choice; the same for every training seed, so that all see the same images."""
    validation: int | float | None = None
    """Images (a whole number) or share (below 1) held out of training; None is the source's own, 0 is none."""
    resize: int | None = None
    """Side of the square that the network sees; None keeps the size of the images (224 for large ones)."""
    crop: float | None = None
    """Share of the resized image that evaluation keeps, in (0, 1]; None is all, or 0.875 for large images."""
    channels: int | None = None
    """1 or 3: grey images are repeated, colour images are turned to grey; None keeps the source's."""
    statistics: Statistics = "source"
    """Mean and deviation: the published ones where there are, else computed over the training images in use;
    reference insists on published ones, computed on computed ones, imagenet takes ImageNet's."""
    augment: str = "auto"
    """none, shift, crop-flip, rrc, or auto (by source)."""
    storage: Storage = "auto"
    """Pixels in memory (and on the device), or read from disk by workers; auto goes by size."""
    image_column: str | None = None
    """hf: the column of the images, where it cannot be told."""
    label_column: str | None = None
    """hf: the column of the labels, where it cannot be told."""
    config: str | None = None
    """hf: configuration of a set that has several."""
    streaming: bool = False
    """hf: read the training images in passing instead of storing them."""
    shuffle_buffer: int = 1000
    """hf, streaming: images among which the next one is drawn."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            choices, value = get_args(hints[field.name]), getattr(self, field.name)
            if choices and all(isinstance(choice, str) for choice in choices) and value not in choices:
                raise unknown(f"data {field.name}", str(value), choices)
        if self.augment not in AUGMENTS:
            raise unknown("data augment", str(self.augment), AUGMENTS)
        _check("fraction", self.fraction, "above 0 and at most 1", 0 < self.fraction <= 1)
        _check("crop", self.crop, "above 0 and at most 1", self.crop is None or 0 < self.crop <= 1)
        _check("resize", self.resize, "at least 1", self.resize is None or self.resize >= 1)
        _check("channels", self.channels, "1 or 3", self.channels in (None, 1, 3))
        _check("shuffle_buffer", self.shuffle_buffer, "at least 1", self.shuffle_buffer >= 1)
        held = self.validation
        fits = held is None or (isinstance(held, int) and held >= 0) or 0 <= held < 1
        _check("validation", held, "a whole number of images or a share of at least 0 and below 1", fits)


def _check(field: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise UsageError(f"data {field} must be {expected}, got {value!r}.")

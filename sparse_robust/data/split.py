"""A split of a data set: its images in memory, behind a reader, or in a stream, with one sample id an image."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_robust.data.images import fit, to_tensor
from sparse_robust.errors import SparseRobustError, UsageError

TEST_IDS = 1 << 40
"""First sample id of test images: they never meet those of training images, which count from 0."""
VALIDATION_IDS = 1 << 41
"""First sample id of validation images that come in files of their own."""

# Resized images above this are made batch by batch instead of once.
RESIDENT_BYTES = 1 << 30


@dataclass(frozen=True)
class View:
    """How evaluation sees an image: its centre ``crop``, resized to ``size`` (height, width), in ``channels``."""

    size: tuple[int, int]
    crop: float
    channels: int


class Split(ABC):
    """Images of one role. ``ids`` and ``labels`` are int64 [n] on the CPU; ``view`` is the form a network sees."""

    ids: Tensor
    view: View

    def __len__(self) -> int:
        return len(self.ids)

    @property
    @abstractmethod
    def labels(self) -> Tensor:
        """int64 [n], the class of each image."""

    @abstractmethod
    def select(self, positions: Tensor) -> Split:
        """Return the split of the images at ``positions`` (int64 [m])."""

    @abstractmethod
    def images(self, positions: Tensor) -> Tensor:
        """Return uint8 [m,C,H,W]: the images at ``positions`` as evaluation sees them."""

    @abstractmethod
    def content(self) -> bytes:
        """Return bytes that change when the images change, as far as can be told without decoding them."""

    def digest(self) -> str:
        """Return the SHA-256 of ids, labels, view and content."""
        digest = hashlib.sha256(f"{self.view}".encode())
        for tensor in (self.ids, self.labels):
            digest.update(tensor.numpy().tobytes())
        digest.update(self.content())
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class MemorySplit(Split):
    """Images in memory.

    Attributes:
        pixels: uint8 [N,C,h,w], as stored.
        targets: int64 [N].
        ids: int64 [N].
        view: as evaluation sees them.
    """

    pixels: Tensor
    targets: Tensor
    ids: Tensor
    view: View

    @property
    def labels(self) -> Tensor:
        return self.targets

    def select(self, positions: Tensor) -> MemorySplit:
        return MemorySplit(self.pixels[positions], self.targets[positions], self.ids[positions], self.view)

    @cached_property
    def sized(self) -> Tensor | None:
        """All images as evaluation sees them, uint8 [N,C,H,W], made once; None if that would take over a gibibyte."""
        height, width = self.view.size
        if len(self) * self.view.channels * height * width > RESIDENT_BYTES:
            return None
        return torch.cat([fit(part, self.view.size, self.view.crop) for part in self.pixels.split(1024)])

    def images(self, positions: Tensor) -> Tensor:
        if self.sized is not None:
            return self.sized[positions]
        return fit(self.pixels[positions], self.view.size, self.view.crop)

    def content(self) -> bytes:
        return hashlib.sha256(self.pixels.numpy().data).digest()


@dataclass(frozen=True, eq=False)
class ReaderSplit(Split):
    """Images that are read when they are asked for.

    Attributes:
        read: position in the source -> Pillow image; runs in worker processes.
        positions: int64 [n], where in the source each image is.
        targets: int64 [n].
        ids: int64 [n].
        view: as evaluation sees them.
        describe: position -> text that names the image in errors and in the digest (a path, a row).
    """

    read: Callable[[int], Any]
    positions: Tensor
    targets: Tensor
    ids: Tensor
    view: View
    describe: Callable[[int], str]

    @property
    def labels(self) -> Tensor:
        return self.targets

    def select(self, positions: Tensor) -> ReaderSplit:
        return replace(
            self, positions=self.positions[positions], targets=self.targets[positions], ids=self.ids[positions]
        )

    def native(self, position: int) -> Tensor:
        """Decode the image at ``position`` of this split: uint8 [C,h,w] in its own size.

        Raises:
            UsageError: if it cannot be read, naming it.
        """
        where = int(self.positions[position])
        return decode(lambda: self.read(where), self.view.channels, self.describe(where))

    def images(self, positions: Tensor) -> Tensor:
        return torch.cat([fit(self.native(int(p))[None], self.view.size, self.view.crop) for p in positions])

    def content(self) -> bytes:
        return "\n".join(self.describe(int(p)) for p in self.positions).encode()


class Example(NamedTuple):
    """One image in passing: its sample id, its class, and the function that decodes it to a Pillow image."""

    id: int
    target: int
    read: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class StreamSplit(Split):
    """Images that come past in file order and are not stored.

    Attributes:
        open: number of images to skip -> iterator of (class, function that decodes) in file order.
        ids: int64 [n], in file order.
        view: as evaluation sees them.
        name: what is streamed, for errors and the digest.
        buffer: images among which the next one of a shuffled pass is drawn.
        known_labels: int64 [n] where they are known without reading everything.
    """

    open: Callable[[int], Iterator[tuple[int, Callable[[], Any]]]]
    ids: Tensor
    view: View
    name: str
    buffer: int
    known_labels: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        if self.known_labels is None:
            raise UsageError(
                f"the labels of {self.name} are not known before they are read: load it without streaming."
            )
        return self.known_labels

    def select(self, positions: Tensor) -> StreamSplit:
        """Only a run of images in file order can be selected."""
        first = int(positions[0]) if len(positions) else 0
        if not torch.equal(positions, torch.arange(len(positions)) + first):
            raise UsageError(f"{self.name} is streamed: only the first images of it can be taken (subset first_n).")
        opened, known = self.open, self.known_labels
        return replace(
            self,
            open=lambda skip: opened(first + skip),
            ids=self.ids[positions],
            known_labels=None if known is None else known[positions],
        )

    def examples(self, skip: int = 0) -> Iterator[Example]:
        """Pass over the split once, in file order, from image ``skip`` on.

        Raises:
            UsageError: if the stream ends before the images it announced.
        """
        position = skip
        for target, read in islice(self.open(skip), len(self) - skip):
            yield Example(int(self.ids[position]), target, read)
            position += 1
        if position < len(self):
            raise UsageError(f"{self.name} ended after {position} of {len(self)} images: fetch it again.")

    def images(self, positions: Tensor) -> Tensor:
        wanted, decoded = set(positions.tolist()), {}
        for position, example in enumerate(self.examples()):
            if position in wanted:
                decoded[position] = fit(self.decode(example)[None], self.view.size, self.view.crop)
            if len(decoded) == len(wanted):
                break
        return torch.cat([decoded[int(p)] for p in positions])

    def decode(self, example: Example) -> Tensor:
        """Decode one example: uint8 [C,h,w] in its own size."""
        return decode(example.read, self.view.channels, f"{self.name} image {example.id % TEST_IDS}")

    def digest(self) -> str:
        """Return the SHA-256 of what is known before reading: ids, view and content."""
        return hashlib.sha256(f"{self.view}".encode() + self.ids.numpy().tobytes() + self.content()).hexdigest()

    def content(self) -> bytes:
        return self.name.encode()


def decode(read: Callable[[], Any], channels: int, name: str) -> Tensor:
    """Decode one image, or say which one cannot be read.

    Raises:
        UsageError: naming the image and what stands in the way.
    """
    try:
        return to_tensor(read(), channels)
    except SparseRobustError as error:
        raise UsageError(f"{name}: {error}") from error
    except (OSError, ValueError, SyntaxError, TypeError, AttributeError, MemoryError) as error:
        raise UsageError(
            f"{name} is not a readable image ({type(error).__name__}: {error}). Mend or remove it."
        ) from error

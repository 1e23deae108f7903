"""The data sets that come inside the package: real images, lossless, nothing to download."""

from __future__ import annotations

import hashlib
import lzma
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor

from sparse_robust.data import fashion
from sparse_robust.data.source import Source, memory_split
from sparse_robust.data.split import TEST_IDS
from sparse_robust.errors import FileError

DIGITS_ATTRIBUTION = (
    "Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998 (doi:10.24432/C50P49), CC BY 4.0, "
    "as distributed with scikit-learn (BSD-3-Clause)"
)
FOLDER = "embedded"
# Values of the digits count ink in 4x4 blocks, 0..16.
DIGITS_TOP = 16


def fashion_mnist_source() -> Source:
    """6,000 training images of Fashion-MNIST (600 of them validate) and 1,000 test images; ids of the full set."""
    return _fashion("fashion-mnist-source", validation=600)


def fashion_mnist_target() -> Source:
    """2,000 other training images of Fashion-MNIST (200 of them validate) and 1,000 other test images."""
    return _fashion("fashion-mnist-target", validation=200)


def digits() -> Source:
    """1,797 real 8x8 digits: 1,200 train, 197 validate, 400 test. Values 0..16 become round(255 * v / 16)."""
    tensors = read_embedded("digits")
    table = ((torch.arange(DIGITS_TOP + 1) * 255 + DIGITS_TOP // 2) // DIGITS_TOP).to(torch.uint8)
    for part in ("train", "test"):
        tensors[f"{part}_images"] = table[tensors[f"{part}_images"].long()]
    return _source(tensors, tuple("0123456789"), validation=197, attribution=DIGITS_ATTRIBUTION, flips=False)


def read_embedded(name: str) -> dict[str, Tensor]:
    """Read one embedded file: ``{train,test}_{images,labels,ids}``, checked against its SHA-256.

    Raises:
        FileError: if it is missing or not the file that was released.
    """
    folder = resources.files("sparse_robust.data") / FOLDER
    file = f"{name}.safetensors.xz"
    try:
        content = (folder / file).read_bytes()
        sums = (folder / "SHA256SUMS").read_text(encoding="ascii")
    except OSError as error:
        raise FileError(f"the package's data file {file} is missing ({error}): install the package again.") from error
    expected = {line.split()[1]: line.split()[0] for line in sums.splitlines()}.get(file)
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise FileError(
            f"the package's data file {file} is damaged: SHA-256 {got}, expected {expected}. Install the package again."
        )
    return load(lzma.decompress(content))


def _fashion(name: str, validation: int) -> Source:
    return _source(
        read_embedded(name), fashion.CLASSES, validation=validation, attribution=fashion.ATTRIBUTION, flips=True
    )


def _source(
    tensors: dict[str, Tensor], classes: tuple[str, ...], *, validation: int, attribution: str, flips: bool
) -> Source:
    """The images back in the order of the original files."""
    splits = {}
    for part, offset in (("train", 0), ("test", TEST_IDS)):
        ids = tensors[f"{part}_ids"].to(torch.int64)
        order = ids.argsort()
        images, labels = tensors[f"{part}_images"][order], tensors[f"{part}_labels"][order]
        splits[part] = memory_split(images, labels, first_id=ids[order] + offset)
    return Source(classes, splits["train"], splits["test"], held_out=validation, attribution=attribution, flips=flips)

"""Fashion-MNIST, all 70,000 images, from the files as they are published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sparse_robust.data.idx import read_idx
from sparse_robust.errors import FileError

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
ATTRIBUTION = "Fashion-MNIST, Xiao, Rasul, Vollgraf 2017 (arXiv:1708.07747), MIT licence, Copyright 2017 Zalando SE"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_COMMAND = "apt-get update && apt-get install -y dataset-fashion-mnist"
SHAPES = {"train": (60_000, 28, 28), "t10k": (10_000, 28, 28)}


def find_fashion_mnist(folders: Sequence[Path]) -> Path | None:
    """Return the first folder that holds the four files, itself or in a subfolder of a usual layout."""
    for folder in folders:
        for candidate in (folder, folder / "fashion-mnist", folder / "FashionMNIST" / "raw", folder / "raw"):
            if all(_file(candidate, part, kind) for part in SHAPES for kind in ("images-idx3", "labels-idx1")):
                return candidate
    return None


def read_fashion_mnist(folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Read the four IDX files of ``folder``, gzipped or not.

    Returns:
        (images, labels) of the 60,000 training and the 10,000 test images: uint8 [N,28,28] and uint8 [N].

    Raises:
        FileError: if a file is missing, damaged, or of another size than Fashion-MNIST.
    """
    train, test = (_read_part(folder, part) for part in SHAPES)
    return train, test


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    read = []
    for kind, shape in (("images-idx3", SHAPES[part]), ("labels-idx1", SHAPES[part][:1])):
        path = _file(folder, part, kind)
        if path is None:
            raise FileError(f"{folder} has no {part}-{kind}-ubyte.gz. Get the four files: {DEBIAN_COMMAND}")
        values = read_idx(path)
        if tuple(values.shape) != shape:
            raise FileError(f"{path} should hold {shape} values of Fashion-MNIST and holds {tuple(values.shape)}.")
        read.append(values)
    return read[0], read[1]


def _file(folder: Path, part: str, kind: str) -> Path | None:
    names = (f"{part}-{kind}-ubyte.gz", f"{part}-{kind}-ubyte")
    return next((folder / name for name in names if (folder / name).is_file()), None)

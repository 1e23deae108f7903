"""The one way to a data set: `load_data` of a `DataSpec`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparse_robust._env import DATA_VARIABLE, data_root
from sparse_robust.data import embedded, fashion
from sparse_robust.data.data import Data, assemble
from sparse_robust.data.folder import folder_source
from sparse_robust.data.hub import hub_source
from sparse_robust.data.source import Source, memory_split
from sparse_robust.data.spec import DataSpec
from sparse_robust.data.split import TEST_IDS, VALIDATION_IDS, MemorySplit
from sparse_robust.data.statistics import REFERENCE
from sparse_robust.data.torchvision_sets import SETS, torchvision_source
from sparse_robust.errors import FileError, UsageError, unknown

Images = tuple[Tensor, Tensor]


def load_data(spec: DataSpec | str) -> Data:
    """Load a data set.

    Args:
        spec: what to load, or only its name.

    Raises:
        UsageError: for an unknown name (the nearest ones and all are listed) or a choice that cannot be met.
        FileError: if files are missing; the message says where they were looked for and how to get them.
    """
    spec = DataSpec(spec) if isinstance(spec, str) else spec
    return assemble(_read(spec), spec)


def check_data_name(spec: DataSpec) -> None:
    """Check that `load_data` knows the name, without looking for files.

    Raises:
        UsageError: for an unknown name, or a set that is not streamed.
    """
    prefix, _, rest = spec.name.partition(":")
    if spec.streaming and prefix != "hf":
        raise UsageError(f"only hf: data sets are streamed, got {spec.name!r}: leave streaming off.")
    if spec.name in _NAMED:
        return
    if prefix not in _PREFIXED or not rest:
        raise unknown("data set", spec.name, data_sources())
    if prefix == "torchvision" and rest not in SETS:
        raise unknown("torchvision data set", rest, SETS)


def data_sources() -> dict[str, str]:
    """Return every name that `load_data` knows, with a line about each."""
    sources = {name: description for name, (description, _) in _NAMED.items()}
    sources |= {f"torchvision:{name}": f"{entry.publisher}, through torchvision" for name, entry in SETS.items()}
    return sources | {
        "hf:NAME": "a set of the Hugging Face Hub, or a folder in one of its formats",
        "folder:PATH": "pictures in folders, one folder a class, with train, val and test folders or without",
    }


def data_from_tensors(
    name: str,
    train: Images,
    test: Images | None = None,
    validation: Images | None = None,
    *,
    classes: Sequence[str] | None = None,
    spec: DataSpec | None = None,
    flips: bool = True,
) -> Data:
    """Make a data set of images in memory.

    Args:
        name: how results call it.
        train: uint8 [N,C,H,W] or [N,H,W] and int64 [N].
        test, validation: the same; what is missing is held out of the training images.
        classes: their names; by default the numbers.
        spec: fraction, size, statistics and so on, as for `load_data`.
        flips: mirroring an image keeps its class.

    Raises:
        UsageError: if images are not uint8, numbers of images and labels differ, or as `load_data`.
    """
    names = tuple(classes) if classes is not None else tuple(str(c) for c in range(int(train[1].max()) + 1))
    source = Source(
        names,
        _from_tensors(name, train, 0),
        None if test is None else _from_tensors(name, test, TEST_IDS),
        None if validation is None else _from_tensors(name, validation, VALIDATION_IDS),
        flips=flips,
    )
    return assemble(source, spec or DataSpec(name))


def fashion_mnist(spec: DataSpec) -> Source:
    """Fashion-MNIST, all 60,000 training images (the last 5,000 validate) and 10,000 test images."""
    folders = [Path(spec.root).expanduser()] if spec.root else [fashion.DEBIAN_FOLDER, data_root()]
    folder = fashion.find_fashion_mnist(folders)
    if folder is None and not spec.download:
        raise FileError(
            f"fashion-mnist was looked for in {' and '.join(map(str, folders))}. Get it with "
            f"`{fashion.DEBIAN_COMMAND}`, or name its folder with root or the environment variable {DATA_VARIABLE}, or "
            "fetch it with download: true. Without any of these, fashion-mnist-source has 6,000 of its images."
        )
    if folder is None:
        torchvision_source("FashionMNIST", spec)  # fetches the same four files
        folder = fashion.find_fashion_mnist(folders)
        if folder is None:
            raise FileError(f"fashion-mnist was fetched and is not in {' or '.join(map(str, folders))}.")
    (images, labels), (test_images, test_labels) = fashion.read_fashion_mnist(folder)
    return Source(
        fashion.CLASSES,
        memory_split(images, labels),
        memory_split(test_images, test_labels, first_id=TEST_IDS),
        held_out=5000,
        last=True,
        attribution=fashion.ATTRIBUTION,
        reference=REFERENCE["FashionMNIST"],
    )


_NAMED: dict[str, tuple[str, Callable[[DataSpec], Source]]] = {
    "digits": ("1,797 handwritten digits, 8x8 grey, in the package", lambda spec: embedded.digits()),
    "fashion-mnist": ("all 70,000 images, 28x28 grey", fashion_mnist),
    "fashion-mnist-source": ("6,000 + 1,000 of them, in the package", lambda spec: embedded.fashion_mnist_source()),
    "fashion-mnist-target": ("2,000 + 1,000 others, in the package", lambda spec: embedded.fashion_mnist_target()),
}
_PREFIXED: dict[str, Callable[[str, DataSpec], Source]] = {
    "folder": lambda path, spec: folder_source(path),
    "hf": hub_source,
    "torchvision": torchvision_source,
}


def _from_tensors(name: str, images: Images, first_id: int) -> MemorySplit:
    pixels, labels = images
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or len(pixels) != len(labels):
        raise UsageError(
            f"{name}: expected uint8 images [N,H,W] or [N,C,H,W] and N labels, got {pixels.dtype} "
            f"{tuple(pixels.shape)} and {len(labels)} labels."
        )
    return memory_split(pixels, labels, first_id=first_id)


def _read(spec: DataSpec) -> Source:
    check_data_name(spec)
    if spec.name in _NAMED:
        return _NAMED[spec.name][1](spec)
    prefix, _, rest = spec.name.partition(":")
    return _PREFIXED[prefix](rest, spec)

"""The image classification sets that torchvision knows, by its names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_robust._env import DATA_VARIABLE, data_root
from sparse_robust.data.folder import channels_of
from sparse_robust.data.source import Source, memory_split, reader_split
from sparse_robust.data.spec import DataSpec
from sparse_robust.data.split import TEST_IDS, VALIDATION_IDS, Split
from sparse_robust.data.statistics import REFERENCE
from sparse_robust.errors import FileError, UsageError, unknown

TRAIN: Mapping[str, Any] = {"train": True}
TEST: Mapping[str, Any] = {"train": False}


def _split_named(name: str) -> Mapping[str, Any]:
    return {"split": name}


@dataclass(frozen=True)
class Entry:
    """How torchvision spells the splits of one set, and which images validate.

    Attributes:
        train, test, validation: arguments of its class; None where it has no such split.
        held_out: training images that validate when it has no validation split, the last ones of the file, or a
            share of each class.
        flips: mirroring an image keeps its class.
        publisher: authors and year.
        common: further arguments of its class.
    """

    publisher: str
    train: Mapping[str, Any] = field(default_factory=lambda: TRAIN)
    test: Mapping[str, Any] | None = field(default_factory=lambda: TEST)
    validation: Mapping[str, Any] | None = None
    held_out: int | float = 0.1
    flips: bool = True
    common: Mapping[str, Any] = field(default_factory=dict)


_TRAIN, _VAL, _TEST = _split_named("train"), _split_named("val"), _split_named("test")

# CIFAR and SVHN: the last 5,000 training images validate, as in the release of Double-Win-LTH (VITA-Group).
SETS: dict[str, Entry] = {
    "CIFAR10": Entry("Krizhevsky 2009", held_out=5000),
    "CIFAR100": Entry("Krizhevsky 2009", held_out=5000),
    "DTD": Entry("Cimpoi et al. 2014", _TRAIN, _TEST, _VAL),
    "EuroSAT": Entry("Helber et al. 2019", {}, None),
    "FGVCAircraft": Entry("Maji et al. 2013", _TRAIN, _TEST, _VAL),
    "FashionMNIST": Entry("Xiao, Rasul, Vollgraf 2017"),
    "Flowers102": Entry("Nilsback, Zisserman 2008", _TRAIN, _TEST, _VAL),
    "Food101": Entry("Bossard et al. 2014", _TRAIN, _TEST),
    "GTSRB": Entry("Stallkamp et al. 2012", _TRAIN, _TEST, flips=False),
    "ImageNet": Entry("Russakovsky et al. 2015", _TRAIN, None, _VAL),
    "KMNIST": Entry("Clanuwat et al. 2018", flips=False),
    "MNIST": Entry("LeCun et al. 1998", flips=False),
    "OxfordIIITPet": Entry("Parkhi et al. 2012", _split_named("trainval"), _TEST),
    "STL10": Entry("Coates, Ng, Lee 2011", _TRAIN, _TEST),
    "SVHN": Entry("Netzer et al. 2011", _TRAIN, _TEST, held_out=5000, flips=False),
    "USPS": Entry("Hull 1994", flips=False),
}


@dataclass(frozen=True)
class _Reader:
    """Reads pictures through a torchvision data set; goes to worker processes."""

    dataset: Any
    name: str

    def __call__(self, position: int) -> Any:
        return self.dataset[position][0]

    def describe(self, position: int) -> str:
        return f"{self.name} image {position}"


def torchvision_source(name: str, spec: DataSpec) -> Source:
    """Read a set of torchvision from ``spec.root`` or the data folder.

    Raises:
        UsageError: for a name that is not in `SETS`.
        FileError: if the files are not there and ``spec.download`` is off, or cannot be fetched.
    """
    if name not in SETS:
        raise unknown("torchvision data set", name, SETS)
    entry = SETS[name]
    root = Path(spec.root).expanduser() if spec.root else data_root()
    train = _open(name, entry, entry.train, root, spec.download)
    others = {"test": (entry.test, TEST_IDS), "validation": (entry.validation, VALIDATION_IDS)}
    opened = {
        role: None if how is None else _split(name, role, _open(name, entry, how, root, spec.download), first_id)
        for role, (how, first_id) in others.items()
    }
    return Source(
        classes=_classes(train),
        train=_split(name, "train", train, 0),
        test=opened["test"],
        validation=opened["validation"],
        held_out=entry.held_out,
        last=isinstance(entry.held_out, int),
        attribution=f"{name}, {entry.publisher}, through torchvision",
        reference=REFERENCE.get(name),
        flips=entry.flips,
    )


def _open(name: str, entry: Entry, how: Mapping[str, Any], root: Path, download: bool) -> Any:
    from torchvision import datasets

    # ImageNet has no download argument: its archives are fetched by hand.
    fetch = {"download": True} if download and name != "ImageNet" else {}
    make: Callable[..., Any] = getattr(datasets, name)
    try:
        if fetch:
            root.mkdir(parents=True, exist_ok=True)
        return make(root=str(root), **entry.common, **how, **fetch)
    except ImportError as error:
        raise UsageError(f"torchvision:{name} needs {error.name}: pip install {error.name}") from error
    except (RuntimeError, OSError) as error:
        advice = "Check the connection." if fetch else "Fetch it with download: true in the data section"
        advice = "Put its archives there" if name == "ImageNet" else advice
        raise FileError(
            f"torchvision:{name} was looked for in {root} and not found whole ({error}). {advice}, or name its folder "
            f"with root or the environment variable {DATA_VARIABLE}."
        ) from error


def _split(name: str, role: str, dataset: Any, first_id: int) -> Split:
    labels = _labels(dataset)
    pixels = getattr(dataset, "data", None)
    if isinstance(pixels, np.ndarray | Tensor):
        return memory_split(_channels_first(torch.as_tensor(pixels)), labels, first_id=first_id)
    reader = _Reader(dataset, f"torchvision:{name} {role}")
    return reader_split(reader, labels, reader.describe, channels=channels_of(reader(0)), first_id=first_id)


def _channels_first(pixels: Tensor) -> Tensor:
    """[N,H,W,3] to [N,3,H,W]; other layouts are right already."""
    return pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 and pixels.shape[-1] == 3 else pixels


def _labels(dataset: Any) -> list[int]:
    """The labels of a torchvision set, wherever it keeps them."""
    for attribute in ("targets", "labels", "_labels"):
        found = getattr(dataset, attribute, None)
        if found is not None:
            return [int(label) for label in found]
    return [int(label) for _, label in getattr(dataset, "samples", None) or dataset._samples]


def _classes(dataset: Any) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if names is None:
        return tuple(str(label) for label in range(max(_labels(dataset)) + 1))
    # ImageNet has several names for a class; MNIST's read "7 - seven".
    plain = [name[0] if isinstance(name, tuple) else str(name) for name in names]
    return tuple(re.sub(r"^(\d) - \w+$", r"\1", name) for name in plain)

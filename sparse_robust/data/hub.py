"""Image data sets of the Hugging Face Hub, or in its formats on this machine, through `datasets`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_robust.data.folder import channels_of
from sparse_robust.data.source import LARGE_CROP, LARGE_SIZE, Source, reader_split
from sparse_robust.data.spec import DataSpec
from sparse_robust.data.split import TEST_IDS, VALIDATION_IDS, Split, StreamSplit, View
from sparse_robust.errors import FileError, UsageError

ROLES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
IMAGE_NAMES = ("image", "img", "images", "picture", "pixel_values")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category")
FIRST_IDS = {"train": 0, "validation": VALIDATION_IDS, "test": TEST_IDS}
# What the test labels of a competition read when they are kept back.
HIDDEN = -1

_log = logging.getLogger(__name__)


def hub_source(name: str, spec: DataSpec) -> Source:
    """Read a data set by its name on the Hub, or from a folder: saved by ``save_to_disk``, parquet, or pictures.

    Columns are taken by their types (one image column, one class label), else by usual names, else from
    ``spec.image_column`` and ``spec.label_column``. Images are decoded when they are used. With ``spec.streaming``
    nothing is stored: the images come past in file order.

    Raises:
        FileError: if there is no such folder and the Hub cannot be reached, or does not have it.
        UsageError: if the columns cannot be told, or the set has several configurations and none is chosen.
    """
    splits = _roles(name, _load(name, spec))
    image, label = _columns(name, splits["train"].features, spec)
    splits = {role: _plain(split, image, label) for role, split in splits.items()}
    if spec.streaming:
        return _streamed(name, splits, image, label, spec)
    labels = {role: list(split[label]) for role, split in splits.items()}
    classes, encode = _encoding(splits["train"].features[label], labels["train"])
    found: dict[str, Split] = {}
    for role, split in splits.items():
        if role != "train" and set(labels[role]) == {HIDDEN}:
            continue
        reader = _Rows(split, image, f"hf:{name} {role}")
        coded = [encode.get(value, HIDDEN) for value in labels[role]]
        channels = channels_of(reader(0)) if len(coded) else 3
        found[role] = reader_split(reader, coded, reader.describe, channels=channels, first_id=FIRST_IDS[role])
    return _source(name, classes, found, splits["train"])


@dataclass(frozen=True)
class _Rows:
    """Reader of the images of a table; goes to worker processes."""

    table: Any
    column: str
    name: str

    def __call__(self, position: int) -> Any:
        return _decoded(self.table[position][self.column])

    def describe(self, position: int) -> str:
        return f"{self.name} row {position}"


@dataclass(frozen=True)
class _Passing:
    """Opens a stream of images in file order."""

    stream: Any
    image: str
    label: str
    encode: dict[Any, int]
    name: str

    def __call__(self, skip: int) -> Iterator[tuple[int, Callable[[], Any]]]:
        for index, row in enumerate(self.stream.skip(skip) if skip else self.stream, start=skip):
            target = self.encode.get(row[self.label])
            if target is None:
                raise UsageError(
                    f"{self.name} image {index} has the label {row[self.label]!r}, which is out of range: expected one "
                    f"of {len(self.encode)} classes."
                )
            yield target, partial(_decoded, row[self.image])


def _streamed(name: str, splits: dict[str, Any], image: str, label: str, spec: DataSpec) -> Source:
    feature = splits["train"].features[label]
    classes: tuple[str, ...] | None = tuple(feature.names) if hasattr(feature, "names") else None
    encode: dict[Any, int] = {index: index for index in range(len(classes or ()))}
    found: dict[str, Split] = {}
    for role, stream in splits.items():
        shown, known = f"hf:{name} {role}", None
        announced = (stream.info.splits or {}).get(stream.split) if stream.info is not None else None
        count = announced.num_examples if announced is not None else 0
        if not count or classes is None:
            _log.info("%s announces no size or no classes: reading its labels once", shown)
            values = [row[label] for row in stream.select_columns([label])]
            if classes is None:
                classes, encode = _encoding(feature, values)
            count, known = len(values), torch.tensor([encode.get(value, HIDDEN) for value in values])
        opened = _Passing(stream, image, label, encode, shown)
        view = View((LARGE_SIZE, LARGE_SIZE), LARGE_CROP, 3)
        ids = torch.arange(count) + FIRST_IDS[role]
        found[role] = StreamSplit(opened, ids, view, shown, spec.shuffle_buffer, known)
    return _source(name, classes or (), found, splits["train"])


def _source(name: str, classes: tuple[str, ...], found: dict[str, Split], table: Any) -> Source:
    licence = (table.info.license if table.info is not None else None) or "licence not stated"
    return Source(
        classes, found["train"], found.get("test"), found.get("validation"), attribution=f"hf:{name}, {licence}"
    )


def _load(name: str, spec: DataSpec) -> Any:
    """A dictionary of splits, or a single split."""
    import datasets

    folder = Path(name).expanduser()
    try:
        if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
            stored = datasets.load_from_disk(str(folder))
            if not spec.streaming:
                return stored
            if isinstance(stored, dict):
                return {role: split.to_iterable_dataset() for role, split in stored.items()}
            return stored.to_iterable_dataset()
        where = str(folder) if folder.exists() else name
        return datasets.load_dataset(where, spec.config, streaming=spec.streaming, cache_dir=spec.root)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileError(
            f"hf:{name}: no folder {folder.absolute()}, and the Hub does not give it ({error}). Check the name and the "
            "connection, or fetch it where there is one with "
            f"`hf download --repo-type dataset {name} --local-dir FOLDER` and use hf:FOLDER."
        ) from error
    except ValueError as error:
        raise UsageError(f"hf:{name} cannot be read: {error} (a configuration is chosen with data config).") from error


def _roles(name: str, loaded: Any) -> dict[str, Any]:
    """Splits by their role; a data set of one split is training data."""
    if not isinstance(loaded, dict):
        return {"train": loaded}
    found = {role: next((loaded[n] for n in names if n in loaded), None) for role, names in ROLES.items()}
    if found["train"] is None and len(loaded) == 1:
        found["train"] = next(iter(loaded.values()))
    if found["train"] is None:
        raise UsageError(f"hf:{name} has no train split, only {', '.join(loaded)}.")
    return {role: split for role, split in found.items() if split is not None}


def _columns(name: str, features: Any, spec: DataSpec) -> tuple[str, str]:
    """The names of the image and the label column."""
    if features is None:
        raise UsageError(f"hf:{name} does not tell its columns when streamed: load it without streaming.")
    from datasets import ClassLabel, Image

    by_type = {kind: [c for c, f in features.items() if isinstance(f, kind)] for kind in (Image, ClassLabel)}
    image = _column(name, "image", spec.image_column, by_type[Image], IMAGE_NAMES, features)
    return image, _column(name, "label", spec.label_column, by_type[ClassLabel], LABEL_NAMES, features)


def _column(name: str, kind: str, asked: str | None, typed: Sequence[str], usual: Sequence[str], features: Any) -> str:
    shown = ", ".join(
        f"{column} ({getattr(feature, '_type', type(feature).__name__)})" for column, feature in features.items()
    )
    if asked is not None:
        if asked not in features:
            raise UsageError(f"hf:{name} has no column {asked!r}; it has {shown}.")
        return asked
    if len(typed) == 1:
        return typed[0]
    among = typed or list(features)
    named = [column for column in usual if column in among]
    if not named:
        raise UsageError(f"hf:{name}: cannot tell the {kind} column among {shown}: set data {kind}_column.")
    return named[0]


def _plain(split: Any, image: str, label: str) -> Any:
    """The two columns alone, images undecoded."""
    from datasets import Image, IterableDataset

    split = split.select_columns([image, label])
    if isinstance(split, IterableDataset):
        return split.decode(False)
    return split.cast_column(image, Image(decode=False))


def _decoded(value: Any) -> Any:
    from datasets import Image

    return Image().decode_example(value)


def _encoding(feature: Any, values: Sequence[Any]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Class names and value -> class: those of a ClassLabel, else the distinct training values in order."""
    if hasattr(feature, "names"):
        return tuple(feature.names), {index: index for index in range(len(feature.names))}
    distinct = sorted(set(values))
    return tuple(str(value) for value in distinct), {value: index for index, value in enumerate(distinct)}

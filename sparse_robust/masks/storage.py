"""The file of a mask set: packed bits in safetensors, and metadata that says everything needed to check them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparse_robust.errors import FileError
from sparse_robust.files import atomic_write, canonical_json

FORMAT = "sparse_robust.masks"
VERSION = "1"
METADATA = "sparse_robust"

Layer = tuple[str, tuple[int, ...], int]
"""Name, shape, number of kept weights."""


def describe(layers: Sequence[Layer], digest: str) -> dict[str, str]:
    """Return the metadata of a mask set; the order of the layers is the order of the tensors."""
    return {"format": FORMAT, "version": VERSION, "layers": canonical_json(layers), "digest": digest}


def parse(metadata: Mapping[str, str], source: str | Path) -> tuple[list[Layer], str]:
    """Return the layers and the digest that `describe` wrote.

    Raises:
        FileError: if it is not the metadata of a mask set, or of a version that is not known here.
    """
    if metadata.get("format") != FORMAT:
        raise FileError(f"{source} holds no masks: expected the format {FORMAT!r}, got {metadata.get('format')!r}.")
    if metadata.get("version") != VERSION:
        raise FileError(
            f"{source} has version {metadata.get('version')!r} of the mask format, and this package reads {VERSION!r}. "
            "Update sparse_robust, or make the masks again."
        )
    try:
        layers = [
            (str(name), tuple(int(size) for size in shape), int(kept))
            for name, shape, kept in json.loads(metadata["layers"])
        ]
        digest = metadata["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{source} is damaged: its list of layers cannot be read ({error!r}).") from error
    if len({name for name, _, _ in layers}) != len(layers) or any(min(shape, default=0) < 0 for _, shape, _ in layers):
        raise FileError(f"{source} is damaged: its list of layers has a name twice or a negative size.")
    return layers, digest


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, atomically. Equal tensors and metadata give equal bytes."""
    # One key, because safetensors writes several in an order that changes from process to process.
    content = save(dict(tensors), {METADATA: canonical_json(metadata)})
    atomic_write(path, lambda temporary: temporary.write_bytes(content) and None)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        FileError: if there is no such file, or it is not a whole safetensors file.
    """
    if not Path(path).is_file():
        raise FileError(f"{path} does not exist or is not a file.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            stored = (file.metadata() or {}).get(METADATA, "{}")
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is not a whole safetensors file ({error}). Copy or make it again.") from error
    try:
        metadata = json.loads(stored)
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("a value is no text")
    except (AttributeError, ValueError) as error:
        raise FileError(f"{path} is damaged: its metadata cannot be read ({error}).") from error
    return tensors, metadata

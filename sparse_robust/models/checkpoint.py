"""Model files: safetensors with the architecture inside, and weights files of others."""

from __future__ import annotations

import argparse
import pickle
import re
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from sparse_robust.errors import FileError, SparseRobustError, UsageError
from sparse_robust.files import canonical_json, parse_json, sha256_state, unpacked_limit, write_safetensors
from sparse_robust.masks import unwrap
from sparse_robust.masks.storage import METADATA as MASKS
from sparse_robust.models.build import build_model
from sparse_robust.models.normalization import get_normalization, set_normalization
from sparse_robust.models.spec import ModelSpec, attach_spec, spec_of

_FORMAT = "sparse_robust.model"
_VERSION = "1"


@dataclass(frozen=True)
class ModelFile:
    """What a model file says about its weights.

    Fields:
        spec: the architecture.
        mean, std: the normalisation inside the model, one number a channel; None where it has none.
        sha256: the digest of the weights (`sparse_robust.files.sha256_state`).
        extra: what the caller of `save_model` added.
    """

    spec: ModelSpec
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    sha256: str
    extra: dict[str, Any]


def save_model(model: nn.Module, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write the weights, the architecture, the normalisation and ``extra`` (JSON values) to one safetensors file.

    The weights are stored as they are, under timm's names, so that other programs read the file as well. The write is
    atomic.

    Raises:
        UsageError: if the model carries no spec, or ``extra`` is not made of JSON values.
        FileError: if the file cannot be written; what was there is unchanged.
    """
    # Copies, because safetensors refuses tied weights and channels-last memory.
    state = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in unwrap(model).state_dict().items()
    }
    mean, std = get_normalization(model) or (None, None)
    try:
        added = canonical_json(dict(extra or {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"extra must be made of JSON values ({error}).") from error
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "spec": canonical_json(spec_of(model).to_dict()),
        "mean": canonical_json(mean),
        "std": canonical_json(std),
        "sha256": sha256_state(state),
        "extra": added,
    }
    write_safetensors(path, state, metadata)


def load_model(path: str | Path) -> nn.Module:
    """Build the model that `save_model` wrote, on the CPU, with bit-equal weights and the same normalisation.

    Raises:
        FileError: if the file is missing, was not written by `save_model`, or is damaged (its digest is checked).
    """
    described, state = read_model_file(path), _read_safetensors(Path(path))
    if sha256_state(state) != described.sha256:
        raise FileError(f"{path} is damaged: its weights differ from the digest in it. Make or copy it again.")
    _check_size(described.spec, state, path)
    try:
        model = build_model(described.spec)
    except SparseRobustError as error:
        raise FileError(f"{path} describes a model that cannot be built here: {error}") from error
    own = model.state_dict(keep_vars=True)
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in state.items()}:
        raise FileError(f"{path} is damaged: its weights are not those of the {described.spec.name} that it describes.")
    for name, value in own.items():
        value.data = value.data.to(state[name].dtype)
    model.load_state_dict(state)
    attach_spec(model, described.spec)
    if described.mean is not None and described.std is not None:
        try:
            set_normalization(model, described.mean, described.std)
        except UsageError as error:
            raise FileError(f"{path} is damaged: {error}") from error
    return model


def _check_size(spec: ModelSpec, state: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Refuse a description of a far larger network than the weights are of, before memory is taken for it."""
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(spec.name, num_classes=spec.num_classes, in_chans=spec.in_chans, **spec.kwargs)
    except Exception:  # no such network, or one that has to be built to know its shapes: building it says which
        return
    described, stored = (sum(value.numel() for value in each.values()) for each in (model.state_dict(), state))
    if described > 2 * stored + (1 << 20):
        raise FileError(f"{path} is damaged: it describes a network of {described:,} numbers and holds {stored:,}.")


def read_model_file(path: str | Path) -> ModelFile:
    """Return what the file that `save_model` wrote says about itself, without reading the weights.

    Raises:
        FileError: if it is missing, damaged, or written by something else or by a newer version.
    """
    path = Path(path)
    _require(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} is no readable safetensors file ({error}). It is damaged or of another kind."
        ) from error
    if MASKS in metadata:
        raise FileError(f"{path} is a ticket or a file of masks, and has no weights: expected those of a network.")
    if metadata.get("format") != _FORMAT:
        raise FileError(f"{path} was not written by save_model: load it with create_model(NAME, checkpoint=...).")
    if metadata.get("version") != _VERSION:
        raise FileError(
            f"{path} has version {metadata.get('version')}, this package reads {_VERSION}: update the package."
        )
    try:
        spec = ModelSpec.from_dict(parse_json(metadata["spec"]))
        mean, std = (
            None if (v := parse_json(metadata[key])) is None else tuple(map(float, v)) for key in ("mean", "std")
        )
        return ModelFile(spec, mean, std, metadata["sha256"], dict(parse_json(metadata["extra"])))
    except (SparseRobustError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{path} has a damaged description ({type(error).__name__}: {error}).") from error


def load_state(path: str | Path, trust_pickle: bool = False) -> dict[str, Any]:
    """Read a weights file: safetensors, or what ``torch.save`` wrote. Which of the two is told by its content.

    torch files are read with ``weights_only=True``, which runs no code.

    Args:
        path: the file.
        trust_pickle: read a torch file as an ordinary pickle, which runs whatever code it holds.

    Returns:
        The dictionary in the file, on the CPU, in its order; `import_weights` finds the tensors in it.

    Raises:
        FileError: if the file is missing or damaged, holds no dictionary, or needs code while that is not allowed.
    """
    path = Path(path)
    _require(path)
    with open(path, "rb") as file:
        start = file.read(9)
    content = _read_safetensors(path) if start[8:] == b"{" else _read_torch(path, trust_pickle)
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if not isinstance(content, Mapping):
        raise FileError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors.")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return dict(load_file(path, device="cpu"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FileError(f"{path} is a damaged safetensors file ({error}).") from error


def _read_torch(path: Path, trust_pickle: bool) -> Any:
    _check_kind(path)
    try:
        # Namespace holds the plain options that training programs save. An open file, because torch goes by its name.
        with open(path, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=not trust_pickle)
    except ImportError as error:
        raise FileError(
            f"{path} needs the module {error.name!r} to be read: install it, or convert the file."
        ) from error
    except pickle.UnpicklingError as error:
        if trust_pickle:
            raise FileError(f"{path} is damaged or no weights file ({_first_line(error)}).") from error
        raise FileError(
            f"{path} cannot be read without running the code in it, which is refused ({_first_line(error)}). "
            "If you trust whoever made it, pass trust_pickle=True (--trust-pickle); otherwise have it converted to "
            "safetensors."
        ) from error
    except Exception as error:  # a damaged file makes torch's unpickler fail in every way there is
        raise FileError(f"{path} is damaged or no weights file ({_first_line(error)}).") from error


def _check_kind(path: Path) -> None:
    """Refuse what torch must not even begin to read: other kinds of files, tar archives, and archives that would fill
    the memory.

    torch would unpack a tar archive, its layout of 2016, into a folder, links and all. It stores tensors uncompressed.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    if start[:1] != b"\x80" and start != b"PK\x03\x04":
        raise FileError(f"{path} is damaged or no weights file: it is neither safetensors nor written by torch.save.")
    try:
        if tarfile.is_tarfile(path):
            raise FileError(f"{path} is a tar archive, which torch wrote before 2017: convert it with that torch.")
    except (OSError, ValueError, EOFError, zlib.error) as error:
        if isinstance(error, FileError):
            raise
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # of another kind, or damaged: torch says which
    if unpacked > unpacked_limit(path.stat().st_size):
        raise FileError(
            f"{path} would take {unpacked:.3g} bytes unpacked, and is {path.stat().st_size:.3g} itself: torch does not "
            "compress its files so. It is damaged or made to fill the memory."
        )


def _first_line(error: Exception) -> str:
    """Return what torch's explanation boils down to: the global that it refuses, or its first line."""
    text = str(error)
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {wanted[1].rstrip('.')}"
    lines = [line.strip() for line in text.partition("WeightsUnpickler error:")[2].splitlines() if line.strip()]
    lines += [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")


def _require(path: Path) -> None:
    if not path.is_file():
        raise FileError(f"{path} does not exist or is no file: expected a weights file.")

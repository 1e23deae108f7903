"""Files that are either whole or absent, and digests that name their content."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparse_robust.errors import FileError


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no spaces. Equal values have equal texts."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text that may come from anywhere.

    Raises:
        ValueError: if it is not JSON, nests too deep, or holds NaN or an infinity (1e999 is one), which are no JSON.
    """

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"it holds {number}, which is no JSON value")
        return value

    try:
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def unpacked_limit(size: int) -> int:
    """Return how many bytes a compressed file of ``size`` bytes may unpack to: 256 MiB, or 64 times its own size.

    Masks above 256 MiB (two billion weights) are far from 64 times as large as their file, unless nothing is pruned.
    """
    return max(1 << 28, 64 * size)


def atomic_write(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to disk and rename it into place.

    A reader sees the old file or the new one, never a part of either; so it is when several processes write at once.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode)  # safetensors leaves its files to their owner alone
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        kept = " The file that was there is unchanged." if _is_there(path) else ""
        raise FileError(f"cannot write {path}: {reason}.{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous tensors and texts as a safetensors file, atomically.

    Equal content gives equal bytes; safetensors alone writes texts in an order that changes from process to process.
    """

    def write(temporary: Path) -> None:
        save_file(dict(tensors), temporary, dict(metadata))
        with open(temporary, "rb+") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            if len(text) > size:  # its own writer spells JSON as tersely
                raise SafetensorError(f"its header takes {len(text)} bytes, and {size} were written")
            file.seek(8)
            file.write(text.ljust(size))

    atomic_write(path, write)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    atomic_write(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileError: if the file is missing or is not JSON; the message names the file and the place.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist.") from error
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:  # no JSON, or no UTF-8
        raise FileError(
            f"{path} is not readable JSON ({error}). It was probably edited or damaged: delete it to have it made "
            f"again."
        ) from error


def commit_folder(temporary: str | Path, path: str | Path) -> None:
    """Flush every file of ``temporary`` and put it in place of the folder ``path``.

    A crash between the two renames leaves the old folder under its retired name; `recover_folder` settles that.
    """
    temporary, path = Path(temporary), Path(path)
    retired = path.with_name(path.name + ".old")
    try:
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            else:
                _sync_folder(file)
        _sync_folder(temporary)
        shutil.rmtree(retired, ignore_errors=True)
        if path.exists():
            path.rename(retired)
        temporary.rename(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}.") from error
    _sync_folder(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def recover_folder(path: str | Path) -> bool:
    """Undo a replacement that was cut off by a crash. Returns whether ``path`` exists afterwards."""
    path = Path(path)
    retired = path.with_name(path.name + ".old")
    if not path.exists() and retired.exists():
        retired.rename(path)
    shutil.rmtree(path.with_name(path.name + ".new"), ignore_errors=True)
    return path.exists()


def ensure_writable(folder: str | Path, need_bytes: int = 0) -> None:
    """Check, before any work is done, that ``folder`` takes files and that ``need_bytes`` are free there.

    Raises:
        FileError: naming the folder and what stands in the way.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
    except OSError as error:
        raise FileError(
            f"cannot write into {folder}: {error.strerror or error}. Choose another folder with --out, or make "
            f"room in this one."
        ) from error
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise FileError(
            f"{folder} has {free / 1e6:.0f} MB free and this run needs about {need_bytes / 1e6:.0f} MB. Make "
            f"room, or choose another folder with --out."
        )


def sha256_file(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_state(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a state dict: names, dtypes, shapes and bytes, in name order.

    It does not depend on the device, the memory format or the order of the entries.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

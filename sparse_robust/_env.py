"""The environment variables this package reads, all of them, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

DATA_VARIABLE = "SPARSE_ROBUST_DATA"


def data_root() -> Path:
    """Return the folder where data sets are looked for and downloaded to when none is given.

    ``SPARSE_ROBUST_DATA`` if it is set, else ``~/.cache/sparse-robust/data``.
    """
    return Path(os.environ.get(DATA_VARIABLE) or Path.home() / ".cache" / "sparse-robust" / "data").expanduser()


def visible_gpus() -> list[str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, by number or identifier; empty where it is not set."""
    return [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def child_environment(changes: Mapping[str, str], defaults: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a process that is started: this one's with ``changes``, and ``defaults`` where it says
    nothing."""
    return {**(defaults or {}), **os.environ, **changes}


def set_cublas_workspace() -> None:
    """Set ``CUBLAS_WORKSPACE_CONFIG``, without which cuBLAS is not deterministic, unless it is set."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def launched_processes() -> int:
    """Return how many processes the launcher started together (WORLD_SIZE of torchrun and accelerate launch), else
    1."""
    return int(os.environ.get("WORLD_SIZE") or 1)

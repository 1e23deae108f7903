"""The environment variables this package reads, all of them, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

DATA_VARIABLE = "SPARSE_ROBUST_DATA"


def data_root() -> Path:
    """Return the folder where data sets are looked for and downloaded to when none is given.

    ``SPARSE_ROBUST_DATA`` if it is set, else ``~/.cache/sparse-robust/data``.
    """
    return Path(os.environ.get(DATA_VARIABLE) or Path.home() / ".cache" / "sparse-robust" / "data").expanduser()


def launched_processes() -> int:
    """Return how many processes the launcher started together (WORLD_SIZE of torchrun and accelerate launch), else
    1."""
    return int(os.environ.get("WORLD_SIZE") or 1)

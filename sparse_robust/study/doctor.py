"""What is installed, what works on this machine, and what to do about what does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_robust.errors import SparseRobustError, UsageError

REQUIRED = (
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "safetensors",
    "datasets",
    "huggingface_hub",
    "jsonargparse",
    "rich",
    "matplotlib",
)
OPTIONAL = {
    "triton": "kernels on a GPU; comes with torch on Linux",
    "tensorboard": "--tracker tensorboard: pip install 'sparse-robust[track]'",
    "trackio": "--tracker trackio: pip install 'sparse-robust[track]'",
    "wandb": "--tracker wandb: pip install 'sparse-robust[track]'",
    "deepspeed": "ZeRO: pip install 'sparse-robust[deepspeed]'",
    "submitit": "study submit --engine slurm: pip install 'sparse-robust[slurm]'",
    "ray": "study submit --engine ray: pip install 'sparse-robust[ray]'",
}
GOOD, MISSING, BAD = "[green]ok[/green]", "[yellow]absent[/yellow]", "[red]fails[/red]"


def examine(console: Console | None = None) -> int:
    """Print a table of checks; return 1 if something that is needed fails, else 0."""
    console = console or Console()
    table = Table("what", "state", "detail", title="sparse-robust doctor")
    failures = 0
    for name, state, detail in _checks():
        table.add_row(name, state, escape(detail))
        failures += state == BAD
    console.print(table)
    return 1 if failures else 0


def require_tracker(name: str) -> None:
    """Check that Accelerate can send numbers to a tracker: one that it cannot find it leaves out.

    Raises:
        UsageError: with the command that installs it.
    """
    from accelerate.tracking import get_available_trackers

    if name not in map(str, get_available_trackers()):
        command = OPTIONAL[name].partition(": ")[2]
        raise UsageError(f"--tracker {name}: {name} is not installed. {command}, or leave --tracker out.")


def _checks() -> Iterator[tuple[str, str, str]]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield "python", GOOD if sys.version_info >= (3, 11) else BAD, f"{python} (needs 3.11 or later)"
    for name in REQUIRED:
        version = _version(name)
        yield name, GOOD if version else BAD, version or f"needed: pip install {name.replace('_', '-')}"
    for name, use in OPTIONAL.items():
        version = _version(name)
        yield name, GOOD if version else MISSING, version or use
    sbatch = shutil.which("sbatch")
    yield "Slurm", GOOD if sbatch else MISSING, sbatch or "no sbatch here: jobs are submitted where there is one"
    yield _device()
    yield "kernels", *_kernels()
    yield "cores", GOOD, f"{os.cpu_count()} ({torch.get_num_threads()} threads used by torch)"
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    yield (
        "disk",
        GOOD if free > 1 else BAD,
        f"{free:.1f} GB free here" + ("" if free > 1 else ": make room before a study"),
    )
    yield "embedded data", *_embedded()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> tuple[str, str, str]:
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return "GPU", GOOD, f"{names}; bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
    return "GPU", MISSING, "none: everything runs on the CPU, larger studies want one"


def _kernels() -> tuple[str, str]:
    from sparse_robust_kernels import backends, operations

    device = "cuda" if torch.cuda.is_available() else "cpu"
    alike: dict[tuple[str, ...], dict[str, None]] = {}  # folders of operations, by the backends that run here
    for op in operations():
        alike.setdefault(backends(op, device), {})[op.partition(".")[0]] = None
    found = "; ".join(f"{', '.join(folders)}: {', '.join(names)}" for names, folders in alike.items())
    state = GOOD if device == "cpu" or any("triton" in names for names in alike) else BAD
    return state, f"{found} (on {device}, the automatic choice first)"


def _embedded() -> tuple[str, str]:
    from sparse_robust.data import DataSpec, load_data

    try:
        sizes = {
            name: len(load_data(DataSpec(name=name)).train)
            for name in ("fashion-mnist-source", "fashion-mnist-target", "digits")
        }
    except SparseRobustError as error:
        return BAD, str(error)
    return GOOD, ", ".join(f"{name} {size}" for name, size in sizes.items())

"""What a figure was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_robust._version import __version__


@dataclass(frozen=True)
class Machine:
    """The hardware and the versions behind a figure. What is absent is an empty text."""

    cpu: str
    cores: int
    threads: int
    """Threads that torch uses for one operation."""
    gpu: str
    system: str
    python: str
    torch: str
    triton: str
    timm: str
    version: str
    """Of this package."""
    commit: str
    """Of this package's repository, with a "+" behind it if tracked files differ from it."""


def machine(device: torch.device | str = "cpu") -> Machine:
    """Describe this machine, and the GPU that ``device`` names."""
    kind = torch.device(device)
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name(kind) if kind.type == "cuda" else "",
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        timm=_version("timm"),
        version=__version__,
        commit=_commit(Path(__file__).parent),
    )


def machine_line(found: Machine) -> str:
    """Return the one line that stands above a table of figures."""
    where = f"{found.cpu}, {found.cores} cores ({found.threads} threads)" + (f", {found.gpu}" if found.gpu else "")
    versions = f"torch {found.torch}" + (f", triton {found.triton}" if found.triton else "")
    return f"{where}; {versions}; sparse-robust {found.version} {found.commit}".rstrip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit(folder: Path) -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--", Path(__file__).name):
            return ""  # installed into some other project's repository
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return ""

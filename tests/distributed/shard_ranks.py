"""Runs named checks on several CPU processes in one launch, and keeps what each process found.

A script of checks begins with ``check = Checks()``, marks functions with ``@check`` and ends with ``check.run()``. A
test module calls `launch` once and then asks for the outcome of each check.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[2]


def launch(script: str, ranks: int, folder: Path, *words: str, **environment: str) -> dict[str, list[str]]:
    """Run a script beside this file on ``ranks`` processes; return what every process says about each check."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).with_name(script)), str(folder), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    files = sorted(folder.glob("rank*.json"))
    assert len(files) == ranks, f"{len(files)} of {ranks} processes came to an end\n{done.stderr[-4000:]}"
    found = [json.loads(file.read_text()) for file in files]
    return {name: [mine.get(name, "not run") for mine in found] for name in found[0]}


class Checks:
    """The checks of a script, in the order in which they are written."""

    def __init__(self) -> None:
        self.functions: dict[str, Callable[[], None]] = {}

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.functions[function.__name__] = function
        return function

    def run(self) -> None:
        torch.set_num_threads(1)
        # A check that fails on one process alone leaves the others waiting; then all of them fail, and soon.
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        found = {}
        for name, function in self.functions.items():
            torch.manual_seed(0)
            try:
                function()
                found[name] = "ok"
            except Exception:
                found[name] = traceback.format_exc()
        Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.destroy_process_group()


def names(script: str) -> list[str]:
    """Return the names of the checks in a script, without running or importing it."""
    lines = Path(__file__).with_name(script).read_text().splitlines()
    return [b.split("(")[0].removeprefix("def ") for a, b in zip(lines, lines[1:], strict=False) if a == "@check"]


class Traffic(TorchDispatchMode):
    """Counts the bytes that this process hands to collectives, by the collective's name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            name = func.overloadpacket.__name__
            self.bytes[name] = self.bytes.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def same_everywhere(value: object) -> bool:
    """Whether every process has this value."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == value for other in values)

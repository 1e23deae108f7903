"""What a GPU launches can be compiled where there is none, and no kernel takes an argument that a launch refuses."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

import triton
from triton.backends.nvidia.compiler import CUDAOptions

import sparse_robust_kernels

ROOT = Path(__file__).resolve().parents[2]


def kernels() -> Iterator[triton.JITFunction]:
    for found in pkgutil.walk_packages(sparse_robust_kernels.__path__, "sparse_robust_kernels."):
        if found.name.rpartition(".")[2].startswith("triton"):
            module = vars(import_module(found.name))
            yield from (each for each in module.values() if isinstance(each, triton.JITFunction))


def test_no_kernel_has_an_argument_of_the_launch_itself() -> None:
    """Interpreted, and compiled by itself, such a kernel works; each of its launches on a GPU would be refused."""
    own = {"grid", "warmup", "stream", "device", "device_type", *(field.name for field in fields(CUDAOptions))}
    names = {kernel.__name__: set(kernel.arg_names) for kernel in kernels()}
    assert len(names) >= 15
    assert not {name: taken & own for name, taken in names.items() if taken & own}


@pytest.mark.sm90
@pytest.mark.slow
def test_launches_are_compiled_as_a_gpu_would_have_them(tmp_path: Path) -> None:
    words = ["--quick", "--only", "check_mixed_layouts", "--cache", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "tests.kernels.rehearsal", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    unaligned, aligned = (f"numel:i32{multiple}, step_size:fp32" for multiple in ("", "/16"))
    assert unaligned in done.stdout and aligned not in done.stdout, "2 x 3 x 5 x 7 images"
    assert "STEP=True, BLOCK=1024, warps=4, unfused)  [check_mixed_layouts]" in done.stdout
    assert re.search(r"^triton \S+: \d+ specialisations in \d+ launches, compiled in \d+ s$", done.stdout, re.M)
    assert list(tmp_path.rglob("linf_kernel.cubin")), "for a machine that is given this folder"


BROKEN = """
import sys, torch, triton, triton.language as tl
from tests.kernels import rehearsal

@triton.jit
def adds_a_float_to_an_address(x, by):
    tl.store(x + by, 1.0)

rehearsal.tests = lambda: iter([("one", lambda: adds_a_float_to_an_address[(1,)](torch.ones(4), 0.5)),
                                ("two", lambda: 1 / 0)])
rehearsal.attacks = lambda: iter(())
rehearsal.benchmarks = lambda *_: iter(())
sys.exit(rehearsal.main())
"""


@pytest.mark.sm90
def test_what_does_not_compile_is_named_and_the_status_is_1(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, tmp_path / "broken.py"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert re.search(r"1 do not compile, or spill:\n .*CompilationError.*adds_a_float_to_an_address\(x:", done.stdout)
    assert "1 did not run to its end:\n  two: ZeroDivisionError" in done.stdout

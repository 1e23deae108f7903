"""The harness itself, on a kernel that adds one."""

from __future__ import annotations

import os

import pytest
import torch

from tests.kernels.harness import compile_sm90, interpret, interpreted

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language


@triton.jit
def add_one(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)


@interpret
@pytest.mark.parametrize("n", [1, 7, 1025])
def test_a_kernel_runs_in_the_interpreter(n: int) -> None:
    x = torch.rand(n)
    out = torch.empty(n + 1)
    add_one[(-(-n // 1024),)](x, out, n, BLOCK=1024)
    assert torch.equal(out[:n], x + 1) and out[n].isnan()  # what nobody writes is poison


@pytest.mark.sm90
def test_a_kernel_compiles_without_a_gpu() -> None:
    compiled = compile_sm90(add_one, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 1024})
    assert compiled.registers <= 32 and compiled.spill_bytes == 0 and compiled.shared_bytes == 0
    assert compiled.load_widths == {128} and compiled.store_widths == {128}
    single = compile_sm90(
        add_one, {"x": "*fp32", "out": "*fp32", "n": "i32"}, {"BLOCK": 1024}, unaligned=["x", "out", "n"]
    )
    assert single.load_widths == {32}
    narrow = compile_sm90(add_one, {"x": "*i8", "out": "*i8", "n": "i32"}, {"BLOCK": 128})
    assert narrow.load_widths == {8} and "STG.E.U8" in narrow.sass


def answer(value: int) -> tuple[int, str | None]:
    return value + 1, os.environ.get("TRITON_INTERPRET")


def fail() -> None:
    raise ValueError("seven is right out")


def die() -> None:
    os.abort()


@pytest.mark.interpret
def test_results_and_errors_come_back() -> None:
    before = os.environ.get("TRITON_INTERPRET")
    assert interpreted(answer, 1) == (2, "1")
    with pytest.raises(AssertionError, match="seven is right out"):
        interpreted(fail)
    with pytest.raises(AssertionError, match="ended with status -6"):
        interpreted(die)
    assert interpreted(answer, value=2) == (3, "1")
    assert os.environ.get("TRITON_INTERPRET") == before

"""The registry: what auto picks, what is refused and why, and that torch.compile sees through every choice."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_robust_kernels import _dispatch, backends, operations, resolve
from sparse_robust_kernels._dispatch import opaque, register

STEP = "pgd_step.linf_step"


def fresh(code: str) -> str:
    """What a new interpreter writes to both outputs when it runs some lines."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout + run.stderr


@pytest.fixture
def double() -> Iterator[str]:
    """An operation with all backends, whose kernel says so."""
    name = "testing.double"
    register(name, "reference", compiles=True)(lambda x: 2 * x)
    register(name, "special")(lambda x: 3 * x)
    yield name
    for table in (_dispatch._functions, _dispatch._devices):
        for key in [key for key in table if key.startswith("testing.")]:
            del table[key]
    _dispatch._choices.clear()


def test_auto_is_the_reference_on_the_cpu(double: str) -> None:
    assert resolve(double)(2) == resolve(double, "auto", "cpu")(2) == resolve(double, "reference")(2) == 4
    assert resolve(double, "special")(2) == 6
    assert backends(double) == ("reference", "compile", "special")


def test_what_cannot_be_honoured_is_refused_with_what_can(double: str) -> None:
    with pytest.raises(ValueError, match="no backend 'triton' on cpu; available there: auto, reference, compile, spec"):
        resolve(double, "triton")
    with pytest.raises(ValueError, match="no backend 'abacus' on meta"):
        resolve(double, "abacus", "meta")
    with pytest.raises(ValueError, match="no implementation of 'testing.nothing' runs on cpu.*pgd_step.linf_step"):
        operations()
        resolve("testing.nothing")


def test_devices_are_respected(double: str) -> None:
    register("testing.far", "special", devices=("xpu",))(lambda x: x)
    assert backends("testing.far", "xpu") == ("special",) and backends("testing.far", "cpu") == ()
    with pytest.raises(ValueError, match="runs on cpu"):
        resolve("testing.far", "special", "cpu")


def test_arguments_that_kernels_do_not_take(double: str, caplog: pytest.LogCaptureFixture) -> None:
    register(double, "triton", devices=("cuda",))(lambda x: 5 * x)
    assert resolve(double, "auto", "cuda")(1) == resolve(double, "triton", "cuda")(1) == 5
    with caplog.at_level(logging.INFO, logger="sparse_robust_kernels"):
        for _ in range(3):
            assert resolve(double, "auto", "cuda", unfit="odd numbers")(1) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "testing.double runs as plain torch: its kernels do not take odd numbers"
    ]
    with pytest.raises(ValueError, match="'triton' on cuda for odd numbers; available there: auto, reference"):
        resolve(double, "triton", "cuda", unfit="odd numbers")


def test_compile_is_the_reference_compiled_once(double: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Callable[..., Any]] = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    assert [resolve(double, "compile")(value) for value in (1, 2, 3)] == [2, 4, 6]
    assert len(compiled) == 1


def test_every_operation_has_a_reference() -> None:
    for op in operations():
        assert backends(op)[0] == "reference"


def test_importing_brings_neither_triton_nor_the_compiler() -> None:
    out = fresh(
        """
        import sys
        import sparse_robust_kernels
        for op in sparse_robust_kernels.operations():
            sparse_robust_kernels.resolve(op, "auto", "cpu")
        print([name for name in ("triton", "torch._dynamo") if name in sys.modules])
        """
    )
    assert out.strip() == "[]"


def test_without_triton_auto_falls_back_and_says_so_once() -> None:
    out = fresh(
        """
        import logging, sys
        logging.basicConfig(format="%(levelname)s %(message)s")
        sys.modules["triton"] = None  # what cannot be imported
        from sparse_robust_kernels import operations, resolve
        for op in operations() * 2:
            assert "reference" in resolve(op, "auto", "cuda").__module__, op
        try:
            resolve("pgd_step.linf_step", "triton", "cuda")
        except ValueError as error:
            print(error)
        """
    )
    assert out.count("WARNING triton cannot be imported, kernels run as plain torch") == 1
    assert "no backend 'triton' on cuda (import of triton halted" in out
    assert "available there: auto, reference, compile" in out


def test_a_broken_kernel_module_is_not_taken_for_a_missing_triton() -> None:
    pytest.importorskip("triton", reason="needs triton")
    out = fresh(
        """
        import sys
        import sparse_robust_kernels.pgd_step
        from sparse_robust_kernels import resolve
        sys.modules["sparse_robust_kernels.pgd_step.triton_l2"] = None
        try:
            resolve("pgd_step.linf_step", "triton", "cuda")
        except ValueError as error:
            print(error)
        """
    )
    assert "import of sparse_robust_kernels.pgd_step.triton_l2 halted" in out


def test_triton_is_the_choice_on_cuda() -> None:
    pytest.importorskip("triton", reason="needs triton")
    assert fresh(
        f"""
        import sparse_robust_kernels.pgd_step
        from sparse_robust_kernels import backends
        print(backends("{STEP}", "cuda"), backends("{STEP}", "cpu"))
        """
    ).strip() == "('triton', 'reference', 'compile') ('reference', 'compile')"  # fmt: skip


@opaque("testing.scale", fake=lambda x, other, *, by: torch.empty_like(x))
def scale(x: Tensor, other: Tensor | None, *, by: float) -> Tensor:
    """Reads the data, which nothing that is traced can do."""
    return x * by * (1 if x.numpy().sum() >= 0 else -1) + (0 if other is None else other)


@opaque("testing.fill", fake=lambda tensors, value: None, mutates=["tensors"])
def fill(tensors: list[Tensor], value: float) -> None:
    for tensor in tensors:
        tensor.numpy()[:] = value


def test_opaque_functions_are_called_as_they_are_and_traced_as_operators() -> None:
    x, other = torch.rand(3), torch.rand(3)

    def both(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        buffers = [torch.zeros(2), torch.zeros(3)]
        fill(buffers, 4.0)
        return scale(x, None, by=2.0) + scale(x, other, by=3.0), buffers[0] + buffers[1].sum()

    for compiler in ("eager", "aot_eager"):
        compiled = torch.compile(both, fullgraph=True, backend=compiler)
        torch.testing.assert_close(compiled(x, other), (5 * x + other, torch.full((2,), 16.0)))
    torch.library.opcheck(torch.ops.sparse_robust.testing_scale, (x, other), {"by": 2.0})
    torch.library.opcheck(torch.ops.sparse_robust.testing_fill, ([x.clone()], 2.0))


def test_the_choice_is_traced_without_a_break(double: str) -> None:
    def quadruple(x: Tensor, backend: str) -> Tensor:
        first: Tensor = resolve(double, backend, x.device)(x)
        second: Tensor = resolve(double, "compile", x.device)(first)
        return second

    compiled = torch.compile(quadruple, fullgraph=True, backend="eager")
    for n in (3, 5, 7):
        assert torch.equal(compiled(torch.ones(n), "auto"), torch.full((n,), 4.0))
    assert torch.equal(compiled(torch.ones(2), "special"), torch.full((2,), 6.0))

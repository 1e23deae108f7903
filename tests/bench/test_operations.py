"""What the gates of the operations refuse, and the registry under pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_robust.bench import Case, GateError, harness
from sparse_robust.bench.gates import require_close
from sparse_robust.bench.operations import kernels, mask_storage, masked_step, memory_format, robust_step
from sparse_robust.bench.operations.problem import perceptron, problem
from sparse_robust.masks import Masks

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_a_kernel_that_gives_other_bits_is_refused() -> None:
    x = torch.rand(5)
    wrong = kernels.Kernel(lambda backend: x if backend == "reference" else x.nextafter(x + 1), 20)
    with pytest.raises(GateError, match="step: 5 of 5 values of 0 differ"):
        kernels.case("step", "5", wrong, compiles=False).gate()
    close = kernels.case("step", "5", replace(wrong, exact=False), compiles=False)
    assert close.gate() == "the reference within 1e-06" and list(close.routes) == ["auto"] and close.work == 20


def test_a_layout_with_another_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: torch.nn.Module, layout: torch.memory_format) -> None:
        if layout == torch.channels_last:
            model.fc.weight.data.mul_(1.1)  # the statistics stay

    monkeypatch.setattr(memory_format, "lay_out", wrong)
    with pytest.raises(GateError, match="the gradients differ by .* of their norm, more than 1e-02"):
        memory_format.case(problem(CPU, "quick")).gate()


def test_a_rival_that_cannot_be_compiled_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    x = torch.rand(5)
    kernel = kernels.Kernel(lambda backend: x, 20, plain=lambda: 1 / 0)
    case = kernels.case("step", "5", kernel, compiles=True)
    assert list(case.routes) == ["auto", "torch.compile"]
    assert case.gate() == "the bits of the reference; torch.compile gave up: ZeroDivisionError"
    assert list(case.routes) == ["auto"]
    asked = []
    case = kernels.case("step", "5", kernels.Kernel(lambda backend: asked.append(backend) or x, 20), compiles=True)
    case.gate()
    assert asked == ["auto", "reference", "compile"], "the dispatch's own form where it has one"


def test_kernels_are_timed_many_at_once_and_recorded_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    kernel = kernels.Kernel(lambda backend: done.append(backend) or torch.ones(5), 20)
    graphs: list[Callable[[], object]] = []

    class Capture:
        def __call__(self, function: Callable[[], object]) -> tuple[Callable[[], object], None]:
            graphs.append(function)
            return lambda: done.append("replay"), None

    monkeypatch.setattr(kernels, "CudaCapture", Capture)
    case = kernels.case("step", "5", kernel, compiles=False, captures=True)
    assert case.gate() == "the bits of the reference"
    case.routes["auto"]()
    assert done == ["auto", "reference", "replay", "replay"] and len(graphs) == 1
    graphs[0]()
    assert done[4:] == ["auto"] * kernels.TIMES

    monkeypatch.setattr(harness, "time_routes", lambda routes, **_: {"a": harness.Timing(3, [8.0, 8.0], [4.0, 4.0])})
    case = Case("one", {"a": lambda: None}, lambda: "", 5, "things", times=4)
    (record,) = harness.measure(case, "nothing", CPU, now="").records
    assert (record.calls, record.median_s, record.cpu_s, record.per_second) == (12, 2.0, 1.0, 2.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_what_cannot_be_captured_is_timed_as_it_is() -> None:
    done: list[str] = []
    kernel = kernels.Kernel(lambda backend: done.append(backend) or torch.ones(5), 20)
    case = kernels.case("step", "5", kernel, compiles=False, captures=True)
    assert case.gate().startswith("the bits of the reference; no graph of auto: ")
    done.clear()
    case.routes["auto"]()
    assert done == ["auto"] * kernels.TIMES


def test_close_is_relative_to_the_largest_value() -> None:
    expected = {"w": torch.tensor([0.0, 10.0]), "none": torch.empty(0)}
    require_close("state", expected | {"w": torch.tensor([1e-4, 10.0])}, expected, 1e-5)
    for wrong in ([2e-4, 10.0], [float("nan"), 10.0]):
        with pytest.raises(GateError, match="state: w is off by .* of its largest, 10"):
            require_close("state", {"w": torch.tensor(wrong)}, expected, 1e-5)


def test_a_masked_step_that_lets_a_weight_grow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(masked_step.ROUTES, "enforce", masked_step.dense)
    with pytest.raises(GateError, match="state after three steps of enforce: .* values of .*weight differ"):
        masked_step.case(perceptron(CPU, "quick")).gate()


def test_masks_that_come_back_otherwise_are_refused() -> None:
    keep = {"a": torch.tensor([True, False])}
    mask_storage.require_read_back(Masks.from_bools(keep), keep)
    with pytest.raises(GateError, match=r"is not what was stored: \['a'\]"):
        mask_storage.require_read_back(Masks.from_bools({"a": ~keep["a"]}), keep)


def test_weak_images_and_images_outside_of_the_budget_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (setting,) = robust_step.SETTINGS["quick"]["cpu"]
    given = setting.problem(CPU)
    for what, images in (("raise the loss by 0,", lambda x: x), ("lie outside of the budget", lambda x: x + 0.2)):
        lazy = lambda *_, images=images: lambda model: lambda model, x, y: images(x)  # noqa: E731
        monkeypatch.setattr(robust_step, "on_the_model", lazy)
        with pytest.raises(GateError, match=f"on the model:? ?.*{what}|of on the model {what}"):
            robust_step.case(setting, given).gate()


@pytest.mark.slow
def test_pytest_benchmark_drives_the_registry(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    out = tmp_path / "out.json"
    options = [
        "--operation",
        "mask-storage",
        "--benchmark-only",
        f"--benchmark-json={out}",
        "--benchmark-max-time=0.01",
    ]
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    timed = json.loads(out.read_text())["benchmarks"]
    assert len(timed) == 4 and {each["extra_info"]["unit"] for each in timed} == {"weights"}
    assert all("the same masks read back" in each["extra_info"]["gate"] for each in timed)

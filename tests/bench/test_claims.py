"""Claims: bounds hold at their edge, fail beyond it, and what was not measured is said to be so."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from sparse_robust import bench
from sparse_robust.bench import CLAIMS, Claim, Figure, Record
from sparse_robust.bench.claimed import FLOPS, KERNELS, RESNET18
from sparse_robust.bench.claims import FAILS, HOLDS, NOT_MEASURED
from sparse_robust.bench.operations.robust_step import SETTINGS
from sparse_robust.errors import UsageError
from sparse_robust_kernels._dispatch import operations


def record(route: str, median: float, *, case: str = "1e8 weights", time: str = "2026-01-01", **more: object) -> Record:
    fields = {
        "time": time, "operation": "select", "case": case, "route": route, "device": "cpu", "samples": 3, "calls": 1,
        "median_s": median, "q20_s": median, "q80_s": median, "relative": 1.0, "per_second": 10 / median,
        "unit": "weights", "gate": "same", "load": 0.0, **asdict(bench.machine()),
    }  # fmt: skip
    return Record(**(fields | more))  # type: ignore[arg-type]


OURS = Figure("select", "1e8", "ours")
CLAIM = Claim("cpu", "faster than theirs", replace(OURS, route="theirs"), OURS, at_least=4.0)


@pytest.mark.parametrize(("theirs", "verdict"), [(3.99, FAILS), (4.0, HOLDS), (4.01, HOLDS)])
def test_a_lower_bound(theirs: float, verdict: str) -> None:
    records = [record("ours", 1.0), record("theirs", theirs)]
    assert CLAIM.verdict(records) == verdict and CLAIM.value(records) == theirs


@pytest.mark.parametrize(("ours", "verdict"), [(1.031, FAILS), (1.03, HOLDS), (0.5, HOLDS)])
def test_an_upper_bound(ours: float, verdict: str) -> None:
    claim = Claim("cpu", "", OURS, replace(OURS, route="dense"), at_most=1.03)
    assert claim.verdict([record("ours", ours), record("dense", 1.0)]) == verdict


def test_both_bounds_have_to_hold() -> None:
    claim = replace(CLAIM, at_least=2.0, at_most=3.0)
    assert [claim.verdict([record("ours", 1.0), record("theirs", t)]) for t in (1.9, 2.5, 3.1)] == [FAILS, HOLDS, FAILS]
    assert claim.bound == "at most 3.00x, at least 2.00x"


def test_without_a_bound_a_figure_is_only_reported() -> None:
    claim = replace(CLAIM, at_least=None)
    assert claim.verdict([record("ours", 1.0), record("theirs", 2.0)]) == "" and claim.bound == "-"


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record("ours", 1.0)],
        [record("theirs", 9.0)],
        [record("ours", 1.0), record("theirs", 9.0, device="cuda")],
        [record("ours", 1.0), record("theirs", 9.0, case="1e6 weights")],
        [record("ours", 1.0), record("theirs", 9.0, operation="sort")],
    ],
)
def test_what_is_not_there_is_not_measured(records: list[Record]) -> None:
    assert CLAIM.verdict(records) == NOT_MEASURED and CLAIM.value(records) is None


def test_a_column_that_is_empty_is_not_measured() -> None:
    claim = Claim("cpu", "", replace(OURS, column="memory_bytes"), at_most=1.0)
    assert claim.verdict([record("ours", 1.0)]) == NOT_MEASURED
    assert claim.verdict([record("ours", 1.0, memory_bytes=0.5)]) == HOLDS


def test_the_latest_record_counts() -> None:
    records = [record("ours", 1.0), record("theirs", 9.0), record("theirs", 2.0, time="2026-01-02")]
    assert CLAIM.verdict(records) == FAILS


def test_scale_and_cpu_time() -> None:
    records = [record("ours", 1.0, cpu_s=0.5), record("theirs", 6.0, cpu_s=1.0)]
    assert replace(CLAIM, scale=0.5).value(records) == 3.0
    assert CLAIM.in_cpu_time(records) == 2.0 and CLAIM.verdict(records) == HOLDS
    memory = Claim("cpu", "", replace(OURS, column="per_second"))
    assert memory.value(records) == 10.0 and memory.in_cpu_time(records) is None


def shown(table: object) -> str:
    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_the_table_says_claim_bound_figure_and_verdict() -> None:
    slow = replace(CLAIM, text="slow", at_least=10.0)
    text = shown(bench.claim_table([CLAIM, slow, replace(CLAIM, text="other", device="cuda")], _run(1.0, 5.0)))
    rows = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "faster than theirs at least 4.00x 5.00x - holds" in rows
    assert "slow at least 10.00x 5.00x - FAILS" in rows and "other at least 4.00x - - not measured" in rows


def _run(ours: float, theirs: float) -> list[Record]:
    return [record("ours", ours), record("theirs", theirs)]


@pytest.mark.parametrize(("theirs", "status"), [(3.0, 1), (5.0, 0)])
def test_the_command_reads_claims_from_the_record(
    theirs: float, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "records.csv"
    bench.append(out, _run(1.0, theirs))
    monkeypatch.setattr(sys.modules["sparse_robust.bench.report"], "CLAIMS", (CLAIM,))  # bench.report is a function
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    options = {"csv": out, "device": "cpu", "show": True, "claims": True, "console": console}
    assert bench.command(**options) == status  # type: ignore[arg-type]
    assert (FAILS if status else HOLDS) in console.export_text()
    assert bench.command(**options, since="2026-01-02") == 0  # type: ignore[arg-type]
    assert NOT_MEASURED in console.export_text()
    with pytest.raises(UsageError, match=r"--show reads a record file: name it"):
        bench.command(show=True)


def cases_of(operation: str, device: str) -> Iterable[str]:
    """Names of the full cases, as far as they can be had without their data."""
    if operation == "robust-step":
        for s in SETTINGS["full"][device]:
            yield f"{s.network} PGD-{s.steps} {s.batch}x{s.channels}x{s.size}x{s.size}"


def test_claims_read_operations_that_there_are() -> None:
    assert {name for claim in CLAIMS for name in claim.operations} <= set(bench.OPERATIONS)
    assert {claim.device for claim in CLAIMS} == {"cpu", "cuda"}
    for claim in CLAIMS:
        if claim.top.operation == "robust-step":
            assert claim.top.case in cases_of("robust-step", "cuda")


def test_every_triton_kernel_that_memory_bounds_is_claimed() -> None:
    """All that work on images or weights one by one; the selections and count are bound by launches or fit a cache."""
    from sparse_robust_kernels._dispatch import _devices, _load_triton

    claimed = {case.partition(",")[0] for cases in KERNELS.values() for case in cases}
    for name in operations():
        _load_triton(name)
    kernels = {name for name in operations() if "triton" in _devices[name]}
    others = {"masks.count_bits"} | {name for name in kernels if name.split(".")[0] in ("select", "optim")}
    assert claimed == kernels - others


def test_operations_an_image_are_those_that_torch_counts() -> None:
    (setting,) = [s for s in SETTINGS["full"]["cuda"] if s.network == "resnet18"]
    given = replace(setting, batch=1).problem(torch.device("cpu"))
    counted = []
    for frozen in (False, True):
        network = given.copy().requires_grad_(not frozen)
        with FlopCounterMode(display=False) as counter:
            network(given.x.clone().requires_grad_(frozen)).sum().backward()
        counted.append(counter.get_total_flops())
    total, training = FLOPS[RESNET18]
    assert training == pytest.approx(counted[0], rel=0.01)
    assert total == pytest.approx(counted[0] + setting.steps * counted[1], rel=0.01)

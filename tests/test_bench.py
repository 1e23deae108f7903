"""The harness: nothing is timed before its gate, routes are interleaved, and records are only ever added to."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparse_robust import bench
from sparse_robust.bench.gates import require_finite, require_same
from sparse_robust.bench.harness import time_routes
from sparse_robust.bench.records import COLUMNS, duration
from sparse_robust.errors import FileError, UsageError
from sparse_robust_kernels._dispatch import operations

ROOT = Path(__file__).resolve().parent.parent


class Clock:
    """A clock that routes move by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def route(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.order.append(name)
            self.now += seconds

        return call


def one_case(gate: Callable[[], str], **routes: Callable[[], object]) -> dict[str, bench.Operation]:
    def cases(device: torch.device, scale: str) -> Iterator[bench.Case]:
        yield bench.Case("5 things", routes, gate, work=5, unit="things")

    return {"op": bench.Operation("op", "an operation", cases)}


def test_routes_run_in_turn_after_two_unmeasured_calls() -> None:
    clock = Clock()
    routes = {"a": clock.route("a", 1.0), "b": clock.route("b", 2.0)}
    timed = time_routes(routes, samples=3, sample_seconds=0.5, clock=clock, cpu_clock=lambda: clock() / 4)
    assert "".join(clock.order) == "aabb" + "ab" * 3
    assert timed == {"a": (1, [1.0] * 3, [0.25] * 3), "b": (1, [2.0] * 3, [0.5] * 3)}


def test_a_sample_of_a_short_call_is_many_calls() -> None:
    clock = Clock()
    timed = time_routes({"a": clock.route("a", 0.25)}, samples=4, sample_seconds=1.0, clock=clock)
    assert timed["a"][:2] == (4, [0.25] * 4)


def test_time_is_bounded_but_three_samples_are_taken() -> None:
    clock = Clock()
    timed = time_routes({"a": clock.route("a", 100.0)}, samples=50, budget_seconds=10, clock=clock)
    assert len(timed["a"].wall) == 3


def test_the_device_is_waited_for_before_and_after_a_sample() -> None:
    events: list[str] = []
    time_routes(
        {"a": lambda: events.append("a")}, samples=1, sample_seconds=0.0, synchronize=lambda: events.append("|")
    )
    assert "".join(events) == "a|a|" + "|a|"


def test_nothing_is_timed_when_the_gate_fails() -> None:
    def gate() -> str:
        raise bench.GateError("a differs from b")

    def never() -> None:
        pytest.fail("was called")

    (outcome,) = bench.run(registry=one_case(gate, a=never))
    assert outcome == bench.Outcome("op", "5 things", failure="a differs from b")


def test_with_no_samples_gates_are_all_that_runs() -> None:
    (outcome,) = bench.run(registry=one_case(lambda: "same", a=lambda: pytest.fail("was called")), samples=0)
    assert outcome == bench.Outcome("op", "5 things", shown="same")


def test_an_error_ends_the_run_or_is_the_outcome_of_its_case(tmp_path: Path) -> None:
    def cases(device: torch.device, scale: str) -> Iterator[bench.Case]:
        for name, divisor in (("one", 0), ("two", 1)):
            yield bench.Case(name, {"a": lambda: None}, lambda divisor=divisor: str(1 / divisor), 5, "things")
        raise RuntimeError("no more")

    registry = {"op": bench.Operation("op", "an operation", cases)}
    with pytest.raises(ZeroDivisionError):
        list(bench.run(registry=registry, samples=3, out=tmp_path / "a.csv"))
    one, two, rest = bench.run(registry=registry, samples=3, out=tmp_path / "b.csv", keep_going=True)
    assert one.failure == "ZeroDivisionError: division by zero" and not one.records
    assert two.shown == "1.0" and bench.read(tmp_path / "b.csv") == list(two.records)
    assert (one.case, two.case, rest.case) == ("one", "two", "its cases")
    assert rest.failure == "RuntimeError: no more"


def test_files_of_fewer_columns_are_read_and_keep_theirs(tmp_path: Path) -> None:
    out, now = tmp_path / "old.csv", tmp_path / "new.csv"
    registry = one_case(lambda: "same", a=lambda: None)
    (outcome,) = bench.run(registry=registry, samples=3, out=now)
    assert outcome.records[0].cpu_s is not None and outcome.records[0].memory_bytes is None
    old = COLUMNS[: COLUMNS.index("cpu_s")]
    out.write_text(",".join(old) + "\n")
    list(bench.run(registry=registry, samples=3, out=out))
    (record,) = bench.read(out)
    assert out.read_text().splitlines()[0] == ",".join(old) and record.cpu_s is None and record.median_s > 0


def test_an_error_that_is_no_gate_error_is_not_swallowed() -> None:
    def gate() -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(bench.run(registry=one_case(gate, a=lambda: None)))


def test_a_run_is_recorded_route_by_route(tmp_path: Path) -> None:
    out = tmp_path / "new" / "records.csv"
    registry = one_case(lambda: "a, then b", a=lambda: None, b=lambda: None)
    (outcome,) = bench.run(registry=registry, samples=3, out=out)
    assert bench.read(out) == list(outcome.records)
    first, second = outcome.records
    assert (first.route, second.route) == ("a", "b")
    assert first.relative == 1 and second.relative == second.median_s / first.median_s
    assert first.per_second == 5 / first.median_s and first.unit == "things"
    assert first.q20_s <= first.median_s <= first.q80_s
    assert first.gate == "a, then b" and first.samples == 3 and first.torch == torch.__version__


def test_records_are_added_to_and_never_rewritten(tmp_path: Path) -> None:
    out = tmp_path / "records.csv"
    registry = one_case(lambda: 'with "quotes", commas', a=lambda: None)
    list(bench.run(registry=registry, samples=3, out=out))
    before = out.read_bytes()
    list(bench.run(registry=registry, samples=3, out=out))
    after = out.read_bytes()
    assert after.startswith(before) and len(after) > len(before)
    assert after.decode().splitlines()[0] == ",".join(COLUMNS) and len(bench.read(out)) == 2


def test_a_file_of_other_columns_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "records.csv"
    out.write_text("time,speed\n1,2\n")
    with pytest.raises(FileError, match=r"records\.csv.*missing operation.*unknown speed"):
        list(bench.run(registry=one_case(lambda: "", a=lambda: None), samples=3, out=out))
    assert out.read_text() == "time,speed\n1,2\n"
    with pytest.raises(FileError, match="unknown speed"):
        bench.read(out)


def test_unreadable_records_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        bench.read(tmp_path / "none.csv")
    out = tmp_path / "torn.csv"
    out.write_text(",".join(COLUMNS) + "\n2026-01-01,op,case\n")
    with pytest.raises(FileError, match=r"torn\.csv holds a line that is no record"):
        bench.read(out)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot add to"):
        bench.append(tmp_path / "file" / "records.csv", [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"names": ["slect"]}, "Did you mean 'select'"),
        ({"scale": "ful"}, "Did you mean 'full'"),
        ({"samples": -1}, "samples must be 0"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench.run(**arguments)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_refused() -> None:
    with pytest.raises(UsageError, match="no CUDA device"):
        bench.run(device="cuda")


def test_the_machine_is_described() -> None:
    found = bench.machine()
    assert found.cpu and found.cores >= 1 and found.torch == torch.__version__ and found.gpu == ""
    line = bench.machine_line(found)
    assert found.cpu in line and f"torch {torch.__version__}" in line and "\n" not in line
    assert {field.name for field in dataclasses.fields(found)} <= set(COLUMNS)


def test_the_report_ends_with_the_table_and_says_what_failed() -> None:
    def gate() -> str:
        raise bench.GateError("3 of 9 values differ")

    good = one_case(lambda: "same values", fast=lambda: None)["op"]
    bad = dataclasses.replace(one_case(gate, a=lambda: None)["op"], name="bad")
    console = Console(record=True, width=140, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    status = bench.report(console, bench.run(registry={"bad": bad, "op": good}, samples=3))
    text = console.export_text()
    assert status == 1
    assert "bad, 5 things: NOT TIMED, 3 of 9 values differ" in text and "op, 5 things: same values" in text
    assert text.index("NOT TIMED") < text.index("relative") < text.index("1 cases were not timed")
    assert bench.report(console, bench.run(registry={"op": good}, samples=3)) == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.01234, "12.3 ms"), (4.5e-5, "45 us"), (3e-9, "3 ns"), (0.0, "0 ns")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_gates_name_what_differs() -> None:
    one = {"w": torch.tensor([1.0, 2.0])}
    require_same("state", one, {"w": torch.tensor([1.0, 2.0])})
    for other, message in (
        ({"w": torch.tensor([1.0, 2.5])}, "state: 1 of 2 values of w differ, by up to 0.5"),
        ({"w": torch.tensor([1.0])}, r"w has shape \(2,\), expected \(1,\)"),
        ({"v": torch.tensor([1.0])}, "expected the names"),
    ):
        with pytest.raises(bench.GateError, match=message):
            require_same("state", one, other)
    with pytest.raises(bench.GateError, match="the loss is not finite"):
        require_finite("the loss", torch.tensor(math.nan))


OPERATIONS = [
    "ceilings", "mask-storage", "masked-step", "masks", "memory-format", "optimizer-step", "pgd", "pgd-step",
    "replica-refresh", "robust-step", "select", "training-step",
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_gates_of_the_operations_hold(name: str, device: str) -> None:
    """Parity: what we time does the same as the independent implementation it is timed against."""
    cases = list(bench.OPERATIONS[name].cases(torch.device(device), "quick"))
    assert cases or (name, device) == ("mask-storage", "cuda")
    for case in cases:
        assert case.gate()
        for route in case.routes.values():
            route()
        assert all(size >= 0 for size in case.memory.values()) and set(case.memory) <= set(case.routes)


def test_every_operation_has_its_gate_tested() -> None:
    assert sorted(bench.OPERATIONS) == OPERATIONS


def test_every_operation_of_the_kernels_is_timed() -> None:
    """A kernel by itself, and those that only work together by the operation that calls them all."""
    together = {"select": "select", "optim": "optimizer-step"}
    cpu = torch.device("cpu")
    timed = {
        case.name.split(",")[0] for op in ("pgd-step", "masks") for case in bench.OPERATIONS[op].cases(cpu, "quick")
    }
    left = {name for name in operations() if together.get(name.split(".")[0]) not in bench.OPERATIONS} - timed
    assert not left and timed <= set(operations())


def test_benchmarks_need_no_data_sets() -> None:
    """A bare GPU machine has torch, triton and timm."""
    missing = ("datasets", "jsonargparse", "hypothesis", "tensorboard")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import sparse_robust.bench, sparse_robust.cli"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_run_py_shows_the_last_run(tmp_path: Path) -> None:
    out = tmp_path / "records.csv"
    for rate in (1, 2):
        registry = one_case(lambda: "", **{f"route{rate}": lambda: None})
        (outcome,) = bench.run(registry=registry, samples=3)
        bench.append(out, [dataclasses.replace(record, time=f"2026-01-0{rate}") for record in outcome.records])
    command = [sys.executable, "benchmarks/run.py", "--show", "--out", str(out)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "route2" in shown and "route1" not in shown

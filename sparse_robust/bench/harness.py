"""The registry of operations, and the one way to time them: gate, warm up, interleave, take quantiles."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sparse_robust.bench.machines import machine
from sparse_robust.bench.records import Record, append
from sparse_robust.errors import SparseRobustError, UsageError, unknown

SCALES = ("quick", "full")
"""``quick``: sizes that take moments, for tests. ``full``: sizes worth writing down, chosen for the device."""

Clock = Callable[[], float]


class GateError(SparseRobustError):
    """Two routes that should agree do not; nothing of that case is timed."""


@dataclass(frozen=True)
class Case:
    """An operation on given data: the routes that do the same work, and the proof that they do."""

    name: str
    """Sizes, as a reader wants them: "1e7 weights", "128x1x28x28"."""
    routes: Mapping[str, Callable[[], object]]
    """Ours first. Each may be called any number of times."""
    gate: Callable[[], str]
    """Raises `GateError`, or returns what it found to hold, in a few words."""
    work: int
    """How many of ``unit`` are handled each time."""
    unit: str
    memory: dict[str, float] = field(default_factory=dict)
    """Bytes by route, where the gate measures them: see `Record.memory_bytes`."""
    times: int = 1
    """How often a route does its work when it is called once. What is recorded is one of these times."""


Cases = Callable[[torch.device, str], Iterator[Case]]


@dataclass(frozen=True)
class Operation:
    """A named family of cases. ``cases`` takes a device and a scale and may yield none where it cannot run."""

    name: str
    description: str
    cases: Cases


@dataclass(frozen=True)
class Outcome:
    """What came of one case: its records (none if only its gate was asked for), or why it failed."""

    operation: str
    case: str
    records: tuple[Record, ...] = field(default=())
    failure: str = ""
    shown: str = ""
    """What the gate found to hold."""


OPERATIONS: dict[str, Operation] = {}
"""Filled by the modules of ``sparse_robust.bench.operations``."""


def operation(name: str, description: str) -> Callable[[Cases], Cases]:
    """Register a generator of cases as an operation."""

    def add(cases: Cases) -> Cases:
        OPERATIONS[name] = Operation(name, description, cases)
        return cases

    return add


class Timing(NamedTuple):
    """What was taken of one route."""

    calls: int
    """In one sample."""
    wall: list[float]
    """Seconds of one call by the clock, a number for each sample."""
    cpu: list[float]
    """The same in CPU time of this process, all its threads."""


def time_routes(
    routes: Mapping[str, Callable[[], object]],
    *,
    samples: int = 12,
    sample_seconds: float = 0.02,
    budget_seconds: float = 60.0,
    synchronize: Callable[[], None] = lambda: None,
    clock: Clock = time.perf_counter,
    cpu_clock: Clock = time.process_time,
) -> dict[str, Timing]:
    """Time routes in turn (A, B, A, B, ...), so that whatever drifts in the machine touches all alike.

    Every route is called twice first, unmeasured: that covers compilation, caches and the choice of algorithms. The
    second call's time sets how many calls make a sample of at least ``sample_seconds``. Rounds stop after ``samples``,
    or when ``budget_seconds`` are spent, but not before three.
    """
    calls: dict[str, int] = {}
    for name, call in routes.items():
        call()
        synchronize()
        began = clock()
        call()
        synchronize()
        calls[name] = max(1, math.ceil(sample_seconds / max(clock() - began, 1e-9)))
    taken = {name: Timing(count, [], []) for name, count in calls.items()}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for done in range(samples):
            if done >= 3 and clock() - start > budget_seconds:
                break
            for name, call in routes.items():
                synchronize()
                began, worked = clock(), cpu_clock()
                for _ in range(calls[name]):
                    call()
                synchronize()
                taken[name].cpu.append((cpu_clock() - worked) / calls[name])
                taken[name].wall.append((clock() - began) / calls[name])
    finally:
        if collecting:
            gc.enable()
    return taken


def measure(case: Case, operation_name: str, device: torch.device, *, now: str, samples: int = 12) -> Outcome:
    """Take one case through its gate and, if it holds and there are samples to take, time it."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    try:
        shown = case.gate()
    except GateError as error:
        return Outcome(operation_name, case.name, failure=str(error))
    if samples == 0:
        return Outcome(operation_name, case.name, shown=shown)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    timed = {
        route: Timing(taken.calls * case.times, *(np.divide(seconds, case.times).tolist() for seconds in taken[1:]))
        for route, taken in time_routes(case.routes, samples=samples, synchronize=synchronize).items()
    }
    ours = float(np.median(next(iter(timed.values())).wall))
    where = asdict(machine(device))
    records = []
    for route, (calls, wall, cpu) in timed.items():
        low, median, high = (float(value) for value in np.quantile(wall, [0.2, 0.5, 0.8]))
        records.append(
            Record(
                time=now,
                operation=operation_name,
                case=case.name,
                route=route,
                device=device.type,
                samples=len(wall),
                calls=calls,
                median_s=median,
                q20_s=low,
                q80_s=high,
                relative=median / ours,
                per_second=case.work / median,
                unit=case.unit,
                gate=shown,
                load=round(load, 2),
                cpu_s=float(np.median(cpu)),
                memory_bytes=case.memory.get(route),
                **where,
            )
        )
    return Outcome(operation_name, case.name, tuple(records), shown=shown)


def select(registry: Mapping[str, Operation], names: Sequence[str] | None) -> list[Operation]:
    """Return the operations of these names, all if there are none; an unknown name is refused."""
    for name in names or ():
        if name not in registry:
            raise unknown("operation", name, registry)
    return [registry[name] for name in (names or registry)]


def run(
    names: Sequence[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    scale: str = "full",
    samples: int = 12,
    out: str | Path | None = None,
    registry: Mapping[str, Operation] = OPERATIONS,
    keep_going: bool = False,
) -> Iterator[Outcome]:
    """Run operations one case at a time, yielding each outcome as it is there and adding its records to ``out``.

    Args:
        names: operations to run; None means all of them.
        device: "cpu" or "cuda".
        scale: one of `SCALES`.
        samples: rounds of timing; a case that takes long gets fewer, never under three. 0: gates alone.
        out: the record file to add to; None writes nothing.
        registry: the operations to choose from.
        keep_going: an error of a case, not of its gate alone, is its outcome and does not end the run.

    Raises:
        UsageError: for an unknown name or scale, no samples, or a device that is not there, before anything runs.
    """
    chosen = select(registry, names)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if samples < 0:
        raise UsageError(f"samples must be 0 (gates alone) or more, got {samples}.")
    kind = torch.device(device)
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' was asked for, but torch sees no CUDA device here. Use device 'cpu'.")
    return _run(chosen, kind, scale, samples, out, keep_going)


def _run(
    chosen: Iterable[Operation],
    device: torch.device,
    scale: str,
    samples: int,
    out: str | Path | None,
    keep_going: bool,
) -> Iterator[Outcome]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    for each in chosen:
        cases = each.cases(device, scale)
        while True:
            case: Case | None = None
            try:
                case = next(cases, None)
                if case is None:
                    break
                outcome = measure(case, each.name, device, now=now, samples=samples)
            except Exception as error:
                if not keep_going:
                    raise
                what = case.name if case is not None else "its cases"
                yield Outcome(each.name, what, failure=f"{type(error).__name__}: {str(error)[:500]}")
                continue
            if out is not None and outcome.records:
                append(out, outcome.records)
            yield outcome

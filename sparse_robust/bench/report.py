"""What a person at a terminal sees of a benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparse_robust.bench.harness import OPERATIONS, Outcome, run
from sparse_robust.bench.machines import machine, machine_line
from sparse_robust.bench.records import Record, table

if TYPE_CHECKING:
    from rich.console import Console


def command(
    names: Sequence[str] = (),
    *,
    list_only: bool = False,
    csv: Path | None = None,
    device: str | None = None,
    scale: str = "full",
    samples: int = 12,
    console: Console | None = None,
) -> int:
    """Run operations (all of them if none is named), show them, and add their records to ``csv``.

    ``device`` None means the GPU where there is one. ``list_only`` shows what there is and runs nothing.

    Returns:
        The exit status: 0, or 1 if a gate failed.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    if list_only:
        for known in OPERATIONS.values():
            console.print(f"{known.name:14s} {known.description}", markup=False, highlight=False)
        return 0
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    outcomes = run(names, device=device, scale=scale, samples=samples, out=csv)
    status = report(console, outcomes, device=device)
    if csv is not None:
        console.print(f"added to {csv}", markup=False, highlight=False)
    return status


def report(console: Console, outcomes: Iterable[Outcome], *, device: torch.device | str = "cpu") -> int:
    """Show outcomes as they come, then the table.

    Returns:
        The exit status: 0, or 1 if a gate failed.
    """
    console.print(machine_line(machine(device)), markup=False, highlight=False)
    records: list[Record] = []
    failures = 0
    for outcome in outcomes:
        records.extend(outcome.records)
        failures += bool(outcome.failure)
        what = f"{outcome.operation}, {outcome.case}: "
        said = f"NOT TIMED, {outcome.failure}" if outcome.failure else outcome.records[0].gate
        console.print(what + said, style="red" if outcome.failure else "", markup=False, highlight=False)
    if records:
        console.print(table(records))
    if failures:
        console.print(f"{failures} cases were not timed, because their gates failed.", style="red")
    return int(failures > 0)

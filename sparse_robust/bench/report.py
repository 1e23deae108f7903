"""What a person at a terminal sees of a benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparse_robust.bench.base import compare, comparison_table
from sparse_robust.bench.claimed import CLAIMS
from sparse_robust.bench.claims import FAILS, Claim, claim_table
from sparse_robust.bench.harness import OPERATIONS, Outcome, run, select
from sparse_robust.bench.machines import machine, machine_line
from sparse_robust.bench.plots import plot as draw
from sparse_robust.bench.records import Record, last_run, read, table
from sparse_robust.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def command(
    names: Sequence[str] = (),
    *,
    list_only: bool = False,
    csv: Path | None = None,
    device: str | None = None,
    scale: str = "full",
    samples: int = 12,
    base: str | None = None,
    claims: bool = False,
    plot: Path | None = None,
    show: bool = False,
    since: str = "",
    console: Console | None = None,
) -> int:
    """Run operations (all of them if none is named), show them, and add their records to ``csv``.

    Args:
        names: operations; ``plot`` and ``show`` then look at their records alone.
        list_only: show what there is, and run nothing.
        csv: the record file; the other options that read one need it.
        device: None means the GPU where there is one.
        base: a git revision to time our routes against, instead of against their rivals; nothing is recorded.
        claims: run what the claims rest on (or the operations named), then say which of them hold.
        plot: draw the record into this folder, and run nothing.
        show: run nothing; show the last run of the record, or with ``claims`` what it says of them.
        since: with ``show``, look only at runs from this time on (UTC, ISO 8601).

    Returns:
        The exit status: 0, or 1 if a gate or a claim failed.

    Raises:
        UsageError: for an unknown name or revision, options that need a record file and have none, or options of which
            one would be ignored.
        FileError: for a record that cannot be read or added to, or a folder that takes no pictures.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    select(OPERATIONS, names)
    given = {"names of operations": names, "a record file": csv, "--claims": claims, "--since": since}
    _refuse_ignored({"--list": list_only, "--base": base, "--plot": plot, "--show": show}, given)
    if list_only:
        console.print(_listed())
        return 0
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if base is not None:
        return _against(base, names, console, device=device, scale=scale, samples=samples)
    if plot is not None:
        pictures = [str(path) for path in draw(_required(csv, "plot"), plot, names)]
        nothing = f"nothing was drawn: {csv} has no record of {', '.join(names) or 'anything'}."
        console.print("\n".join(pictures) or nothing, markup=False, highlight=False)
        return 0
    said = [claim for claim in CLAIMS if claim.device == device]
    if show:
        records = [record for record in read(_required(csv, "show")) if record.time >= since]
        records = [record for record in records if not names or record.operation in names]
        console.print(claim_table(said, records) if claims else table(last_run(records), width=console.width))
        return int(claims and _any_fails(said, records))
    if claims and not names:
        names = list(dict.fromkeys(name for claim in said for name in claim.operations))
    records = []
    outcomes = run(names, device=device, scale=scale, samples=samples, out=csv, keep_going=True)
    status = report(console, outcomes, records, device=device)
    if csv is not None and records:
        console.print(f"added to {csv}", markup=False, highlight=False)
    if claims:
        console.print(claim_table(said, records))
        status = int(status or _any_fails(said, records))
    return status


# What an option that times nothing, or records nothing, goes together with.
_TAKES = {
    "--list": (),
    "--base": ("names of operations",),
    "--plot": ("names of operations", "a record file"),
    "--show": ("names of operations", "a record file", "--claims", "--since"),
    "": ("names of operations", "a record file", "--claims"),
}


def _refuse_ignored(modes: Mapping[str, object], given: Mapping[str, object]) -> None:
    chosen = [mode for mode, value in modes.items() if value not in (None, False)] or [""]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other: give one of them.")
    (mode,) = chosen
    ignored = [name for name, value in given.items() if value and name not in _TAKES[mode]]
    if ignored:
        what = f"{mode} does not take {' or '.join(ignored)}" if mode else f"{ignored[0]} is for --show alone"
        raise UsageError(f"{what}: leave {'that' if len(ignored) == 1 else 'those'} out.")


def _listed() -> Table:
    from rich.table import Table
    from rich.text import Text

    shown = Table.grid(padding=(0, 2))
    shown.add_column(no_wrap=True)
    for known in OPERATIONS.values():
        shown.add_row(known.name, Text(known.description))
    return shown


def _against(base: str, names: Sequence[str], console: Console, **options: Any) -> int:
    done = []
    for comparison in compare(base, names, root=Path(__file__).resolve().parents[2], **options):
        done.append(comparison)
        said = comparison.failure or "timed"
        console.print(f"{comparison.operation}, {comparison.case}: {said}", markup=False, highlight=False)
    console.print(comparison_table(done, base))
    return int(any(comparison.failure for comparison in done))


def _required(csv: Path | None, option: str) -> Path:
    if csv is None:
        raise UsageError(f"--{option} reads a record file: name it, with --csv FILE.")
    return csv


def _any_fails(said: Sequence[Claim], records: Sequence[Record]) -> bool:
    return any(claim.verdict(records) == FAILS for claim in said)


def report(
    console: Console,
    outcomes: Iterable[Outcome],
    records: list[Record] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> int:
    """Show outcomes as they come, then the table; add their records to ``records``.

    Returns:
        The exit status: 0, or 1 if a gate failed.
    """
    console.print(machine_line(machine(device)), markup=False, highlight=False)
    records = [] if records is None else records
    failures = 0
    for outcome in outcomes:
        records.extend(outcome.records)
        failures += bool(outcome.failure)
        what = f"{outcome.operation}, {outcome.case}: "
        said = f"NOT TIMED, {outcome.failure}" if outcome.failure else outcome.shown
        console.print(what + said, style="red" if outcome.failure else "", markup=False, highlight=False)
    if records:
        console.print(table(records, width=console.width))
    if failures:
        console.print(f"{failures} cases were not timed: their gates failed, or they could not run.", style="red")
    return int(failures > 0)

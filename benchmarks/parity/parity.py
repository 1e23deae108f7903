"""Compare this package's attacks with pyautoattack, image by image: python -m benchmarks.parity.parity.

Exit status 1 if a bound is broken: more than 0.5 points between the robust accuracies, more backward passes than the
reference, or a perturbation outside the budget.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from benchmarks.parity import networks, rows, sides
from benchmarks.parity.networks import NETWORKS, Subject
from benchmarks.parity.rows import Row
from benchmarks.parity.sides import ATTACKS, Outcome, Task
from sparse_robust.bench import machine, machine_line
from sparse_robust.errors import SparseRobustError

NORMS = ("Linf", "L2", "L1")
RECORD = Path(__file__).resolve().parent.parent / "results" / "parity.csv"

# Images that pass the model for an image that stays robust, as (forward and backward, forward alone).
PASSES: dict[str, dict[str, tuple[int, int]]] = {
    "apgd-ce": {"Linf": (100, 0), "L2": (100, 0), "L1": (500, 0)},
    "apgd-t": {"Linf": (900, 0), "L2": (900, 0), "L1": (500, 0)},
    "fab-t": {norm: (900, 900) for norm in NORMS},
    "square": {norm: (0, sides.QUERIES) for norm in NORMS},
}

Cell = tuple[Subject, Task]


def chosen(words: Sequence[str]) -> list[tuple[str, str, str]]:
    """Return (network, norm, attack) triples; words of one kind are alternatives, kinds without a word are whole.

    Raises:
        ValueError: for a word that names none of them.
    """
    kinds = (tuple(NETWORKS), NORMS, ATTACKS)
    for word in words:
        if not any(word in kind for kind in kinds):
            raise ValueError(f"{word!r} is none of {', '.join(name for kind in kinds for name in kind)}")
    picked = [[name for name in kind if name in words] or list(kind) for kind in kinds]
    return [(network, norm, attack) for network in picked[0] for norm in picked[1] for attack in picked[2]]


def cells_of(given: argparse.Namespace) -> list[Cell]:
    """Return what is to be compared."""
    triples = chosen(given.only)
    subjects = {name: networks.load(name, given.device).first(given.images) for name, _, _ in triples}
    task = Task("", 0.0, "", queries=given.square_queries, batch=given.batch)
    return [
        (subjects[name], replace(task, norm=norm, eps=NETWORKS[name].eps[norm], attack=attack))
        for name, norm, attack in triples
    ]


def estimate(subject: Subject, task: Task, rates: tuple[float, float]) -> float:
    """Return the seconds of one side, within a factor of two: as if half of the images stayed robust to the end."""
    both, forward = rates
    seconds = 0.0
    for attack, passes in PASSES.items():
        if task.attack in (attack, sides.ENSEMBLE):
            pairs, alone = passes[task.norm]
            seconds += pairs / both + min(alone, task.queries if attack == "square" else alone) / forward
    return seconds * len(subject.y) / 2


def rates_of(subject: Subject, batch: int) -> tuple[float, float]:
    """Return images a second: forward with input gradient, forward alone."""
    x = subject.x[:batch]

    def both() -> None:
        shown = x.clone().requires_grad_(True)
        torch.autograd.grad(subject.model(shown).logsumexp(1).sum(), shown)

    def forward() -> None:
        with torch.no_grad():
            subject.model(x)

    found = []
    for call in (both, forward):
        call()
        began = time.perf_counter()
        for _ in range(3):
            call()
        found.append(3 * len(x) / (time.perf_counter() - began))
    return found[0], found[1]


def say_estimate(console: Console, cells: Sequence[Cell], *, seeds: int, both: bool) -> None:
    """Show how long the cells will take, with or without our side."""
    rates = {subject.network.name: rates_of(subject, task.batch) for subject, task in cells}
    total = 0.0
    for subject, task in cells:
        runs = sum(both + (not sides.is_remembered(subject, replace(task, seed=seed))) for seed in range(seeds))
        total += runs * estimate(subject, task, rates[subject.network.name])
    for name, (paired, forward) in rates.items():
        console.print(f"{name}: {forward:,.0f} images/s forward, {paired:,.0f} with gradient", highlight=False)
    threads = torch.get_num_threads()
    console.print(f"{len(cells)} comparisons, roughly {total / 60:.0f} minutes on {threads} thread(s)", highlight=False)


def compare(subject: Subject, task: Task, given: argparse.Namespace, run: str) -> Row:
    """Run both sides of a cell with every seed and judge them."""
    load = os.getloadavg()[0]
    tasks = [replace(task, seed=seed) for seed in range(given.seeds)]
    theirs = [sides.remembered(subject, one) for one in tasks]
    if given.versus == "reference":
        others = [replace(task, seed=given.seeds + seed) for seed in range(given.seeds)]
        mine, name = [sides.remembered(subject, one) for one in others], f"pyautoattack, seeds from {given.seeds}"
    else:
        mine, name = [sides.ours(subject, one) for one in tasks], "sparse-robust"
    return _row(subject, task, mine, theirs, run=run, name=name, load=load)


def _row(
    subject: Subject,
    task: Task,
    mine: Sequence[Outcome],
    theirs: Sequence[Outcome],
    *,
    run: str,
    name: str,
    load: float,
) -> Row:
    count, device = len(subject.y), subject.x.device
    where = {k: v for k, v in asdict(machine(device)).items() if k in {field.name for field in fields(Row)}}
    robust = [fmean(100 * sum(outcome.robust) / count for outcome in side) for side in (mine, theirs)]
    means = {
        f"{name}_{side}": fmean(getattr(outcome, name) for outcome in outcomes)
        for side, outcomes in (("ours", mine), ("reference", theirs))
        for name in ("forward", "backward", "seconds", "cpu_seconds")
    }
    passes: dict[str, Any] = {name: round(value / count, 2) for name, value in means.items() if "seconds" not in name}
    took: dict[str, Any] = {name: round(value, 3) for name, value in means.items() if "seconds" in name}
    return Row(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        run=run,
        network=subject.network.name,
        data=subject.network.test,
        norm=task.norm,
        eps=task.eps,
        attack=task.attack,
        images=count,
        queries=task.queries,
        seeds=len(mine),
        batch=task.batch,
        ours=name,
        reference=f"pyautoattack {sides.version_of('pyautoattack')}",
        clean=round(100 * theirs[0].clean / count, 3),
        robust_ours=round(robust[0], 3),
        robust_reference=round(robust[1], 3),
        difference=round(robust[0] - robust[1], 3),
        noise=round(rows.noise(theirs), 3),
        only_ours=round(rows.only(mine, theirs), 2),
        only_reference=round(rows.only(theirs, mine), 2),
        largest_ours=max(outcome.largest for outcome in mine),
        largest_reference=max(outcome.largest for outcome in theirs),
        verdict=rows.judge(task, mine, theirs, available=subject.available),
        load=round(load, 2),
        device=device.type,
        **passes,
        **took,
        **where,
    )


def default_run() -> str:
    """Return a run's name: the commit, if that says everything about the code, else the time."""
    commit = machine().commit
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return now if not commit or commit.endswith("+") else commit


def main() -> int:
    given = _parse()
    torch.set_num_threads(given.threads)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(machine_line(machine(given.device)), markup=False, highlight=False)
    try:
        return _run(console, given)
    except SparseRobustError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


def _run(console: Console, given: argparse.Namespace) -> int:
    cells = cells_of(given)
    if given.reference_only:
        say_estimate(console, cells, seeds=given.seeds, both=False)
        for subject, task in [(s, replace(t, seed=seed)) for s, t in cells for seed in range(given.seeds)]:
            found = sides.remembered(subject, task)
            share = 100 * sum(found.robust) / len(found.robust)
            what = f"{subject.network.name} {task.norm} {task.eps:g} {task.attack}"
            console.print(f"{what}: reference {share:.1f} % robust, {found.seconds:.0f} s", highlight=False)
        return 0
    if given.versus == "ours":
        for _, task in cells:
            sides.our_attacks(task)  # what is missing is said before any work
    run = given.run or default_run()
    done = {row.key: row for row in rows.read(given.out) if row.run == run}
    left = [(s, t) for s, t in cells if (s.network.name, t.norm, t.attack) not in done]
    console.print(f"run {run}: {len(cells) - len(left)} of {len(cells)} comparisons done before", highlight=False)
    say_estimate(console, left, seeds=given.seeds, both=True)
    began = time.perf_counter()
    for subject, task in left:
        if given.minutes is not None and time.perf_counter() - began > 60 * given.minutes:
            console.print(f"stopped after {given.minutes:g} minutes; go on with --run {run}", style="yellow")
            break
        row = compare(subject, task, given, run)
        rows.append(given.out, row)
        done[row.key] = row
        what = f"{row.network} {row.norm} {row.eps:g} {row.attack}: {row.robust_ours:.1f} %"
        console.print(f"{what}, reference {row.robust_reference:.1f} %: {row.verdict}", markup=False, highlight=False)
    return _report(console, [done[key] for s, t in cells if (key := (s.network.name, t.norm, t.attack)) in done])


def _report(console: Console, found: Sequence[Row]) -> int:
    console.print(rows.table(found))
    broken, short = sum(row.broken for row in found), sum(row.verdict == "short" for row in found)
    console.print(
        f"{len(found)} comparisons, {broken} with a broken bound, {short} too short to judge", highlight=False
    )
    return int(broken > 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare this package's attacks with pyautoattack, image by image.")
    add = parser.add_argument
    add("--only", nargs="+", default=(), metavar="WORD", help="networks, norms and attacks to keep, such as cnn Linf")
    add("--images", type=int, default=rows.IMAGES, help="fewer make a short run, not judged; default: %(default)s")
    add("--square-queries", type=int, default=sides.QUERIES, help="fewer make a short run; default: %(default)s")
    add("--run", help="name of the run to take up; default: the commit, or the time where files were changed")
    add("--minutes", type=float, help="begin no further comparison after so many")
    add("--versus", choices=("ours", "reference"), default="ours", help="reference: itself under another seed")
    add("--reference-only", action="store_true", help="run and remember the reference, compare nothing")
    add("--batch", type=int, default=250, help="images of a batch, both sides; default: %(default)s")
    add("--seeds", type=int, default=1, help="compare the means over so many seeds; default: %(default)s")
    add("--threads", type=int, default=1, help="of torch; default: %(default)s")
    add("--device", default="cpu")
    add("--out", type=Path, default=RECORD, help="default: benchmarks/results/parity.csv")
    given = parser.parse_args()
    try:
        chosen(given.only)
    except ValueError as error:
        parser.error(str(error))
    for name in ("images", "square_queries", "batch", "seeds", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return given


if __name__ == "__main__":
    sys.exit(main())

"""One line of the parity record: both sides of one comparison, the machine, and whether the bounds hold."""

from __future__ import annotations

import csv
import io
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.table import Table

from benchmarks.parity.sides import QUERIES, Outcome, Task
from sparse_robust.bench.records import duration
from sparse_robust.errors import FileError

IMAGES = 1000
"""Images that a judgement takes, or the whole test set where that is smaller."""
POINTS = 0.5
"""Largest difference in robust accuracy, in percentage points."""
ROUNDING = 1e-6
"""By how much of eps a perturbation may exceed it: eps itself is rounded to the images' precision."""


@dataclass(frozen=True)
class Row:
    """One attack on one network within one budget, by both sides. The fields are the columns of the file."""

    time: str
    """UTC, ISO 8601."""
    run: str
    """Rows of one run are not made again when it is taken up again."""
    network: str
    data: str
    norm: str
    eps: float
    attack: str
    images: int
    queries: int
    """Most queries of the Square attack."""
    seeds: int
    """Runs that the figures below are means over: seeds 0, 1, ..."""
    batch: int
    ours: str
    """What the columns named "ours" are of: this package, or the reference under another seed."""
    reference: str
    clean: float
    """Clean accuracy, in percent."""
    robust_ours: float
    robust_reference: float
    """Robust accuracy, in percent."""
    difference: float
    """Ours minus the reference's, in points."""
    noise: float
    """Standard deviation of the reference's robust accuracy between its seeds, in points; NaN with one seed."""
    only_ours: float
    only_reference: float
    """Images that one side broke and the other, with the same seed, did not."""
    forward_ours: float
    forward_reference: float
    backward_ours: float
    backward_reference: float
    """Passes an image, over all images."""
    largest_ours: float
    largest_reference: float
    """Largest perturbation of a broken image, as a share of eps."""
    seconds_ours: float
    seconds_reference: float
    cpu_seconds_ours: float
    cpu_seconds_reference: float
    """Wall time and processor time of one run; what other work slowed down is seen in their ratio."""
    verdict: str
    """"holds", "short" (too few images or queries to judge by), or the bounds that are broken."""
    load: float
    device: str
    cpu: str
    cores: int
    threads: int
    gpu: str
    system: str
    python: str
    torch: str
    version: str
    commit: str

    @property
    def broken(self) -> bool:
        """Whether a bound is broken in a row that can be judged."""
        return self.verdict not in ("holds", "short")

    @property
    def key(self) -> tuple[str, str, str]:
        """What of a run this is."""
        return self.network, self.norm, self.attack


def judge(task: Task, ours: Sequence[Outcome], reference: Sequence[Outcome], *, available: int) -> str:
    """Return the verdict on the outcomes of both sides, one a seed.

    Args:
        available: images in the test set; a comparison on fewer, and on fewer than `IMAGES`, is not judged.
    """
    count = len(reference[0].robust)
    if any(len(outcome.robust) != count for outcome in (*ours, *reference)) or len(ours) != len(reference):
        raise ValueError("the two sides did not see the same images as often.")
    if count < min(IMAGES, available) or task.queries < QUERIES:
        return "short"
    broken = []
    apart = abs(sum(sum(o.robust) for o in ours) - sum(sum(r.robust) for r in reference))
    if 100 * apart > POINTS * count * len(ours):
        broken.append(f"{100 * apart / count / len(ours):.2f} points apart, at most {POINTS} are allowed")
    mine, theirs = (sum(outcome.backward for outcome in side) for side in (ours, reference))
    if mine > theirs:
        broken.append(f"{mine} backward passes, the reference makes {theirs}")
    largest = max(outcome.largest for outcome in ours)
    if largest > 1 + ROUNDING:
        broken.append(f"perturbations up to {largest:.9g} eps")
    return "; ".join(broken) or "holds"


def only(first: Sequence[Outcome], second: Sequence[Outcome]) -> float:
    """Return how many images, in the mean over the seeds, the first side broke and the second did not."""
    pairs = zip(first, second, strict=True)
    return sum(not a and b for o, r in pairs for a, b in zip(o.robust, r.robust, strict=True)) / len(first)


def noise(outcomes: Sequence[Outcome]) -> float:
    """Return the standard deviation of the robust accuracy between seeds, in points; NaN for one seed."""
    if len(outcomes) < 2:
        return math.nan
    return statistics.stdev(100 * sum(outcome.robust) / len(outcome.robust) for outcome in outcomes)


COLUMNS = tuple(field.name for field in fields(Row))
_CONVERT = {"int": int, "float": float, "str": str}


def append(path: Path, row: Row) -> None:
    """Add a row to the end of a file, in one write; the file and its header are made if need be.

    Raises:
        FileError: if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_header(path)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    if new:
        writer.writeheader()
    writer.writerow(asdict(row))
    with open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """Return the rows of a file, oldest first; none if there is no file."""
    if not path.exists():
        return []
    _check_header(path)
    with open(path, encoding="utf-8", newline="") as file:
        return [
            Row(**{field.name: _CONVERT[str(field.type)](line[field.name]) for field in fields(Row)})
            for line in csv.DictReader(file)
        ]


def table(rows: Iterable[Row]) -> Table:
    """Lay rows out for a terminal."""
    shown = Table()
    for heading in ("network", "budget", "attack"):
        shown.add_column(heading)
    for heading in ("robust %", "reference", "points", "noise", "disagree", "fwd/image", "bwd/image", "CPU time"):
        shown.add_column(heading, justify="right")
    shown.add_column("bounds")
    before = None
    for row in rows:
        if before not in (None, (row.network, row.norm)):
            shown.add_section()
        before = (row.network, row.norm)
        shown.add_row(
            row.network,
            f"{row.norm} {row.eps:g}",
            row.attack,
            f"{row.robust_ours:.1f}",
            f"{row.robust_reference:.1f}",
            f"{row.difference:+.1f}",
            "" if math.isnan(row.noise) else f"{row.noise:.2f}",
            f"{row.only_ours:g}+{row.only_reference:g}",
            f"{row.forward_ours:.0f} / {row.forward_reference:.0f}",
            f"{row.backward_ours:.0f} / {row.backward_reference:.0f}",
            f"{duration(row.cpu_seconds_ours)} / {duration(row.cpu_seconds_reference)}",
            row.verdict,
            style="red" if row.broken else "",
        )
    return shown


def _check_header(path: Path) -> None:
    with open(path, encoding="utf-8", newline="") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS:
        raise FileError(
            f"{path} has other columns than this version writes: {', '.join(set(header) ^ set(COLUMNS))}. "
            "Records are never rewritten: name another file with --out."
        )

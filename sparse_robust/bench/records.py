"""The record of timings: a CSV file that is only ever added to, and the table made from it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_robust.errors import FileError

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Record:
    """One route of one case of an operation, timed on one machine. The fields are the columns of the file."""

    time: str
    """UTC, ISO 8601; the same for all records of one run."""
    operation: str
    case: str
    route: str
    device: str
    samples: int
    calls: int
    """Calls in a sample; the times below are of one call."""
    median_s: float
    q20_s: float
    q80_s: float
    relative: float
    """Median of this route divided by the median of the case's first route, which is ours."""
    per_second: float
    unit: str
    """What ``per_second`` counts."""
    gate: str
    """What was shown to hold before the timing."""
    load: float
    """Load average of the last minute when the case began: other work on the machine makes figures worthless."""
    cpu: str
    cores: int
    threads: int
    gpu: str
    system: str
    python: str
    torch: str
    triton: str
    timm: str
    version: str
    commit: str
    # Columns that came later; a file made before them has none of them, and keeps the columns that it has.
    cpu_s: float | None = None
    """Median of the CPU seconds of one call, all threads of the process together: under the time by the clock of one
    thread, the process had to wait for others."""
    memory_bytes: float | None = None
    """Bytes that one call needs at its peak, or leaves on the disk; the gate says which. None where not looked at."""


COLUMNS = tuple(field.name for field in fields(Record))
_REQUIRED = tuple(field.name for field in fields(Record) if field.default is MISSING)
_CONVERT = {"int": int, "float": float, "float | None": float, "str": str}


def append(path: str | Path, records: Iterable[Record]) -> None:
    """Add records to the end of a file, in one write; the file and its header are made if need be.

    What an older file has no column for is left out.

    Raises:
        FileError: if the file has other columns, or cannot be written.
    """
    path = Path(path)
    text = io.StringIO()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists() or path.stat().st_size == 0
        columns = COLUMNS if fresh else _header(path)
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(asdict(record) for record in records)
        with open(path, "a", encoding="utf-8", newline="") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot add to {path}: {error.strerror or error}. Name another file.") from error


def read(path: str | Path) -> list[Record]:
    """Read every record of a file, oldest first.

    Raises:
        FileError: if the file is missing, or is not such a record.
    """
    path = Path(path)
    if not path.exists():
        raise FileError(
            f"{path} does not exist. Records are added to a file by make bench, or sparse-robust bench --csv."
        )
    _header(path)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [_record(row) for row in rows]
    except (TypeError, ValueError) as error:
        raise FileError(f"{path} holds a line that is no record ({error}). Was the file edited?") from error


def last_run(records: Sequence[Record]) -> list[Record]:
    """Return the records of the latest run."""
    return [record for record in records if record.time == records[-1].time]


def table(records: Sequence[Record], title: str | None = None) -> Table:
    """Lay records out for a terminal: a row each, the routes of a case together."""
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for heading in ("operation", "case", "route"):
        shown.add_column(heading)
    for heading in ("median", "20 % .. 80 %", "CPU", "relative", "rate"):
        shown.add_column(heading, justify="right")
    before = None
    for record in records:
        case = (record.operation, record.case, record.device)
        if before not in (None, case):
            shown.add_section()
        names = (record.operation, f"{record.case} {record.device}") if before != case else ("", "")
        spread = f"{duration(record.q20_s)} .. {duration(record.q80_s)}"
        rate = f"{record.per_second:,.4g} {record.unit}/s"
        busy = "" if record.cpu_s is None else duration(record.cpu_s)
        shown.add_row(*names, record.route, duration(record.median_s), spread, busy, f"{record.relative:.2f}x", rate)
        before = case
    return shown


def duration(seconds: float) -> str:
    """Write a time with three significant digits and a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _record(row: dict[str, str]) -> Record:
    given = {f.name: f for f in fields(Record) if f.name in _REQUIRED or row.get(f.name)}
    return Record(**{name: _CONVERT[str(field.type)](row[name]) for name, field in given.items()})


def _header(path: Path) -> tuple[str, ...]:
    """Return the columns of a file, which are those of a record but for the ones that came later."""
    with open(path, encoding="utf-8", newline="") as file:
        header = tuple(next(csv.reader(file), ()))
    known = [column for column in COLUMNS if column in _REQUIRED or column in header]
    if list(header) != known:
        missing, extra = [c for c in _REQUIRED if c not in header], [c for c in header if c not in COLUMNS]
        raise FileError(
            f"{path} is not a record of this version: expected the columns {', '.join(COLUMNS)};"
            f" missing {', '.join(missing) or 'none'}, unknown {', '.join(extra) or 'none'}."
            " Records are never rewritten: name another file."
        )
    return header

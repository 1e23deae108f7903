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
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [_record(row) for row in csv.DictReader(file)]
    except OSError as error:
        raise _unreadable(path, error) from error
    except (TypeError, ValueError, csv.Error) as error:
        raise FileError(f"{path} holds a line that is no record ({error}). Was the file edited?") from error


def last_run(records: Sequence[Record]) -> list[Record]:
    """Return the records of the latest run."""
    return [record for record in records if record.time == records[-1].time]


def table(records: Sequence[Record], title: str | None = None, *, width: int = 120) -> Table:
    """Lay records out for a terminal of ``width`` columns: a row each, the routes of a case together under its name.

    Names fold where they have to and figures are never cut; under 110 columns, some of those take two lines.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    gap, padding = (" ", (0, 0, 0, 1)) if width >= 110 else ("\n", (0, 0, 0, 0))
    measured = any(record.memory_bytes is not None for record in records)
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=padding, pad_edge=False)
    shown.add_column("case and route", overflow="fold")
    for heading in ("median", f"20 % ..{gap}80 %", "CPU", "relative", "rate", *(["memory"] if measured else ())):
        shown.add_column(heading, justify="right", no_wrap=True)
    before = None
    for record in records:
        case = f"{record.operation}: {record.case}, {record.device}"
        if case != before:
            if before is not None:
                shown.add_section()
            shown.add_row(Text(case, style="bold"))
        figures = [
            duration(record.median_s), _spread(record.q20_s, record.q80_s, gap),
            "" if record.cpu_s is None else duration(record.cpu_s), f"{record.relative:.2f}x",
            rate(record.per_second, record.unit, gap), "" if record.memory_bytes is None else size(record.memory_bytes),
        ]  # fmt: skip
        shown.add_row(Text(f"  {record.route}"), *figures[: len(shown.columns) - 1])
        before = case
    return shown


def duration(seconds: float) -> str:
    """Write a time with three significant digits and a fitting unit."""
    scale, unit = _time_unit(seconds)
    return f"{_digits(seconds / scale)} {unit}"


def rate(per_second: float, unit: str, gap: str = " ") -> str:
    """Write a throughput: bytes and what goes beyond a million with an SI prefix; ``gap`` stands before a unit."""
    if unit == "B":
        return f"{size(per_second)}/s"
    number = _prefixed(per_second) if per_second >= 1e6 else _digits(per_second)
    return f"{number.strip()}{gap}{unit}/s"


def size(number: float) -> str:
    """Write a number of bytes with three significant digits and an SI prefix."""
    return f"{_prefixed(number)}B"


def _prefixed(value: float) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{_digits(value / scale)} {prefix}"
    return f"{_digits(value)} "


def _digits(value: float) -> str:
    """Write three significant digits, or all of those before the point; never an exponent for what is large."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def _spread(low: float, high: float, gap: str) -> str:
    scale, unit = _time_unit(high)
    return f"{_digits(low / scale)} ..{gap}{_digits(high / scale)} {unit}"


def _time_unit(seconds: float) -> tuple[float, str]:
    units = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
    return next((each for each in units if seconds >= each[0]), units[-1])


def _record(row: dict[str, str]) -> Record:
    given = {f.name: f for f in fields(Record) if f.name in _REQUIRED or row.get(f.name)}
    return Record(**{name: _CONVERT[str(field.type)](row[name]) for name, field in given.items()})


def _header(path: Path) -> tuple[str, ...]:
    """Return the columns of a file, which are those of a record but for the ones that came later."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            header = tuple(next(csv.reader(file), ()))
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, csv.Error) as error:  # no UTF-8, or a picture
        raise FileError(f"{path} is no CSV file ({error}). Name another file.") from error
    known = [column for column in COLUMNS if column in _REQUIRED or column in header]
    if list(header) != known:
        missing, extra = [c for c in _REQUIRED if c not in header], [c for c in header if c not in COLUMNS]
        raise FileError(
            f"{path} is not a record of this version: expected the columns {', '.join(COLUMNS)};"
            f" missing {', '.join(missing) or 'none'}, unknown {', '.join(extra) or 'none'}."
            " Records are never rewritten: name another file."
        )
    return header


def _unreadable(path: Path, error: OSError) -> FileError:
    return FileError(f"cannot read {path}: {error.strerror or error}. Name a record file.")

"""What the project says of its speed, as bounds on recorded figures: each holds, fails, or was not measured."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparse_robust.bench.records import Record

if TYPE_CHECKING:
    from rich.table import Table

HOLDS, FAILS, NOT_MEASURED = "holds", "FAILS", "not measured"


@dataclass(frozen=True)
class Figure:
    """A column of the latest record of a route."""

    operation: str
    case: str
    """How the name of the case begins; the last such case of a run counts, which is the largest."""
    route: str
    column: str = "median_s"

    def find(self, records: Sequence[Record], device: str) -> float | None:
        """Return its value; None if there is no such record, or nothing in that column."""
        for record in reversed(records):
            found = (record.device, record.operation, record.route)
            if found == (device, self.operation, self.route) and record.case.startswith(self.case):
                value = getattr(record, self.column)
                return None if value is None else float(value)
        return None


@dataclass(frozen=True)
class Claim:
    """``top / bottom * scale``, and where it has to lie. With no bound it is only reported."""

    device: str
    text: str
    top: Figure
    bottom: Figure | None = None
    at_most: float | None = None
    at_least: float | None = None
    scale: float = 1.0
    form: str = "{:.2f}x"

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations whose records it reads."""
        return tuple(figure.operation for figure in (self.top, self.bottom) if figure is not None)

    def in_cpu_time(self, records: Sequence[Record]) -> float | None:
        """Return the value in CPU time, which other work on the machine touches less; None for what is no time."""
        timed = self.top.column == "median_s" and (self.bottom is None or self.bottom.column == "median_s")
        if not timed or self.device != "cpu":
            return None
        bottom = None if self.bottom is None else replace(self.bottom, column="cpu_s")
        return replace(self, top=replace(self.top, column="cpu_s"), bottom=bottom).value(records)

    def value(self, records: Sequence[Record]) -> float | None:
        """Return what was measured; None if a part of it was not."""
        top = self.top.find(records, self.device)
        bottom = 1.0 if self.bottom is None else self.bottom.find(records, self.device)
        return None if top is None or not bottom else self.scale * top / bottom

    def verdict(self, records: Sequence[Record]) -> str:
        """Return `HOLDS`, `FAILS`, `NOT_MEASURED`, or an empty text for what has no bound."""
        value = self.value(records)
        if value is None:
            return NOT_MEASURED
        checks: tuple[tuple[float | None, Callable[[float, float], bool]], ...] = (
            (self.at_most, operator.le),
            (self.at_least, operator.ge),
        )
        bounds = [within(value, bound) for bound, within in checks if bound is not None]
        return "" if not bounds else HOLDS if all(bounds) else FAILS

    @property
    def bound(self) -> str:
        """The bounds as text."""
        words = (("at most", self.at_most), ("at least", self.at_least))
        return ", ".join(f"{word} {self.form.format(value)}" for word, value in words if value is not None) or "-"


def verdicts(claims: Iterable[Claim], records: Sequence[Record]) -> list[tuple[Claim, float | None, str]]:
    """Return each claim with what was measured of it and its verdict."""
    return [(claim, claim.value(records), claim.verdict(records)) for claim in claims]


def claim_table(claims: Iterable[Claim], records: Sequence[Record]) -> Table:
    """Lay the verdicts out for a terminal."""
    from rich.table import Table

    shown = Table(title="What is claimed", title_justify="left")
    for heading in ("claim", "bound", "measured", "in CPU time", "verdict"):
        shown.add_column(heading, justify="left" if heading in ("claim", "verdict") else "right")
    for claim, value, verdict in verdicts(claims, records):
        style = {FAILS: "bold red", NOT_MEASURED: "yellow"}.get(verdict, "")
        measured, busy = ("-" if v is None else claim.form.format(v) for v in (value, claim.in_cpu_time(records)))
        shown.add_row(claim.text, claim.bound, measured, busy, verdict, style=style)
    return shown

"""What became of every name of a weights file, as a value and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ImportReport:
    """What became of every name.

    Fields:
        matched: names of the model that were filled from the file.
        ignored: names of the file that were dropped on purpose: a wrapper's parts, and values that are no tensors.
        missing: names of the model that the file lacks and may lack: batch-norm counters, an allowed new head.
        mismatched: names of the model that kept their values because the file's shape differs, where that was allowed.
        unknown: names of the file that the model does not have; only where the file was refused.
        allowed: names of the model that were allowed to keep their values, whatever the file holds for them.
        masks: what the file says is kept, where it holds masks or scores; the weights were loaded masked.
        normalization: (mean, std) of the file's own normaliser, which the model now uses.
    """

    matched: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    masks: Masks | None = None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    def __str__(self) -> str:
        parts = ["matched", "ignored", "missing", "mismatched", *(["unknown"] if self.unknown else [])]
        return "; ".join(f"{part} {some(getattr(self, part))}" for part in parts)

    def table(self, title: str | None = None) -> Table:
        """Return a table for a terminal: how many tensors went which way, the first names of each, and why."""
        from rich.table import Column, Table

        table = Table("tensors", Column("number", justify="right"), "names", title=title, title_justify="left")
        for part, meaning in _MEANINGS.items():
            names = getattr(self, part)
            if names or part == "matched":
                table.add_row(f"{part}: {meaning}", str(len(names)), some(names).partition(" ")[2].strip("()"))
        return table


_MEANINGS = {
    "matched": "fit the model",
    "ignored": "a wrapper's, or no weights",
    "missing": "not in the file",
    "mismatched": "of another shape or kind",
    "unknown": "not in the model",
}


class CheckpointMismatch(UsageError):
    """A weights file that does not fit a model; ``report`` says which names do and which do not."""

    def __init__(self, message: str, report: ImportReport) -> None:
        super().__init__(message)
        self.report = report


def some(names: tuple[str, ...], limit: int = 5) -> str:
    """Return the count and the first names."""
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"{len(names)}" + (f" ({shown})" if names else "")

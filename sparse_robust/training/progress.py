"""Progress on the main process: a bar with ETA on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Task:
    """One row of the display. ``advance`` is cheap enough to be called at every optimizer step."""

    def __init__(self, owner: ProgressReporter, name: str, total: int) -> None:
        self._owner, self.name, self.total, self.done = owner, name, total, 0
        self._row: TaskID | None = owner.bars.add_task(name, total=total, info="") if owner.bars is not None else None

    def advance(self, steps: int = 1, info: str = "") -> None:
        """Move on by ``steps``; ``info`` stands behind the bar."""
        self.done += steps
        if self._owner.bars is not None and self._row is not None:
            self._owner.bars.advance(self._row, steps)
            if info:
                self._owner.bars.update(self._row, info=info)

    def close(self) -> None:
        """Take the row off the display."""
        if self._owner.bars is not None and self._row is not None:
            self._owner.bars.remove_task(self._row)
            self._row = None


class ProgressReporter:
    """A context in which tasks can be shown. Silent when ``enabled`` is false (other ranks, library use).

    Bars are drawn on a terminal only; elsewhere `say` writes plain lines with the elapsed time.
    """

    def __init__(self, enabled: bool = True, bars: bool | None = None) -> None:
        self.enabled = enabled
        self.console = Console(stderr=True, soft_wrap=True)
        show = enabled and (sys.stderr.isatty() if bars is None else bars)
        self.bars: Progress | None = None
        if show:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[info]}", style="dim"),
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
        self._start = time.monotonic()

    def __enter__(self) -> ProgressReporter:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def task(self, name: str, total: int) -> Task:
        """Add a row that counts to ``total``."""
        return Task(self, name, total)

    def say(self, text: str) -> None:
        """Write a line above the bars, with the time since the start."""
        if self.enabled:
            seconds = time.monotonic() - self._start
            self.console.print(f"[dim]{seconds // 60:3.0f}:{seconds % 60:02.0f}[/dim]  {text}", highlight=False)


SILENT = ProgressReporter(enabled=False)

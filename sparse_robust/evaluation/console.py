"""How an evaluation goes and what came of it, for a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import Tensor

from sparse_robust.attacks.norms import NORMS
from sparse_robust.errors import unknown
from sparse_robust.evaluation.record import Evaluated, eps_text, robust_at
from sparse_robust.evaluation.verdicts import CLEAN_WRONG, UNBROKEN, Verdicts


class State(Protocol):
    """What the display needs of `evaluate`'s progress; the fields are explained there."""

    @property
    def stage(self) -> str: ...
    @property
    def images(self) -> int: ...
    @property
    def total(self) -> int | None: ...
    @property
    def seen(self) -> int: ...
    @property
    def clean_correct(self) -> int: ...
    @property
    def robust(self) -> int: ...
    @property
    def share(self) -> float | None: ...


class EvaluationProgress:
    """Shows how far an evaluation is: ``with EvaluationProgress() as shown: evaluate(..., on_progress=shown)``.

    A bar with an estimate of the time left on a terminal; elsewhere a line at most every ``seconds``. The robust
    accuracy shown counts images that are still under attack as robust, so it falls to its final value. The time left
    follows from the share of the work that is done, not from the number of images: fooled ones are finished first.

    Args:
        enabled: False shows nothing: for all ranks but the first.
        bars: draw a bar; None does so on a terminal.
        seconds: shortest time between two lines.
        console: where to; None is standard error.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        enabled: bool = True,
        *,
        bars: bool | None = None,
        seconds: float = 30.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._enabled, self._seconds, self._clock = enabled, seconds, clock
        self._begun = self._said = clock()
        self._last: State | None = None
        self._shown: State | None = None  # in a line
        self._bars: Progress | None = None
        if enabled and (sys.stderr.isatty() if bars is None else bars):
            columns = (
                TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[images]}"),
                TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[info]}", style="dim"),
            )  # fmt: skip
            self._bars = Progress(*columns, console=self._console, transient=True, refresh_per_second=4)
            self._row = self._bars.add_task("clean", total=None, images="", info="")

    def __enter__(self) -> EvaluationProgress:
        self._begun = self._said = self._clock()
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        if self._enabled and self._last is not None and self._last is not self._shown:
            self._say(self._last)

    def __call__(self, state: State) -> None:
        """Show where the evaluation is now; cheap enough for every batch."""
        self._last = state
        if self._bars is not None:
            self._bars.update(
                self._row, description=state.stage, total=None if state.share is None else 1.0,
                completed=state.share or 0.0, images=_count(state), info=_accuracies(state),
            )  # fmt: skip
        elif self._enabled and self._clock() - self._said >= self._seconds:
            self._say(state)

    def _say(self, state: State) -> None:
        self._said, self._shown = self._clock(), state
        gone = self._said - self._begun
        line = f"{_count(state)} images, {_accuracies(state)}, {state.stage}, {_minutes(gone)} gone"
        if state.share and state.images != state.total:
            line += f", about {_minutes(gone * (1 - state.share) / state.share)} left"
        self._console.print(line, highlight=False, markup=False)


def evaluation_table(evaluation: Evaluated, *, norm: str = "Linf", title: str | None = None) -> Table:
    """Lay an evaluation out: without attacks, after each stage, in total.

    ``broken`` counts the images that a stage fooled, and the columns after it are of those: the median number of images
    that the attack had shown the model before, the median size of the perturbation, and the mean numbers of forward and
    backward passes an image had taken until it broke, over all stages. The caption has what an image cost, broken or
    not: verdicts do not tell how that divides among the stages.

    Args:
        norm: in which sizes are given.

    Raises:
        UsageError: for an unknown norm.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    rows = evaluation.per_image
    title = title or f"{len(rows):,} images"
    table = Table(title=title, title_justify="left", caption=_caption(evaluation), caption_justify="left")
    for heading in ("attack", "eps"):
        table.add_column(heading, overflow="fold")
    for heading in ("accuracy", "broken", "step", f"{norm}\nsize", "forward\nto break", "backward\nto break"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(*_row("none", "", evaluation.clean, rows.select(rows.broken_by == CLEAN_WRONG), norm))
    for index, ((name, eps), robust) in enumerate(zip(evaluation.stages, evaluation.robust_after, strict=True)):
        table.add_row(*_row(name, eps_text(eps), robust, rows.select(rows.broken_by == index), norm))
    table.add_section()
    broken = rows.select(rows.broken_by != UNBROKEN)
    table.add_row(*_row("all", "", evaluation.robust, broken, norm), style="bold")
    return table


def curve_table(evaluation: Evaluated, title: str | None = None) -> Table:
    """Lay out the robust accuracy for every radius, from the clean accuracy (radius 0) on."""
    table = Table(title=title, title_justify="left")
    table.add_column("eps")
    table.add_column("robust accuracy", justify="right")
    table.add_column("", no_wrap=True)
    curve = robust_at(evaluation)
    for eps, robust in (curve if 0.0 in curve else {0.0: evaluation.clean, **curve}).items():
        table.add_row(eps_text(eps), _percent(robust), "█" * round(40 * robust))
    return table


def _row(name: str, eps: str, accuracy: float, ended: Verdicts, norm: str) -> tuple[str, ...]:
    fooled = ended.select(ended.broken_by >= 0)
    size = getattr(fooled, norm.lower())
    return (
        name, eps, _percent(accuracy), f"{len(ended):,}", _median(fooled.step, ",.0f"), _median(size, ".4g"),
        _mean(ended.forward), _mean(ended.backward),
    )  # fmt: skip


def _caption(evaluation: Evaluated) -> str | None:
    if not evaluation.stages:
        return None
    images = max(len(evaluation.per_image), 1)
    forward, backward, queries = (evaluation.counts[name] / images for name in ("forward", "backward", "queries"))
    said = (
        "step, size: medians over the images a stage broke; passes to break: means over them, all stages until then.\n"
        f"Broken or not, an image took {forward:,.1f} forward passes ({queries:,.1f} without a gradient) and "
        f"{backward:,.1f} backward."
    )
    candidates, rejected = evaluation.flips.get("candidates", 0), evaluation.flips.get("rejected", 0)
    if candidates:
        found = "1 image" if candidates == 1 else f"{candidates:,} images"
        said += f"\n{found} fooled the copy that attacks work on; rejected by the model itself: {rejected:,}."
    return said


def _count(state: State) -> str:
    return f"{state.images:,}" if state.total is None else f"{state.images:,} of {state.total:,}"


def _accuracies(state: State) -> str:
    seen = max(state.seen, 1)
    return f"clean {_percent(state.clean_correct / seen)}, robust so far {_percent(state.robust / seen)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _median(values: Tensor, form: str) -> str:
    return format(float(values.double().quantile(0.5)), form) if len(values) else "-"


def _mean(values: Tensor) -> str:
    if not len(values):
        return "-"
    mean = float(values.to(torch.float64).mean())
    return f"{mean:,.1f}" if mean < 1000 else f"{mean:,.0f}"


def _minutes(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"

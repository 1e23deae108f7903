"""Pictures of the record, drawn from its file alone: how each operation went over time, and each route beside ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_robust.bench.records import Record, duration, read
from sparse_robust.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; ours is the first.
COLOURS = ("#0072b2", "#e08a00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#5b5b5b")
MARKERS = "osD^vPX"
COLUMNS = 3  # of small pictures in the history
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}

Key = tuple[str, str]


def plot(csv: str | Path, folder: str | Path, operations: Sequence[str] = ()) -> list[Path]:
    """Draw what a record file holds, for each machine in it: two pictures, or none where there is nothing to draw.

    ``history-*.png``: the median time of every route, run by run, with 20 % and 80 % quantiles, a panel for each case.
    ``ratios-*.png``: the latest time of every rival over that of our route, with the quantiles of both as whiskers.

    Args:
        operations: what to draw; all that the file holds if none is named.

    Returns:
        The files written, into ``folder``, which is made if need be.

    Raises:
        FileError: as `read`, or if the folder takes no files.
    """
    records = [record for record in read(csv) if not operations or record.operation in operations]
    folder = Path(folder)
    machines: dict[str, list[Record]] = {}
    for record in records:
        machines.setdefault(machine_name(record), []).append(record)
    written = []
    for name, mine in machines.items():
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        for kind, draw in (("history", draw_history), ("ratios", draw_ratios)):
            with _drawing():
                figure = draw(mine, name)
            if figure is not None:
                path = folder / f"{kind}-{slug}.png"
                atomic_write(path, partial(figure.savefig, format="png", dpi=110, metadata={"Software": None}))
                written.append(path)
    return written


def machine_name(record: Record) -> str:
    """Return the hardware and the number of threads: times of one name may be compared."""
    where = record.gpu if record.device == "cuda" else f"{record.cpu}, {record.cores} cores"
    return f"{where}, {record.threads} thread{'s' if record.threads > 1 else ''}" if record.device == "cpu" else where


def draw_history(records: Sequence[Record], machine: str) -> Figure | None:
    """Return a panel for each case: median seconds of each route, run by run."""
    panels = _by_case(records)
    if not panels:
        return None
    rows = -(-len(panels) // COLUMNS)
    figure = _figure(4.6 * COLUMNS, 3.3 * rows + 0.6)
    for index, (key, mine) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, COLUMNS, index + 1)
        times = sorted({record.time for record in mine})
        for place, route in enumerate(dict.fromkeys(record.route for record in mine)):
            shown = [record for record in mine if record.route == route]
            at = [times.index(record.time) for record in shown]
            axes.errorbar(
                at,
                [record.median_s for record in shown],
                yerr=_whiskers([(record.q20_s, record.median_s, record.q80_s) for record in shown]),
                label=route, color=COLOURS[place % len(COLOURS)], marker=MARKERS[place % len(MARKERS)],
                markersize=4, capsize=2, linewidth=1.2,
            )  # fmt: skip
        if max(record.q80_s for record in mine) > 4 * min(record.q20_s for record in mine):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(lambda value, _: duration(value) if f"{value:.0e}"[0] in "235" else "")
        axes.yaxis.set_major_formatter(lambda value, _: duration(value))
        axes.tick_params(axis="y", which="both", labelsize=7)
        axes.set_title("\n".join(key))
        axes.set_ylabel("time of a call")
        axes.set_xlim(-0.4, len(times) - 0.6)
        _label_runs(axes, times, {record.time: record.commit for record in mine})
        axes.legend(fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.2))
    figure.suptitle(f"{machine}: median time of each run, with 20 % and 80 % quantiles")
    return figure


def draw_ratios(records: Sequence[Record], machine: str) -> Figure | None:
    """Return bars: time of each rival / time of our route, in the latest run of each case."""
    bars: list[tuple[str, str, float, float, float]] = []
    for (operation, case), mine in _by_case(records).items():
        latest = [record for record in mine if record.time == mine[-1].time]
        ours = latest[0]
        for record in latest[1:]:
            low, high = record.q20_s / ours.q80_s, record.q80_s / ours.q20_s
            label = f"{operation}: {case}\n{record.route} / {ours.route}"
            bars.append((label, record.route, low, record.median_s / ours.median_s, high))
    if not bars:
        return None
    figure = _figure(9.5, 0.5 * len(bars) + 1.6)
    axes = figure.add_subplot()
    at = list(range(len(bars)))[::-1]
    ratios = [ratio for *_, ratio, _ in bars]
    colours = [COLOURS[0] if ratio >= 1 else COLOURS[1] for ratio in ratios]
    axes.barh(at, [ratio - 1 for ratio in ratios], left=1, height=0.62, color=colours)
    whiskers = _whiskers([(low, ratio, high) for *_, low, ratio, high in bars])
    axes.errorbar(ratios, at, xerr=whiskers, fmt="none", ecolor="#333333", capsize=2.5, linewidth=1)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.set_xscale("log")
    axes.set_yticks(at, [label for label, *_ in bars], fontsize=7.5)
    axes.set_xlabel("time of the rival / time of ours (above 1: ours is faster); whiskers from quantiles of both")
    highest = max(high for *_, high in bars)
    lowest = min(low for *_, low, _, _ in bars)
    axes.set_xlim(min(lowest, 0.8) * 0.92, max(highest, 1.25) * 1.35)
    for place, (*_, ratio, high) in zip(at, bars, strict=True):
        axes.text(max(high, 1) * 1.04, place, f"{ratio:.2f}x", va="center", fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (0.5, 2, 3, 5, 20, 50) else "")
    figure.suptitle(f"{machine}: latest run of each case")
    return figure


def _by_case(records: Sequence[Record]) -> dict[Key, list[Record]]:
    found: dict[Key, list[Record]] = {}
    for record in records:
        found.setdefault((record.operation, record.case), []).append(record)
    return found


def _whiskers(quantiles: Sequence[tuple[float, float, float]]) -> list[list[float]]:
    """Return what matplotlib wants: distances below and above."""
    return [[max(mid - low, 0) for low, mid, _ in quantiles], [max(high - mid, 0) for _, mid, high in quantiles]]


def _label_runs(axes: Axes, times: Sequence[str], commits: dict[str, str]) -> None:
    """Name the runs by day, hour and commit; of many, some."""
    every = -(-len(times) // 6)
    shown = list(range(0, len(times), every))
    names = [f"{datetime.fromisoformat(times[i]):%m-%d %H:%M}\n{commits[times[i]][:7]}" for i in shown]
    axes.set_xticks(shown, names, fontsize=7)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _drawing() -> Iterator[None]:
    import matplotlib.style

    style: Any = ["default", _STYLE]
    with matplotlib.style.context(style):
        yield

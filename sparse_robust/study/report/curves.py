"""Pictures of curves and bars: accuracy against sparsity, overlap against sparsity, time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparse_robust.study.report.style import FAINT, INK, MORE_COLOURS, Picture, bare, colour, line, picture
from sparse_robust.study.report.words import duration, finder_name, plural, regime_name

METRICS = {"sa": "clean accuracy (SA)", "ra": "robust accuracy (RA)"}


def position(sparsity: float) -> float:
    """Return the place of a sparsity (percent) on the axis: the number of cuts of 20 % that lead to it."""
    return math.log(max(1 - sparsity / 100, 1e-9)) / math.log(0.8)


def accuracy_curves(report: dict[str, Any]) -> Picture | None:
    """Draw the main picture: the main finder's tickets and random masks for every pre-training."""
    shown = ["dense", *report["shown_finders"]]
    series = [s for s in report["curves"] if s["finder"] in shown]
    spread = "bands and bars ± one standard deviation" if report["seeds"] > 1 else "single seed, so no error bars"
    caption = (
        "Accuracy after transfer against the share of weights removed; colours are pre-trainings, thin horizontal "
        f"lines their dense models ({spread}): a curve that stays on its line loses nothing, the colour on top wins."
    )
    return _grid(report, series, report["thetas"], "accuracy", "Accuracy against sparsity", caption)


def finder_curves(report: dict[str, Any]) -> Picture | None:
    """Draw all finders for the pre-training whose dense model is most robust, where there are more than two."""
    if len(report["finders"]) <= len(report["shown_finders"]):
        return None
    theta = max(report["thetas"], key=lambda t: _dense_robustness(report, t))
    series = [s for s in report["curves"] if s["theta"] == theta]
    caption = f"All ways to find a mask, from {theta} pre-training, which has the most robust dense models."
    return _grid(report, series, [theta], "finders", "Ways to find a mask", caption)


def _dense_robustness(report: dict[str, Any], theta: str) -> float:
    dense = [p for s in report["curves"] if (s["theta"], s["finder"]) == (theta, "dense") for p in s["points"]]
    values = [p["ra"]["mean"] for p in dense if p["ra"]]
    return sum(values) / len(values) if values else -1.0


def _grid(
    report: dict[str, Any], series: Sequence[dict[str, Any]], thetas: list[str], name: str, title: str, caption: str
) -> Picture | None:
    """Draw one row a target and fraction, one column a regime and metric."""
    if not series:
        return None
    places = report["places"]
    columns = [(regime, metric) for regime in report["regimes"] for metric in METRICS]
    figure = Figure(figsize=(1.2 + 3.15 * len(columns), 1.2 + 2.75 * len(places)), layout="constrained")
    grid = figure.subplots(len(places), len(columns), squeeze=False, sharex="row")
    for row, place in enumerate(places):
        here = [s for s in series if (s["target"], s["fraction"]) == (place["target"], place["fraction"])]
        for column, (regime, metric) in enumerate(columns):
            axes = grid[row][column]
            _panel(axes, [s for s in here if s["regime"] == regime], metric, report["thetas"])
            _sparsity_axis(axes, [p["sparsity"] for s in here for p in s["points"]])
            if row == 0:
                axes.set_title(f"{regime_name(regime)}\n{METRICS[metric]}", linespacing=1.35, pad=9)
            if row == len(places) - 1:
                axes.set_xlabel("weights removed (%)")
        images = f"\n{place['train_images']:,} training images" if place["train_images"] else ""
        grid[row][0].set_ylabel(f"{place['name']}{images}\n\naccuracy (%)", linespacing=1.3)
    _legend(figure, report, thetas, series)
    figure.supxlabel(_basis(report), fontsize=9, color=FAINT, x=0.995, ha="right")
    return picture(figure, name, title, caption)


def _basis(report: dict[str, Any]) -> str:
    """Say in the picture itself what its numbers rest on."""
    sizes = sorted({p["test_images"] for p in report["places"] if p["test_images"]})
    images = f", {' or '.join(f'{s:,}' for s in sizes)} test images" if sizes else ""
    spread = "error bars and bands: ± one standard deviation" if report["seeds"] > 1 else "no error bars"
    return f"{report['seeds_label']}, {spread}{images}"


def _panel(axes: Axes, series: Sequence[dict[str, Any]], metric: str, thetas: list[str]) -> None:
    means = []
    for one in series:
        points = [p for p in one["points"] if p[metric]]
        hue = colour(one["theta"], thetas)
        dense = next((s for s in series if s["theta"] == one["theta"] and s["finder"] == "dense"), None)
        start = [p for p in dense["points"] if p[metric]] if dense else []
        means += [p[metric]["mean"] for p in points]
        if one["finder"] == "dense":
            for point in points:
                mean, std = point[metric]["mean"], point[metric]["std"] or 0.0
                axes.axhspan(mean - std, mean + std, color=hue, alpha=0.13, linewidth=0)
                axes.axhline(mean, color=hue, linewidth=1.0, alpha=0.75, zorder=1)
            continue
        shown = start + points
        style, marker, method_width = line(one["method"], one["variant"])
        axes.errorbar(
            [position(p["sparsity"]) for p in shown],
            [p[metric]["mean"] for p in shown],
            yerr=[p[metric]["std"] or 0.0 for p in shown] if any(p[metric]["std"] for p in shown) else None,
            color=hue, linestyle=style, marker=marker, linewidth=method_width, capsize=2.5, elinewidth=1.1,
            markeredgewidth=1.4, zorder=3 if one["method"] != "random" else 2,
        )  # fmt: skip
    if means:
        low, high = min(means), max(means)
        slack = max(0.08 * (high - low), (12 - (high - low)) / 2, 1.0)
        axes.set_ylim(max(low - slack, -3.0), min(high + slack, 103.0))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))


def _sparsity_axis(axes: Axes, sparsities: Sequence[float]) -> None:
    """Label the rounds that were run, leaving out labels that would touch."""
    ladder = sorted({round(s, 2) for s in sparsities if s > 0})
    places = [position(s) for s in ladder]
    last = max(places, default=1.0)
    axes.set_xlim(-0.05 * last, 1.05 * last)
    gap, kept = last / 6.5, [(0.0, "0")]
    for place, sparsity in zip(places, ladder, strict=True):
        room = place - kept[-1][0] >= gap and (last - place >= gap or place == last)
        if room:
            kept.append((place, f"{sparsity:.1f}"))
    axes.set_xticks([k[0] for k in kept], [k[1] for k in kept])


def _legend(figure: Figure, report: dict[str, Any], thetas: list[str], series: Sequence[dict[str, Any]]) -> None:
    drawn = {s["finder"] for s in series}
    handles = [
        Line2D([], [], color=colour(t, report["thetas"]), linewidth=5, label=f"{t} pre-training") for t in thetas
    ]
    for finder in report["finders"]:
        if finder["finder"] in drawn:
            style, marker, width = line(finder["method"], finder["variant"])
            label = finder_name(finder["finder"])
            handles.append(Line2D([], [], color=INK, linestyle=style, marker=marker, linewidth=width, label=label))
    handles.append(Line2D([], [], color=INK, linewidth=1.0, alpha=0.75, label="dense model"))
    width = figure.get_size_inches()[0]
    ncols = min(len(handles), max(2, int(width / 2.1)))
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols, handlelength=3.4, columnspacing=1.6)


def overlap_curves(report: dict[str, Any]) -> Picture | None:
    """Draw IoU against sparsity for the tickets of every two pre-trainings, with both chance levels."""
    finder = report["main_finder"]
    pairs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for o in report["overlaps"]:
        if o["a"][1] == o["b"][1] == finder and o["a"][0] != o["b"][0]:
            pairs.setdefault((o["a"][0], o["b"][0]), []).append(o)
    if not pairs:
        return None
    ladder = {t["k"]: t["sparsity"] for t in report["densities"] if t["finder"] == finder}
    figure = Figure(figsize=(8.2, 3.9), layout="constrained")
    axes = figure.subplots()
    for index, (pair, rows) in enumerate(pairs.items()):
        xs = [position(ladder[o["k"]]) for o in rows]
        axes.plot(xs, [o["iou"] for o in rows], "o-", color=MORE_COLOURS[index % 4], label=f"{pair[0]} and {pair[1]}")
    chance = next(iter(pairs.values()))
    xs = [position(ladder[o["k"]]) for o in chance]
    layered = [o["chance_same_layer_densities"] for o in chance]
    axes.plot(xs, layered, linestyle=(0, (5, 2)), color=FAINT, label="chance, same layer densities")
    axes.plot(xs, [o["chance"] for o in chance], linestyle=(0, (1, 1.5)), color=INK, label="chance, d / (2 - d)")
    _sparsity_axis(axes, list(ladder.values()))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("weights removed (%)")
    axes.set_ylabel("intersection over union")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    caption = (
        f"How much the {finder_name(finder)} tickets of two pre-trainings share (intersection over union of the kept "
        "weights) against the chance levels: above both lines the tickets agree on single weights, not only on layers."
    )
    return picture(figure, "overlap-curves", "What tickets of different pre-trainings share", caption)


def time_bars(report: dict[str, Any]) -> Picture | None:
    """Draw the time of each stage, split by pre-training, with the machine below."""
    stages = report["time"]["stages"]
    if not stages:
        return None
    names = list(dict.fromkeys(s["stage"] for s in stages))
    figure = Figure(figsize=(9.6, 0.9 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    total = max(sum(s["seconds"] for s in stages if s["stage"] == n) for n in names) or 1.0
    for row, name in enumerate(names):
        left = 0.0
        mine = [s for s in stages if s["stage"] == name]
        for part in mine:
            axes.barh(row, part["seconds"], left=left, height=0.62, color=colour(part["theta"], report["thetas"]))
            if part["seconds"] > 0.04 * total:
                middle = left + part["seconds"] / 2
                axes.text(
                    middle, row, part["theta"], ha="center", va="center", color="white", fontweight="bold", fontsize=9
                )
            left += part["seconds"]
        cells = plural(sum(s["cells"] for s in mine), "cell")
        axes.text(left + 0.01 * total, row, f"{duration(left)}, {cells}", va="center", color=INK)
    bare(axes)
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.28 * total)
    machine = textwrap.fill(machine_line(report["machine"]), 125)
    if machine:
        axes.set_xlabel(machine, fontsize=9, color=FAINT, loc="left")
    caption = f"Where the compute time went: {report['time']['text']} in all finished cells together."
    return picture(figure, "time", "Time", caption)


def machine_line(machine: dict[str, Any]) -> str:
    """Return hardware and versions as one line of text; empty entries are left out."""
    known = {key: value for key, value in machine.items() if value and not isinstance(value, dict | list)}
    hardware = [str(known.pop(key)) for key in ("cpu", "gpu") if key in known]
    counts = [plural(int(known.pop(key)), key.removesuffix("s")) for key in ("cores", "threads") if key in known]
    system = [str(known.pop(key)) for key in ("system",) if key in known]
    versions = [f"{'sparse-robust' if key == 'version' else key} {value}" for key, value in known.items()]
    return " · ".join([*hardware, *counts, *system, *versions])

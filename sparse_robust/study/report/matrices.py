"""Pictures made of cells: who wins in which round, where the weights are left, which masks are alike."""

from __future__ import annotations

import math
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import Colormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from sparse_robust.study.compare import signed
from sparse_robust.study.overlap import THIN
from sparse_robust.study.report.style import (
    DEEP_LOSS,
    FAINT,
    INK,
    LOSS,
    OPEN,
    WIN,
    Picture,
    bare,
    colour,
    ink_on,
    picture,
)
from sparse_robust.study.report.words import finder_name

_LONG = 28  # layers; from here on the cells of the density map carry no text


def win_matrix(report: dict[str, Any]) -> Picture | None:
    """Draw, for every target, finders and pre-trainings against rounds: win, loss with its shortfall, or open."""
    table = [row for row in report["double_win"] if row["finder"] in report["shown_finders"]]
    if not table:
        return None
    rounds = sorted({r["k"] for row in table for r in row["rounds"]})
    places = [p for p in report["places"] if any(_here(row, p) for row in table)]
    blocks = [[row for row in table if _here(row, place)] for place in places]
    heights = [0.95 + 0.44 * len(block) for block in blocks]
    figure = Figure(figsize=(max(2.9 + 0.92 * (len(rounds) + 2.4), 8.0), 0.75 + sum(heights)), layout="constrained")
    grid = figure.subplots(len(blocks), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, place, block in zip(grid[:, 0], places, blocks, strict=True):
        _win_block(axes, block, rounds, report)
        axes.set_title(place["name"], loc="left", fontweight="bold", pad=24)
    figure.suptitle(
        f"{report['criterion']['label']} · {report['seeds_label']}", x=0.01, ha="left", fontsize=9, color=FAINT
    )
    handles = [
        Patch(color=WIN, label="wins"),
        Patch(color=_loss(-5.0), label="loses: largest shortfall in points (≈ within 2 standard errors)"),
        Patch(facecolor=OPEN, hatch="////", edgecolor="#bbbbbb", label="not decided"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=9)
    return picture(figure, "double-win", "Who wins, and how sparse", report["criterion"]["sentence"])


def _here(row: dict[str, Any], place: dict[str, Any]) -> bool:
    return bool((row["target"], row["fraction"]) == (place["target"], place["fraction"]))


def _win_block(axes: Axes, block: list[dict[str, Any]], rounds: list[int], report: dict[str, Any]) -> None:
    sparsity = {r["k"]: r["sparsity"] for row in block for r in row["rounds"]}
    for y, row in enumerate(block):
        by_round = {r["k"]: r for r in row["rounds"]}
        for x, k in enumerate(rounds):
            if k in by_round:
                _win_cell(axes, x, y, by_round[k])
        for x, key in enumerate(("k_max", "k_contig")):
            k = row[key]
            text = "?" if k is None else f"{k}  ({sparsity[k]:.1f} %)" if k else "none"
            tone, weight = (INK, "bold") if k else (FAINT, "normal")
            place = (len(rounds) + 0.75 + 1.2 * x, y + 0.5)
            axes.text(*place, text, ha="center", va="center", fontweight=weight, color=tone, fontsize=9.5)
        hue = colour(row["theta"], report["thetas"])
        axes.text(-0.15, y + 0.5, row["theta"], ha="right", va="center", color=hue, fontweight="bold")
    for finder in dict.fromkeys(row["finder"] for row in block):
        ys = [y for y, row in enumerate(block) if row["finder"] == finder]
        axes.text(-1.0, sum(ys) / len(ys) + 0.5, finder_name(finder), ha="right", va="center", fontsize=10)
        axes.plot([-0.9, -0.9], [ys[0] + 0.1, ys[-1] + 0.9], color="#bbbbbb", linewidth=1.0)
    heads = [(x + 0.5, f"k = {k}", f"{sparsity[k]:.2f} %" if k in sparsity else "") for x, k in enumerate(rounds)]
    heads.append((len(rounds) + 0.75, "sparsest win", "k max"))
    heads.append((len(rounds) + 1.95, "unbroken to", "k contig"))
    for middle, upper, lower in heads:
        for height, text in ((-0.46, upper), (-0.16, lower)):
            axes.text(middle, height, text, ha="center", va="baseline", fontsize=8.8, color="#555555")
    axes.set_xlim(-2.6, len(rounds) + 2.7)
    axes.set_ylim(len(block), 0)
    axes.set_xticks([])
    axes.set_yticks([])
    bare(axes)


def _win_cell(axes: Axes, x: int, y: int, verdict: dict[str, Any]) -> None:
    wins = verdict["wins"]
    face = OPEN if wins is None else WIN if wins else _loss(verdict["worst_margin"])
    style: dict[str, Any] = {"hatch": "////", "edgecolor": "#bbbbbb"} if wins is None else {"edgecolor": "white"}
    axes.add_patch(Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, facecolor=face, linewidth=0, **style))
    text, second = "?", ""
    if wins is not None:
        near = "≈ " if verdict["near"] else ""
        text = "wins" if wins else near + signed(verdict["worst_margin"])
        second = "" if wins else str(verdict["worst"])
    middle, tone = x + 0.5, ink_on(face)
    place = (middle, y + (0.36 if second else 0.5))
    axes.text(*place, text, ha="center", va="center", color=tone, fontweight="bold" if wins else "normal", fontsize=10)
    axes.text(middle, y + 0.75, second, ha="center", va="center", color=tone, fontsize=7.4, alpha=0.75)


def _loss(margin: float) -> tuple[float, float, float, float]:
    """Return a colour for a loss: pale sand for a small one, deep orange from 15 points on."""
    share = min(abs(margin) / 15, 1.0) ** 0.7
    low, high = to_rgba(LOSS), to_rgba(DEEP_LOSS)
    mixed = [a + share * (b - a) for a, b in zip(low, high, strict=True)]
    return (mixed[0], mixed[1], mixed[2], mixed[3])


def density_map(report: dict[str, Any]) -> Picture | None:
    """Draw kept weights per layer and round, a panel for each pre-training and finder that chooses its own layers."""
    random = {f["finder"] for f in report["finders"] if f["method"] == "random"}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for ticket in report["densities"]:
        if ticket["finder"] not in random or len(random) == len(report["finders"]):
            groups.setdefault((ticket["theta"], ticket["finder"]), []).append(ticket)
    if not groups:
        return None
    layers = list(dict.fromkeys(name for ts in groups.values() for t in ts for name, _, _ in t["layers"]))
    rounds = max(len(ts) for ts in groups.values())
    columns = min(len({theta for theta, _ in groups}), 4)
    rows = math.ceil(len(groups) / columns)
    height = max(0.235 * len(layers), 1.6) if len(layers) < _LONG else 0.15 * len(layers)
    cell = min(0.36, 10.2 / (columns * rounds))
    size = (3.0 + columns * max(cell * rounds, 2.0), rows * (height + 0.95) + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    colours = matplotlib.colormaps["viridis"]
    scale = Normalize(math.log10(THIN), 0.0)
    for axes in grid.flat[len(groups) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("round k")
    for axes, ((theta, finder), tickets) in zip(grid.flat, groups.items(), strict=False):
        mesh = _density_panel(axes, tickets, layers, colours, scale, numbers=cell > 0.22 and len(layers) < _LONG)
        axes.set_title(f"{theta}, {finder_name(finder)}", color=colour(theta, report["thetas"]), fontweight="bold")
    bar = figure.colorbar(mesh, ax=grid, ticks=[-3, -2, -1, 0], pad=0.015, aspect=30)
    bar.ax.set_yticklabels(["0.1 %", "1 %", "10 %", "100 %"])
    bar.outline.set_visible(False)
    caption = (
        "Share of weights that each layer keeps, from the input (top) to the output (bottom), round by round; "
        "dark layers are nearly gone, and ! marks one that is empty or keeps less than 0.1 %."
    )
    return picture(figure, "densities", "Where the weights are left", caption)


def _density_panel(
    axes: Axes, tickets: list[dict[str, Any]], layers: list[str], colours: Colormap, scale: Normalize, *, numbers: bool
) -> QuadMesh:
    values = np.full((len(layers), len(tickets)), np.nan)
    for x, ticket in enumerate(tickets):
        for name, kept, numel in ticket["layers"]:
            values[layers.index(name), x] = kept / numel
    mesh = axes.pcolormesh(
        np.log10(np.maximum(values, THIN)), cmap=colours, norm=scale, edgecolor="white", linewidth=0.4
    )
    for y, x in np.argwhere(~np.isnan(values)):
        value = values[y, x]
        if value < THIN:
            axes.text(x + 0.5, y + 0.5, "!", ha="center", va="center", color="white", fontweight="bold", fontsize=9)
        elif numbers:
            tone = ink_on(colours(scale(math.log10(value))))
            text = f"{100 * value:.0f}" if value >= 0.0095 else f"{100 * value:.1f}".lstrip("0")
            axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=tone, fontsize=7.4)
    axes.set_ylim(len(layers), 0)
    step = 1 if len(tickets) <= 12 else 2
    axes.set_xticks(np.arange(0, len(tickets), step) + 0.5, [str(t["k"]) for t in tickets[::step]], fontsize=8.5)
    axes.set_yticks(
        np.arange(len(layers)) + 0.5,
        [n.removesuffix(".weight") for n in layers],
        fontsize=8 if len(layers) < _LONG else 6.5,
    )
    bare(axes)
    return mesh


def overlap_matrix(report: dict[str, Any]) -> Picture | None:
    """Draw the IoU of every two tickets of the sparsest round that has most of them, with the chance level."""
    if not report["overlaps"]:
        return None
    counts = {k: sum(o["k"] == k for o in report["overlaps"]) for k in sorted({o["k"] for o in report["overlaps"]})}
    k = max(k for k, n in counts.items() if n == max(counts.values()))
    pairs = [o for o in report["overlaps"] if o["k"] == k]
    names = list(dict.fromkeys(tuple(side) for o in pairs for side in (o["a"], o["b"])))
    size = len(names)
    values = np.full((size, size), np.nan)
    for o in pairs:
        i, j = names.index(tuple(o["a"])), names.index(tuple(o["b"]))
        values[max(i, j), min(i, j)] = o["iou"]
    chance = pairs[0]["chance"]
    sparsity = next(t["sparsity"] for t in report["densities"] if t["k"] == k)
    figure = Figure(figsize=(3.2 + 0.78 * size, 1.6 + 0.62 * size), layout="constrained")
    axes = figure.subplots()
    top = max(float(np.nanmax(values)), 2 * chance)
    colours = matplotlib.colormaps["viridis"]
    mesh = axes.pcolormesh(values, cmap=colours, vmin=0, vmax=top, edgecolor="white", linewidth=1.2)
    for y, x in np.argwhere(~np.isnan(values)):
        iou, tone = values[y, x], ink_on(colours(values[y, x] / top))
        ratio = f"{iou / chance:.1f} × chance" if chance else ""
        axes.text(x + 0.5, y + 0.36, f"{iou:.3f}", ha="center", va="center", color=tone, fontsize=9.5)
        axes.text(x + 0.5, y + 0.72, ratio, ha="center", va="center", color=tone, fontsize=6.8)
    labels = [f"{theta}, {finder_name(finder)}" for theta, finder in names]
    axes.set_ylim(size, 1)
    axes.set_xlim(0, size - 1)
    axes.set_yticks(np.arange(1, size) + 0.5, labels[1:], fontsize=9)
    axes.set_xticks(np.arange(size - 1) + 0.5, labels[:-1], fontsize=9, rotation=30, ha="right", rotation_mode="anchor")
    bare(axes)
    for axis, names_shown in ((axes.get_yticklabels(), names[1:]), (axes.get_xticklabels(), names[:-1])):
        for text, (theta, _) in zip(axis, names_shown, strict=True):
            text.set_color(colour(theta, report["thetas"]))
    bar = figure.colorbar(mesh, ax=axes, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    bar.ax.axhline(chance, color="white", linewidth=1.6)
    bar.ax.text(1.35, chance, f"chance {chance:.3f}", transform=bar.ax.get_yaxis_transform(), va="center", fontsize=9)
    bar.set_ticks([0, top], labels=["0", f"{top:.2f}"])
    axes.set_title(f"k = {k}, {sparsity:.2f} % of the weights removed", loc="left", pad=10)
    caption = (
        f"Intersection over union of the kept weights of every two tickets at k = {k}; two independent random masks "
        f"of this density have {chance:.3f}."
    )
    return picture(figure, "overlap", "Which tickets are alike", caption)

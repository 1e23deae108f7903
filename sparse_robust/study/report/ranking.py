"""Finders side by side: what each costs, what its tickets are worth, and where it empties layers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparse_robust.study.report.style import FAINT, INK, MORE_COLOURS, WIN, Picture, picture
from sparse_robust.study.report.words import finder_name, plural, regime_name, target_name
from sparse_robust.study.results import StudyResults
from sparse_robust.study.rows import DENSE, TransferRow

FEWEST = 4
"""Fewer finders than this are told apart well enough by their curves."""
METRICS = {"sa": "clean accuracy (%)", "ra": "robust accuracy (%)"}
SHADES = (WIN, *MORE_COLOURS)


def rank_finders(results: StudyResults) -> list[dict[str, Any]]:
    """Return one row a (pre-training, target, fraction, regime, finder, round) that was transferred.

    Accuracies are in percent, mean and standard deviation over seeds: ``sa``, ``ra`` (under all attacks) and, where
    there are several, ``attacks``: what is left after each in turn. ``seconds`` is the time of the whole search.
    ``collapsed`` are layers that keep no weight although there were some. Best robust accuracy first, within a round.
    Empty with fewer than `FEWEST` finders.
    """
    if len(results.finders()) < FEWEST:
        return []
    found = []
    groups: dict[tuple[object, ...], list[TransferRow]] = {}
    for row in results.transfer:
        if row.finder != DENSE:
            groups.setdefault(row.identity[:-1], []).append(row)
    for rows in groups.values():
        first = rows[0]
        search = next((f for f in results.find if (f.theta, f.finder) == (first.theta, first.finder)), None)
        ticket = search.ticket(first.k) if search is not None else None
        found.append(
            {
                "theta": first.theta,
                "target": first.target,
                "fraction": first.fraction,
                "regime": first.regime,
                "finder": first.finder,
                "k": first.k,
                "sparsity": first.sparsity,
                "sa": _spread([r.sa for r in rows]),
                "ra": _spread([r.ra for r in rows]),
                "attacks": {name: _spread([r.attacks.get(name) for r in rows]) for name in first.attacks},
                "seconds": search.seconds if search is not None else None,
                "collapsed": [layer.name for layer in ticket.layers if layer.kept == 0] if ticket else None,
            }
        )
    order = [target for target, _ in results.targets()]
    return sorted(found, key=lambda r: (*_place(r, order), r["k"], -(r["ra"] or {"mean": -1.0})["mean"], r["finder"]))


def _place(row: dict[str, Any], targets: Sequence[str]) -> tuple[object, ...]:
    return row["theta"], targets.index(row["target"]), -row["fraction"], row["regime"]


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": fmean(known), "std": stdev(known) if len(known) > 1 else None, "n": len(known)}


def ranking_pictures(report: dict[str, Any]) -> list[Picture]:
    """Draw, for each pre-training, target and regime, every finder's accuracies with error bars."""
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["ranking"]:
        settings.setdefault((row["theta"], row["target"], row["fraction"], row["regime"]), []).append(row)
    return [_ranking(rows, number) for number, rows in enumerate(settings.values())]


def _ranking(rows: list[dict[str, Any]], number: int) -> Picture:
    rounds = dict(sorted((row["k"], row["sparsity"]) for row in rows))
    names = _by_robustness(rows)
    figure = Figure(figsize=(11.0, 1.7 + 0.42 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (metric, label) in zip((left, right), METRICS.items(), strict=True):
        for index, k in enumerate(rounds):
            shift = (index - (len(rounds) - 1) / 2) * 0.22
            shown = [row for row in rows if row["k"] == k and row[metric]]
            axes.errorbar(
                [row[metric]["mean"] for row in shown],
                [names.index(row["finder"]) + shift for row in shown],
                xerr=[row[metric]["std"] or 0.0 for row in shown] if any(r[metric]["std"] for r in shown) else None,
                linestyle="none", marker="osD^v"[index % 5], color=SHADES[index % len(SHADES)], capsize=2.5,
                elinewidth=1.1,
            )  # fmt: skip
            _cross_out(axes, [row for row in shown if row["collapsed"]], metric, names, shift)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
    left.set_yticks(range(len(names)), [finder_name(name) for name in names])
    left.invert_yaxis()
    for row in range(1, len(names)):
        for axes in (left, right):
            axes.axhline(row - 0.5, color="#eeeeee", linewidth=0.8, zorder=0)
    handles = [
        Line2D(
            [], [], linestyle="none", marker="osD^v"[i % 5], color=SHADES[i % len(SHADES)], label=f"{s:.4g} % pruned"
        )
        for i, s in enumerate(rounds.values())
    ]
    if any(row["collapsed"] for row in rows):
        handles.append(Line2D([], [], linestyle="none", marker="x", color=INK, label="a layer is empty"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    first = rows[0]
    seeds = max((row["ra"] or row["sa"] or {"n": 0})["n"] for row in rows)
    bars = "bars: ± one standard deviation" if seeds > 1 else "single seed, no error bars"
    figure.supxlabel(f"{plural(seeds, 'seed')}, {bars}", fontsize=9, color=FAINT, x=0.995, ha="right")
    where = target_name(first["target"], first["fraction"])
    title = f"Finders side by side: {first['theta']} pre-training, {regime_name(first['regime'])} to {where}"
    caption = "Every finder's tickets after transfer; most robust at the highest sparsity on top."
    return picture(figure, "finders" if number == 0 else f"finders-{number + 1}", title, caption)


def _by_robustness(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the finders, that with the best robust accuracy at its sparsest ticket first."""
    sparsest: dict[str, tuple[float, float]] = {}
    for row in rows:
        value = (row["sparsity"], row["ra"]["mean"] if row["ra"] else -1.0)
        sparsest[row["finder"]] = max(sparsest.get(row["finder"], value), value)
    return sorted(sparsest, key=lambda name: (-sparsest[name][0], -sparsest[name][1], name))


def _cross_out(axes: Any, rows: Sequence[dict[str, Any]], metric: str, names: Sequence[str], shift: float) -> None:
    at = [names.index(row["finder"]) + shift for row in rows]
    axes.plot([row[metric]["mean"] for row in rows], at, "x", color=INK, markersize=8, markeredgewidth=1.2, zorder=4)

"""The report as data: every number that its pictures, tables and sentences show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from sparse_robust.study.compare import CLEAR, binomial_error
from sparse_robust.study.criterion import BASELINES, PREDICATES, Criterion
from sparse_robust.study.overlap import Overlap, overlaps, thin_layers
from sparse_robust.study.report.findings import HIGH, find_all
from sparse_robust.study.report.ranking import rank_finders
from sparse_robust.study.report.words import THETAS, duration, listed, plural, regime_name, target_name
from sparse_robust.study.results import StudyResults
from sparse_robust.study.rows import DENSE, FindRow, PretrainRow, TransferRow
from sparse_robust.study.verdict import DoubleWin, double_win_table, seeds_label

SCHEMA = 1


def assemble(results: StudyResults, criterion: Criterion | None = None) -> dict[str, Any]:
    """Return the whole report, apart from its pictures, as one JSON value."""
    criterion = criterion or Criterion()
    table = double_win_table(results, criterion)
    shared, unread = overlaps(results)
    thin = _thin(results)
    places = [_place(results, target, fraction) for target, fraction in results.targets()]
    return rounded(
        {
            "schema": SCHEMA,
            "name": results.name,
            "description": str(results.config.get("description") or ""),
            "seeds": results.seeds(),
            "seeds_label": seeds_label(results.seeds()) if results.transfer else "no transfers yet",
            "thetas": results.thetas(),
            "finders": [{"finder": f, **_kind(results, f)} for f in results.finders()],
            "main_finder": results.main_finder(),
            "shown_finders": [f for f in (results.main_finder(), results.random_finder()) if f],
            "regimes": results.regimes(),
            "places": places,
            "cells": {
                "done": len(results.cells) - len(results.pending),
                "all": len(results.cells),
                "pending": [{"cell": name, "problem": results.problems.get(name)} for name in results.pending],
                "unlisted": list(results.unlisted),
            },
            "criterion": _criterion(criterion, table),
            "findings": [vars(f) for f in find_all(results, table, shared)],
            "curves": curves(results),
            "ranking": rank_finders(results),
            "double_win": [_double_win(row) for row in table],
            "criteria": _criteria(results, criterion),
            "pretrain": [_pretrain(results, theta) for theta in results.thetas() if _has_pretrain(results, theta)],
            "densities": _densities(results),
            "thin_layers": thin,
            "overlaps": [_overlap(o, results.main_finder()) for o in shared],
            "time": _time(results),
            "masks_made_by": _made_by(results),
            "machine": dict(results.machine),
            "config": dict(results.config),
            "notes": list(results.notes),
            "warnings": [*_mask_mismatches(results), *_odd_accuracies(results), *unread],
            "limits": _limits(results, thin),
            "rules": {"clear_standard_errors": CLEAR, "high_sparsity_percent": HIGH},
        }
    )


def curves(results: StudyResults) -> list[dict[str, Any]]:
    """Return one series a (target, fraction, regime, pre-training, finder): accuracies over seeds against sparsity."""
    found = []
    for target, fraction in results.targets():
        for regime in results.regimes():
            for theta in results.thetas():
                for finder in (DENSE, *results.finders()):
                    rounds = [0] if finder == DENSE else results.rounds(theta, finder, target, fraction)
                    at = (target, fraction, regime)
                    points = [_point(results, theta, finder, k, *at) for k in rounds]
                    points = [p for p in points if p["sa"] or p["ra"]]
                    if points:
                        place = {"target": target, "fraction": fraction, "regime": regime}
                        found.append(
                            {**place, "theta": theta, "finder": finder, **_kind(results, finder), "points": points}
                        )
    return found


def rounded(value: Any) -> Any:
    """Return ``value`` with floats at 6 decimals, tuples as lists and keys as text, which is what JSON can hold."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def _kind(results: StudyResults, finder: str) -> dict[str, Any]:
    """Return a finder's method, and its number among the finders of that method."""
    if finder == DENSE:
        return {"method": DENSE, "variant": 0}
    method = results.method(finder)
    same = [f for f in results.finders() if results.method(f) == method]
    return {"method": method, "variant": same.index(finder)}


def _place(results: StudyResults, target: str, fraction: float) -> dict[str, Any]:
    return {
        "target": target,
        "fraction": fraction,
        "name": target_name(target, fraction),
        "train_images": results.train_images(target, fraction),
        "test_images": results.test_images(target),
    }


def _point(
    results: StudyResults, theta: str, finder: str, k: int, target: str, fraction: float, regime: str
) -> dict[str, Any]:
    point: dict[str, Any] = {"k": k, "sparsity": results.sparsity(k, finder) if k else 0.0}
    for metric in ("sa", "ra"):
        values = results.values(metric, theta, finder, k, target, fraction, regime)
        point[metric] = _spread(list(values.values()), list(values)) if values else None
    return point


def _spread(values: Sequence[float], seeds: Sequence[int]) -> dict[str, Any]:
    std = stdev(values) if len(values) > 1 else None
    return {"mean": fmean(values), "std": std, "n": len(values), "seeds": list(seeds), "values": list(values)}


def _criterion(criterion: Criterion, table: Sequence[DoubleWin]) -> dict[str, Any]:
    needs = listed(f"{metric} under {regime_name(regime)}" for metric, regime in criterion.requirements)
    base = {"same": "its own dense model", "best_dense": "the best dense model of all pre-trainings"}[
        criterion.baseline
    ]
    kinds = {row.seeds for row in table if row.seeds}
    below = "not below" if kinds == {1} or not criterion.c else f"at most {criterion.c:g} × std over seeds below"
    why = "; with a single seed no std is known, so c = 0" if 1 in kinds and criterion.c else ""
    sentence = (
        f"A ticket wins ({criterion.predicate}, c = {0 if kinds == {1} else criterion.c:g}) if its {needs} "
        f"{'is' if len(criterion.requirements) == 1 else 'are'} {below} that of {base}{why}."
    )
    return {
        "predicate": criterion.predicate,
        "c": criterion.c,
        "baseline": criterion.baseline,
        "requires": [list(r) for r in criterion.requirements],
        "label": f"{criterion.predicate}, c = {0 if kinds == {1} else criterion.c:g}",
        "sentence": sentence,
    }


def _double_win(row: DoubleWin) -> dict[str, Any]:
    rounds = []
    for verdict in row.rounds:
        worst = verdict.worst
        matches = [
            {
                "metric": metric,
                "regime": regime,
                **({**vars(m), "wins": m.wins, "noise": m.noise} if m else {"wins": None}),
            }
            for (metric, regime), m in verdict.matches.items()
        ]
        rounds.append(
            {
                "k": verdict.k,
                "sparsity": verdict.sparsity,
                "wins": verdict.wins,
                "near": verdict.near,
                "reason": verdict.reason,
                "worst": f"{worst[0][0]} {worst[0][1]}" if worst else None,
                "worst_margin": worst[1].margin if worst else None,
                "matches": matches,
            }
        )
    ends = row.extremes
    sparsity = next((r.sparsity for r in row.rounds if r.k == ends.k_max), None)
    return {
        "theta": row.theta,
        "finder": row.finder,
        "target": row.target,
        "fraction": row.fraction,
        "seeds": row.seeds,
        "seeds_label": row.label,
        "k_max": ends.k_max,
        "k_contig": ends.k_contig,
        "label": ends.label,
        "sparsity_at_k_max": sparsity,
        "undecided": {str(k): why for k, why in row.undecided.items()},
        "rounds": rounds,
    }


def _criteria(results: StudyResults, criterion: Criterion) -> dict[str, Any]:
    """Return k_max / k_contig of every row under every predicate, and against the best dense model."""
    columns = [Criterion(p, criterion.c, "same") for p in PREDICATES]
    columns.append(Criterion(criterion.predicate, criterion.c, BASELINES[1]))
    tables = [double_win_table(results, c) for c in columns]
    names = [c.predicate if c.baseline == "same" else f"{c.predicate}, best dense" for c in columns]
    rows = []
    for index, row in enumerate(tables[0]):
        ends = [t[index].extremes for t in tables]
        cells = [{"k_max": e.k_max, "k_contig": e.k_contig, "label": e.label} for e in ends]
        about = {"theta": row.theta, "finder": row.finder, "target": row.target, "fraction": row.fraction}
        rows.append({**about, "seeds_label": row.label, "verdicts": cells})
    return {"columns": names, "rows": rows}


def _has_pretrain(results: StudyResults, theta: str) -> bool:
    return any(r.theta == theta for r in results.pretrain)


def _pretrain(results: StudyResults, theta: str) -> dict[str, Any]:
    row = next(r for r in results.pretrain if r.theta == theta)
    keys = ("theta", "regime", "sa", "ra", "epochs", "seconds", "sha256", "stopped_by_guard", "test_images")
    return {"meaning": THETAS.get(theta, ""), **{key: getattr(row, key) for key in keys}}


def _densities(results: StudyResults) -> list[dict[str, Any]]:
    return [
        {
            "theta": row.theta,
            "finder": row.finder,
            "k": ticket.k,
            "sparsity": ticket.sparsity,
            "count": ticket.count,
            "numel": ticket.numel,
            "digest": ticket.digest,
            "layers": [[layer.name, layer.kept, layer.numel] for layer in ticket.layers],
        }
        for row in _ordered(results)
        for ticket in row.tickets
    ]


def _ordered(results: StudyResults) -> Iterable[Any]:
    thetas, finders = results.thetas(), results.finders()
    return sorted(results.find, key=lambda r: (finders.index(r.finder), thetas.index(r.theta)))


def _thin(results: StudyResults) -> list[dict[str, Any]]:
    return [
        {"theta": row.theta, "finder": row.finder, "k": ticket.k, "layer": sentence}
        for row in _ordered(results)
        for ticket in row.tickets
        for sentence in thin_layers(ticket)
    ]


def _overlap(o: Overlap, main: str | None) -> dict[str, Any]:
    return {
        "k": o.k,
        "a": list(o.a),
        "b": list(o.b),
        "iou": o.iou,
        "chance": o.chance,
        "chance_same_layer_densities": o.chance_layers,
        "layers": [[name, iou] for name, iou in o.layers] if o.a[1] == o.b[1] == main else None,
    }


def _time(results: StudyResults) -> dict[str, Any]:
    stages: dict[str, Sequence[PretrainRow | FindRow | TransferRow]]
    stages = {"pretrain": results.pretrain, "find": results.find, "transfer": results.transfer}
    rows = [
        {
            "stage": stage,
            "theta": theta,
            "cells": len(mine),
            "seconds": sum(r.seconds for r in mine),
        }
        for stage, cells in stages.items()
        for theta in results.thetas()
        if (mine := [r for r in cells if r.theta == theta])
    ]
    return {"seconds": results.seconds, "text": duration(results.seconds), "stages": rows}


def _made_by(results: StudyResults) -> list[str]:
    """Say in words how each finder works, as far as the config has it."""
    found = []
    entries = results.config.get("find")
    for finder in results.finders():
        entry = entries.get(finder) if isinstance(entries, Mapping) else None
        if not isinstance(entry, Mapping):
            continue
        words = [f"{finder}: {results.method(finder)}"]
        if entry.get("sparsities"):
            words.append(f"{listed(f'{100 * float(s):g} %' for s in entry['sparsities'])} pruned")
        elif entry.get("rounds") and entry.get("rate"):
            words.append(
                f"{plural(int(entry['rounds']), 'round')}, each removes {100 * float(entry['rate']):g} % of the rest"
            )
        if isinstance(entry.get("recipe"), Mapping) and results.method(finder) == "imp":
            words.append(f"{entry['recipe'].get('regime', 'unknown')} training between the cuts, then rewound")
        if entry.get("like"):
            words.append(f"as many weights in each layer as {entry['like']}")
        found.append(", ".join(words) + ".")
    return found


def _mask_mismatches(results: StudyResults) -> list[str]:
    """Return a warning for every transfer whose mask is not the ticket's: its sparsity would be a false label."""
    digests = {(f.theta, f.finder, t.k): t.digest for f in results.find for t in f.tickets}
    return [
        f"{row.cell}: its mask ({row.mask_digest[:12]}) is not that of ticket k = {row.k} of {row.theta}, {row.finder}."
        for row in results.transfer
        if row.mask_digest and digests.get((row.theta, row.finder, row.k), row.mask_digest) != row.mask_digest
    ]


def _odd_accuracies(results: StudyResults) -> list[str]:
    """Return a warning for every transfer that is more accurate under attack than without: the attack did not work."""
    return [
        f"{row.cell}: robust accuracy {row.ra:.2f} is above clean accuracy {row.sa:.2f}, so the attack did not work."
        for row in results.transfer
        if row.sa is not None and row.ra is not None and row.ra > row.sa + 1e-6
    ]


def _limits(results: StudyResults, thin: Sequence[dict[str, Any]]) -> list[str]:
    limits = []
    if results.transfer and results.seeds() == 1:
        limits.append(
            "Single seed: no spread between runs is known. Wins are judged without tolerance (c = 0), and one or two "
            "rounds more or less may be luck."
        )
    elif results.transfer:
        limits.append("Seeds vary the transfer only; every pre-training and every mask was made once.")
    for target in dict.fromkeys(t for t, _ in results.targets()):
        images = results.test_images(target)
        size = "size of the test set not recorded"
        if images:
            half = binomial_error(50, images)
            size = f"{images:,} test images: an accuracy of 50 % has a standard error of {half:.1f} points"
        limits.append(f"{target}: {size}.")
    limits.append(
        "Robust accuracy is measured with the attacks configured below. A stronger one can only lower it, "
        "so it is an upper bound on the true robustness."
    )
    guarded = [r.theta for r in results.pretrain if r.stopped_by_guard]
    if guarded:
        limits.append(f"Pre-training {listed(guarded)} overfitted to its one-step attack; the guard restored it.")
    caught = sum(r.stopped_by_guard for r in results.transfer)
    if caught:
        limits.append(f"The guard against catastrophic overfitting stopped {plural(caught, 'transfer')}.")
    if thin:
        layers = plural(len(thin), "layer")
        limits.append(f"{layers} of tickets are empty or keep less than 0.1 % of their weights; they are listed below.")
    if results.pending:
        limits.append(f"Unfinished: {len(results.pending)} of {plural(len(results.cells), 'cell')} are still pending.")
    return limits

"""What the numbers say, in sentences that are computed from them and can come out either way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from sparse_robust.study.compare import CLEAR, Difference, Place, Setting, difference, measure, signed
from sparse_robust.study.overlap import Overlap
from sparse_robust.study.report.words import finder_name, listed, plural, regime_name, rounds_text, target_name
from sparse_robust.study.results import StudyResults
from sparse_robust.study.verdict import DoubleWin

HIGH = 80.0  # percent; from here on a sparsity counts as high
ALIKE = 1.0  # points; a difference that is surely smaller than this counts as none
SETTLING_ROUNDS = 2  # with one seed, extremes that differ by no more tested rounds than this are not called different
FORGOTTEN = (
    "A known reason: with many labels or a large learning rate the transfer learns its robustness anew, "
    "and a standard transfer forgets what pre-training gave."
)
RELEARNED = (
    "A known reason: with many labels, a large learning rate or an easy target the weights are learned anew, "
    "and where the mask came from matters little."
)


@dataclass(frozen=True)
class Finding:
    """A claim and what became of it.

    Attributes:
        holds: True, False (the opposite is clear), or None (no clear difference, mixed, or not decided).
        headline: whether it stands at the top of the report.
    """

    id: str
    holds: bool | None
    sentence: str
    numbers: dict[str, Any]
    headline: bool = False


def find_all(results: StudyResults, table: Sequence[DoubleWin], shared: Sequence[Overlap]) -> list[Finding]:
    """Return all findings, the headlines first."""
    found = robust_pretraining(results)
    for target, fraction in results.targets():
        found += masks_against_random(results, target, fraction)
        found += double_wins(results, table, target, fraction)
        found += price_of_sparsity(results, target, fraction)
    found += regime_inside_imp(results) + shared_masks(results, shared)
    return [f for f in found if f.headline] + [f for f in found if not f.headline]


def robust_pretraining(results: StudyResults) -> list[Finding]:
    """Does robust pre-training transfer with higher robust accuracy than standard pre-training?"""
    standard = results.standard()
    robust = [t for t in results.thetas() if t != standard]
    if not robust or standard is None:
        have = listed(results.thetas())
        sentence = f"Robust against standard pre-training: not decided, because the study has {have} only."
        return [Finding("robust-pretraining", None, sentence, {"outcome": "not decided"}, headline=True)]
    finder = results.main_finder() or "dense"
    details, outcomes = [], []
    for target, fraction in results.targets():
        rounds = [0, *sorted({k for t in results.thetas() for k in results.rounds(t, finder, target, fraction)})]
        for regime in results.regimes():
            for theta in robust:
                place = Place(target, fraction, regime, "ra")
                delta = difference(results, place, Setting(theta, finder), Setting(standard, finder), rounds)
                where = f"{target_name(target, fraction)}, {regime_name(regime)}"
                claim = _compared(where, f"{theta} pre-training", delta, "robust accuracy", f"{standard} pre-training")
                name = f"robust-pretraining/{target}/{fraction:g}/{regime}/{theta}"
                details.append(Finding(name, _holds(delta), claim, delta.numbers()))
                outcomes.append(delta)
    return [_robust_headline(outcomes), *details]


def _robust_headline(outcomes: Sequence[Difference]) -> Finding:
    tally = _tally(outcomes)
    clear = sorted(d.mean for d in outcomes if d.outcome == "higher" and d.mean is not None)
    numbers = {"tally": tally, "clear_gains": clear}
    decided = len(outcomes) - tally["not decided"]
    if not decided:
        text = "Robust against standard pre-training: not decided yet, the transfers are missing."
        return Finding("robust-pretraining", None, text, numbers, headline=True)
    start = {True: "Robust pre-training transfers more robustness", False: "Robust pre-training does not pay here"}
    holds = _majority(tally)
    opening = start[holds] if holds is not None else "Robust pre-training gives no uniform answer"
    by = f", by {clear[0]:.1f} to {clear[-1]:.1f} points" if len(clear) > 1 else f", by {clear[0]:.1f}" if clear else ""
    text = (
        f"{opening}: robust accuracy is clearly higher than with standard pre-training in {tally['higher']} of "
        f"{plural(decided, 'comparison')} (pre-training, target, regime){by}{_others(tally)}."
    )
    text += "" if holds else f" {FORGOTTEN}"
    return Finding("robust-pretraining", holds, text, numbers, headline=True)


def masks_against_random(results: StudyResults, target: str, fraction: float) -> list[Finding]:
    """Do found masks beat random masks with the same layer counts at high sparsity?"""
    control = results.random_finder()
    if control is None:
        return []
    found: list[Finding] = []
    for finder in (f for f in results.finders() if results.method(f) != "random"):
        details, outcomes = [], []
        for theta in results.thetas():
            rounds = high_rounds(results, theta, finder, target, fraction)
            for metric, regime in (("sa", "ST"), ("sa", "AT"), ("ra", "AT")):
                place = Place(target, fraction, regime, metric)
                delta = difference(results, place, Setting(theta, finder), Setting(theta, control), rounds)
                if delta.mean is None:
                    continue
                where = f"{target_name(target, fraction)}, {theta} pre-training, {regime_name(regime)}"
                accuracy = {"sa": "clean accuracy", "ra": "robust accuracy"}[metric]
                claim = _compared(where, f"{finder_name(finder)} tickets", delta, accuracy, "random masks")
                name = f"masks/{target}/{fraction:g}/{finder}/{theta}/{metric.upper()}_{regime}"
                details.append(Finding(name, _holds(delta), claim, delta.numbers()))
                outcomes.append(delta)
        if outcomes:
            found += [_masks_headline(results, target, fraction, finder, outcomes), *details]
    return found


def high_rounds(results: StudyResults, theta: str, finder: str, target: str, fraction: float) -> list[int]:
    """Return the transferred rounds with a sparsity of at least `HIGH` percent, or the last round if none is."""
    rounds = results.rounds(theta, finder, target, fraction)
    return [k for k in rounds if results.sparsity(k) >= HIGH] or rounds[-1:]


def _masks_headline(
    results: StudyResults, target: str, fraction: float, finder: str, outcomes: Sequence[Difference]
) -> Finding:
    tally = _tally(outcomes)
    rounds = sorted({k for d in outcomes for k in d.rounds})
    mean = fmean(d.mean for d in outcomes if d.mean is not None)
    holds = _majority(tally)
    where, name = target_name(target, fraction), finder_name(finder)
    opening = {
        True: f"On {where}, {name} tickets beat random masks",
        False: f"On {where}, random masks do better than {name} tickets",
        None: f"On {where}, {name} tickets do not clearly beat random masks"
        + (" everywhere" if tally["higher"] else ""),
    }[holds]
    sparsities = f"at {results.sparsity(rounds[0]):.2f} %" + (" sparsity and above" if len(rounds) > 1 else " sparsity")
    text = (
        f"{opening} {sparsities}: clearly better in {tally['higher']} of {plural(len(outcomes), 'comparison')} "
        f"(pre-training, SA or RA, regime){_others(tally)}; mean difference {signed(mean)} points."
    )
    reason = "" if holds or tally["higher"] > tally["lower"] else f" {RELEARNED}"
    numbers = {"tally": tally, "mean_difference": mean, "rounds": rounds}
    headline = finder == results.main_finder()
    return Finding(f"masks/{target}/{fraction:g}/{finder}", holds, text + reason, numbers, headline=headline)


def double_wins(results: StudyResults, table: Sequence[DoubleWin], target: str, fraction: float) -> list[Finding]:
    """How sparse may a ticket be and still win, and is that order AT >= FAT >= STD?"""
    finder = results.main_finder()
    rows = [r for r in table if (r.finder, r.target, r.fraction) == (finder, target, fraction)]
    if finder is None or not rows:
        return []
    criterion = rows[0].criterion
    kind = "Double win" if criterion.predicate in ("strict", "lenient", "literal") else "Win"
    opening = (
        f"{kind} ({criterion.predicate}, {listed(sorted({r.label for r in rows}))}) on {target_name(target, fraction)}"
    )
    ends = [_extent(results, row) for row in rows]
    if all(row.extremes.k_max == 0 for row in rows):
        said = f"no {finder_name(finder)} ticket wins.{_closest(results, rows)}"
    else:
        said = "; ".join(ends) + "."
    holds, note = _order(rows)
    numbers = {
        "k_max": {r.theta: r.extremes.k_max for r in rows},
        "k_contig": {r.theta: r.extremes.k_contig for r in rows},
        "near": {r.theta: [v.k for v in r.rounds if v.near] for r in rows},
        "undecided": {r.theta: {str(k): why for k, why in r.undecided.items()} for r in rows},
        "seeds": {r.theta: r.seeds for r in rows},
    }
    return [Finding(f"double-win/{target}/{fraction:g}", holds, f"{opening}: {said}{note}", numbers, headline=True)]


def _extent(results: StudyResults, row: DoubleWin) -> str:
    """Say how far one pre-training wins."""
    k = row.extremes.k_max
    if not k:
        return f"{row.theta} {row.extremes.label}"
    gap = "" if row.extremes.k_contig == k else f", without a gap only to k = {row.extremes.k_contig}"
    return f"{row.theta} up to k = {k} ({results.sparsity(k, row.finder):.2f} %{gap})"


def _closest(results: StudyResults, rows: Sequence[DoubleWin]) -> str:
    """Say which ticket misses by least, and how many misses are too small to be told from noise."""
    misses = [(v.worst, row, v) for row in rows for v in row.rounds if v.worst is not None]
    if not misses:
        return ""
    (need, worst), row, verdict = max(((w, r, v) for w, r, v in misses if w), key=lambda m: m[0][1].margin)
    near = sum(v.near for r in rows for v in r.rounds)
    noise = (
        f" {near} of {plural(len(misses), 'ticket')} miss by no more than {CLEAR:g} standard errors." if near else ""
    )
    place = f"{row.theta} at k = {verdict.k} ({verdict.sparsity:.2f} %)"
    return (
        f" The closest is {place}, {-worst.margin:.1f} points short in {need[0]} under {regime_name(need[1])}.{noise}"
    )


def _order(rows: Sequence[DoubleWin]) -> tuple[bool | None, str]:
    """Judge the published order of the pre-trainings by their largest winning rounds."""
    best = {r.theta: r.extremes.k_max for r in rows}
    order = [k for k in (best.get(t) for t in ("AT", "FAT", "STD")) if k is not None]
    if len(order) < 2 or None in best.values() or max(order) == min(order):
        return None, ""
    tested = sorted({0} | {v.k for r in rows for v in r.rounds})
    steps = tested.index(max(order)) - tested.index(min(order))
    if min(r.seeds for r in rows) == 1 and steps <= SETTLING_ROUNDS:
        return None, f" With a single seed, {plural(steps, 'tested round')} of difference settles nothing."
    holds = all(a >= b for a, b in zip(order, order[1:], strict=False))
    return holds, f" The published order AT, FAT, STD {'holds' if holds else 'does not hold'} here."


def price_of_sparsity(results: StudyResults, target: str, fraction: float) -> list[Finding]:
    """Does the sparsest ticket keep the robust accuracy of its dense model under adversarial transfer?"""
    finder = results.main_finder()
    found = []
    for theta in results.thetas():
        rounds = results.rounds(theta, finder, target, fraction) if finder else []
        if not finder or not rounds:
            continue
        k = rounds[-1]
        values = [list(results.values("ra", theta, finder, r, target, fraction, "AT").values()) for r in (0, k)]
        if not all(values):
            continue
        dense, sparse = map(fmean, values)
        delta = measure({k: (values[1], values[0])}, results.test_images(target))
        verb = {"lower": "falls", "higher": "rises"}.get(delta.outcome, "goes")
        doubt = ", no clear difference" if delta.outcome == "no clear difference" else ""
        gone = results.sparsity(k, finder)
        text = (
            f"{target_name(target, fraction)}, adversarial transfer, {theta}: with {gone:.2f} % of the weights "
            f"removed (k = {k}) robust accuracy {verb} from {dense:.1f} to {sparse:.1f}{doubt} "
            f"({delta.amount} points; {delta.basis})."
        )
        holds = {"lower": False, "higher": True}.get(delta.outcome)
        found.append(Finding(f"price/{target}/{fraction:g}/{theta}", holds, text, delta.numbers()))
    return found


def regime_inside_imp(results: StudyResults) -> list[Finding]:
    """Do tickets from adversarial IMP rounds transfer otherwise than those from standard ones? Paired over all runs."""
    by_regime = {r.regime: r.finder for r in results.find if results.method(r.finder) == "imp"}
    standard = by_regime.get("standard")
    other = next((f for regime, f in by_regime.items() if regime not in ("standard", None)), None)
    if standard is None or other is None:
        return []
    found = []
    for metric in ("sa", "ra"):
        pairs = _paired(results, metric, other, standard)
        if len(pairs) < 2:
            continue
        mean, error = fmean(pairs), stdev(pairs) / len(pairs) ** 0.5
        clear = abs(mean) > CLEAR * error
        alike = abs(mean) + CLEAR * error < ALIKE
        text = (
            f"Robust against standard training inside IMP ({other}, {standard}): {metric.upper()} of the transferred "
            f"tickets differs by {mean:+.2f} ± {error:.2f} points (paired over {plural(len(pairs), 'run')}): "
            f"{'a clear difference' if clear else 'no clear difference'}."
        )
        numbers = {"difference": mean, "standard_error": error, "pairs": len(pairs)}
        found.append(Finding(f"imp-regime/{metric.upper()}", False if clear else alike or None, text, numbers))
    return found


def _paired(results: StudyResults, metric: str, a: str, b: str) -> list[float]:
    """Return metric(a) - metric(b) of every transferred setting and seed that both finders have."""
    pairs: list[float] = []
    for target, fraction in results.targets():
        for theta in results.thetas():
            for k in results.rounds(theta, a, target, fraction):
                for regime in results.regimes():
                    first, second = (results.values(metric, theta, f, k, target, fraction, regime) for f in (a, b))
                    pairs += [first[s] - second[s] for s in first if s in second]
    return pairs


def shared_masks(results: StudyResults, shared: Sequence[Overlap]) -> list[Finding]:
    """Do tickets of different pre-trainings share more weights than their layer densities explain?"""
    finder = results.main_finder()
    pairs = [o for o in shared if o.a[1] == o.b[1] == finder]
    if not pairs:
        return []
    k = max(o.k for o in pairs)
    last = [o for o in pairs if o.k == k]
    above = [o for o in last if o.iou > o.chance_layers]
    low, high = (f(o.iou for o in last) for f in (min, max))
    holds = True if len(above) == len(last) else False if not above else None
    text = (
        f"Tickets of different pre-trainings at k = {k} ({results.sparsity(k):.2f} %) have an IoU of {low:.3f} to "
        f"{high:.3f}; independent random masks have {last[0].chance:.3f}, random masks with the same layer densities "
        f"{fmean(o.chance_layers for o in last):.3f}."
    )
    numbers = {"k": k, "iou": {f"{o.a[0]}-{o.b[0]}": o.iou for o in last}, "chance": last[0].chance}
    return [Finding("shared-masks", holds, text, numbers)]


def _compared(where: str, subject: str, delta: Difference, accuracy: str, other: str) -> str:
    """Put a difference into words that follow its outcome."""
    if delta.mean is None:
        return f"{where}: {subject} against {other}: not decided, because {delta.basis}."
    several = f"mean over {rounds_text(sorted(delta.rounds))}, range {delta.spread}"
    proof = f"{several if len(delta.rounds) > 1 else rounds_text(list(delta.rounds))}; {delta.basis}"
    if delta.outcome in ("higher", "lower"):
        side = "more" if delta.outcome == "higher" else "less"
        gives = "give" if subject.endswith("s") else "gives"
        return f"{where}: {subject} {gives} {delta.amount} points {side} {accuracy} than {other} ({proof})."
    error = f" ± {delta.error:.1f}" if delta.error is not None else ""
    what = (
        "no clear difference"
        if delta.error is not None
        else "no error bar, so not decided whether there is a difference"
    )
    return f"{where}: {what} in {accuracy} between {subject} and {other} ({signed(delta.mean)}{error}; {proof})."


def _holds(delta: Difference) -> bool | None:
    return {"higher": True, "lower": False}.get(delta.outcome)


def _tally(outcomes: Sequence[Difference]) -> dict[str, int]:
    counts = Counter(d.outcome for d in outcomes)
    return {name: counts[name] for name in ("higher", "lower", "no clear difference", "not decided")}


def _majority(tally: dict[str, int]) -> bool | None:
    """True if most comparisons are clearly higher, False if most are clearly lower or only lower ones are clear."""
    decided = sum(tally.values()) - tally["not decided"]
    if 2 * tally["higher"] > decided:
        return True
    if 2 * tally["lower"] > decided or (tally["lower"] and not tally["higher"]):
        return False
    return None


def _others(tally: dict[str, int]) -> str:
    parts = [
        f"clearly lower in {tally['lower']}" if tally["lower"] else "",
        f"no clear difference in {tally['no clear difference']}" if tally["no clear difference"] else "",
        f"not decided in {tally['not decided']}" if tally["not decided"] else "",
    ]
    named = [p for p in parts if p]
    return f"; {', '.join(named)}" if named else ""

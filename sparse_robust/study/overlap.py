"""What tickets look like: how much two of them share, and how their weights are spread over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from sparse_robust.errors import SparseRobustError
from sparse_robust.masks import Masks
from sparse_robust.study.results import StudyResults
from sparse_robust.study.rows import TicketRow

THIN = 0.001  # a layer that keeps a smaller share of its weights is warned about


@dataclass(frozen=True)
class Overlap:
    """Intersection over union of the kept weights of two tickets of round ``k``.

    Attributes:
        a, b: (pre-training, finder) of the two tickets.
        chance: the IoU of random masks with the same two overall densities.
        chance_layers: that of random masks with the same two densities in every layer: what a shared layer profile
            alone gives.
        layers: (layer name, IoU) in layer order.
    """

    k: int
    a: tuple[str, str]
    b: tuple[str, str]
    iou: float
    chance: float
    chance_layers: float
    layers: tuple[tuple[str, float], ...]


def overlap(k: int, a: tuple[str, str], b: tuple[str, str], first: Masks, second: Masks) -> Overlap:
    """Compare two mask sets over the same layers."""
    both, either = first & second, first | second
    kept_second = {name: kept for name, _, kept, _ in second.layers()}
    shared = united = 0.0  # what to expect of random masks with these layer densities
    for name, _, kept, numel in first.layers():
        product = kept * kept_second[name] / numel
        shared, united = shared + product, united + kept + kept_second[name] - product
    return Overlap(
        k=k,
        a=a,
        b=b,
        iou=first.iou(second),
        chance=first.chance_iou(second),
        chance_layers=shared / united if united else 1.0,
        layers=tuple(
            (name, kept / union if union else 1.0)
            for (name, _, kept, _), (_, _, union, _) in zip(both.layers(), either.layers(), strict=True)
        ),
    )


def overlaps(results: StudyResults) -> tuple[list[Overlap], list[str]]:
    """Compare every two tickets of the same round; also return a warning for every mask file that cannot be read."""
    found: list[Overlap] = []
    warnings: list[str] = []
    for k in sorted({t.k for f in results.find for t in f.tickets}):
        masks: dict[tuple[str, str], Masks] = {}
        for theta, finder, ticket in _tickets(results, k):
            try:
                masks[(theta, finder)] = Masks.load(results.folder / ticket.file)
            except (SparseRobustError, OSError) as error:
                reason = str(error).replace(f"{results.folder}/", "")
                warnings.append(f"the mask of {theta}, {finder}, k = {k} was not compared: {reason}")
        for (a, first), (b, second) in combinations(masks.items(), 2):
            if first.shapes() == second.shapes():
                found.append(overlap(k, a, b, first, second))
            else:
                warnings.append(f"masks of {a} and {b} at k = {k} were not compared: their layers differ")
    return found, warnings


def thin_layers(ticket: TicketRow, least: float = THIN) -> list[str]:
    """Return a sentence for each layer that is empty or keeps less than the share ``least`` of its weights."""
    found = []
    for layer in ticket.layers:
        if layer.kept == 0:
            found.append(f"{layer.name} is empty ({layer.numel:,} weights, none kept)")
        elif layer.density < least:
            found.append(f"{layer.name} keeps {100 * layer.density:.3f} % ({layer.kept:,} of {layer.numel:,})")
    return found


def _tickets(results: StudyResults, k: int) -> Sequence[tuple[str, str, TicketRow]]:
    """Return (pre-training, finder, ticket) of round ``k`` in the report's order."""
    rows = [(f.theta, f.finder, f.ticket(k)) for f in results.find]
    thetas, finders = results.thetas(), results.finders()
    kept = [(theta, finder, ticket) for theta, finder, ticket in rows if ticket is not None]
    return sorted(kept, key=lambda row: (finders.index(row[1]), thetas.index(row[0])))

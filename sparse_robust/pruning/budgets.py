"""Budgets: how many weights each layer may keep, decided before any score is looked at."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from math import ceil

from torch import nn

from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks import Masks, prunable_weights, stem_weights
from sparse_robust.masks.prunable import matches_layer

Scope = str | Mapping[str, float] | Masks
"""A name in `SCOPES`; densities by layer or pattern of layers; or masks whose counts are copied."""

SCOPES = {
    "global": "All layers are compared together; their densities come out as they may.",
    "layerwise": "Every layer loses the same share, to within one weight; the total is the same as for global.",
    "uniform": "The stem stays dense, the classifier (if it is prunable) keeps at least 20 %, other layers get equal "
    "densities (Gale et al., The state of sparsity in deep neural networks, 2019).",
    "erk": "Density in proportion to (outputs + inputs + kernel height + width) over their product; layers that would "
    "exceed 1 stay dense, the others share the rest (Erdos-Renyi-Kernel: Mocanu et al. 2018; Evci et al., RigL, 2020).",
}
"""Every named budget."""

HEAD_DENSITY = Fraction(1, 5)


def budget(
    model: nn.Module, scope: Scope, before: Masks, count: int | None, capacity: Mapping[str, int]
) -> dict[str, int] | None:
    """Return how many weights each layer keeps, exactly; None for one ranking over all layers (global).

    Args:
        model: tells which layers are the stem and the classifier.
        scope: the budget. Densities by layer name or glob (`fnmatch`; the first that matches counts) are shares of the
            layer's weights; layers that are not named share the rest of ``count`` equally, or stay as they are where
            it is None.
        before: what is still kept; layers never get more.
        count: how many weights to keep in total; None where the scope says that itself.
        capacity: the most that each layer can keep under the pattern.

    Raises:
        UsageError: for an unknown scope or layer, or counts that cannot be met; the message says which and why.
    """
    if isinstance(scope, Masks):
        return _copied(scope, before, count, capacity)
    if not isinstance(scope, str):
        return _custom(scope, before, count, capacity)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    if count is None:
        raise UsageError("give either sparsity (the share to prune) or count (the number to keep).")
    layers = before.layers()
    if scope == "global":
        return None
    if scope == "layerwise":
        return share(count, {name: kept for name, _, kept, _ in layers}, capacity)
    if scope == "erk":
        return share(count, {name: sum(shape) for name, shape, _, _ in layers}, capacity)
    return _uniform(model, before, count, capacity)


def share(total: int, weights: Mapping[str, int], capacity: Mapping[str, int]) -> dict[str, int]:
    """Share ``total`` in proportion to ``weights``, none above its capacity: the others get what is too much for one.

    Exact: fractions are rounded by largest remainders (Hamilton's method), of equals the first.

    Raises:
        UsageError: if all capacities together are less than ``total``.
    """
    if not 0 <= total <= sum(capacity[name] for name in weights):
        raise UsageError(
            f"cannot keep {total} weights in these {len(weights)} layers, which can keep "
            f"{sum(capacity[name] for name in weights)} together."
        )
    quotas: dict[str, Fraction] = {}
    open_layers, left = dict(weights), total
    while open_layers:
        rate = Fraction(left, sum(open_layers.values()) or 1)
        full = [name for name, weight in open_layers.items() if weight * rate >= capacity[name]]
        for name in full:
            quotas[name] = Fraction(capacity[name])
            left -= capacity[name]
            del open_layers[name]
        if not full:
            quotas |= {name: weight * rate for name, weight in open_layers.items()}
            break
    shares = {name: int(quotas[name]) for name in weights}
    order = sorted(weights, key=lambda name: shares[name] - quotas[name])  # stable: of equals the first
    for name in order[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _uniform(model: nn.Module, before: Masks, count: int, capacity: Mapping[str, int]) -> dict[str, int]:
    """The stem dense, the head at least 20 % dense, equal densities elsewhere."""
    sizes = {name: numel for name, _, _, numel in before.layers()}
    fixed = {name: capacity[name] for name in stem_weights(model) if name in sizes}
    quotas = _beside(fixed, count, sizes, capacity)
    heads = [name for name in _head(model, sizes) if name not in fixed]
    least = {name: min(capacity[name], ceil(HEAD_DENSITY * sizes[name])) for name in heads}
    if any(quotas[name] < least[name] for name in heads):
        quotas = _beside(fixed | least, count, sizes, capacity)
    return quotas


def _beside(
    fixed: Mapping[str, int], count: int, sizes: Mapping[str, int], capacity: Mapping[str, int]
) -> dict[str, int]:
    """Give some layers what is fixed for them, and the others equal densities of what is left."""
    left = count - sum(fixed.values())
    others = {name: size for name, size in sizes.items() if name not in fixed}
    room = sum(capacity[name] for name in others)
    if not 0 <= left <= room:
        raise UsageError(
            f"this budget gives {', '.join(f'{name} {kept}' for name, kept in fixed.items())} weights, so the total "
            f"must be from {count - left} to {count - left + room}, got {count}. Change the sparsity or the scope."
        )
    shares = {**fixed, **share(left, others, capacity)}
    return {name: shares[name] for name in sizes}


def _custom(
    densities: Mapping[str, float], before: Masks, count: int | None, capacity: Mapping[str, int]
) -> dict[str, int]:
    sizes = {name: numel for name, _, _, numel in before.layers()}
    for pattern, density in densities.items():
        if not 0 <= density <= 1:
            raise UsageError(f"the density of {pattern!r} must be in [0, 1], got {density}: the share that is kept.")
        if not any(matches_layer(pattern, name) for name in sizes):
            raise unknown("layer in the densities", pattern, [name.removesuffix(".weight") for name in sizes])
    fixed: dict[str, int] = {}
    for name, size in sizes.items():
        named = next((density for pattern, density in densities.items() if matches_layer(pattern, name)), None)
        if named is not None:
            fixed[name] = round(Fraction(str(named)) * size)
    _check_room(fixed, capacity, "the densities give")
    if count is None:
        return {name: fixed.get(name, capacity[name]) for name in sizes}
    return _beside(fixed, count, sizes, capacity)


def _copied(ticket: Masks, before: Masks, count: int | None, capacity: Mapping[str, int]) -> dict[str, int]:
    if ticket.shapes() != before.shapes():
        differing = sorted(ticket.shapes().items() ^ before.shapes().items())
        raise UsageError(f"the ticket covers other weights than are pruned here; first difference: {differing[0]}.")
    if count is not None and count != ticket.count():
        raise UsageError(f"the ticket keeps {ticket.count()} weights, so {count} cannot be asked for; leave it out.")
    quotas = {name: kept for name, _, kept, _ in ticket.layers()}
    _check_room(quotas, capacity, "the ticket keeps")
    return {name: quotas[name] for name in before}


def _check_room(quotas: Mapping[str, int], capacity: Mapping[str, int], what: str) -> None:
    for name, kept in quotas.items():
        if kept > capacity[name]:
            raise UsageError(f"{what} {kept} weights to {name}, which can keep {capacity[name]} at most here.")


def _head(model: nn.Module, names: Collection[str]) -> Sequence[str]:
    """The names of the classifier's weights among these."""
    body = prunable_weights(model)
    return [name for name in names if name not in body]

"""Which images are used: subsets and hold-outs as functions of sizes, labels, ids and a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_robust.errors import UsageError
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.rng import philox_uniform


def subset_size(n: int, fraction: float) -> int:
    """Return floor(n * fraction), with the fraction read as the decimal that was typed (0.29 of 100 is 29).

    Raises:
        UsageError: if the fraction is outside (0, 1], or leaves no image.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"data fraction must be above 0 and at most 1, got {fraction!r}.")
    size = math.floor(n * fraction + 1e-6)
    if size == 0:
        raise UsageError(f"fraction {fraction:g} of {n} training images is none: take at least {1 / n:.2g}.")
    return size


def random_order(ids: Tensor, *parts: object) -> Tensor:
    """Return a permutation of positions, int64 [n], that is a function of (parts, ids) alone.

    Each id draws a number of its own, so the relative order of two images is the same in any set that holds both.
    """
    drawn = philox_uniform(ids.cpu(), 1, key=derive_seed(*parts), stream=0).flatten()
    return torch.argsort(drawn, stable=True)


def stratified(labels: Tensor, ids: Tensor, count: int, *parts: object) -> Tensor:
    """Return ``count`` positions that keep the classes in proportion, ascending, int64.

    Shares are rounded by largest remainder (ties fall by seed), so on a balanced set the counts of two classes differ
    by at most one. The choice within a class is by `random_order`: a smaller subset lies within a larger one, up to
    that rounding.
    """
    order = random_order(ids, *parts)
    classes, sizes = torch.unique(labels, return_counts=True)
    quotas = _largest_remainder(sizes, count, *parts)
    chosen = [order[labels[order] == c][:quota] for c, quota in zip(classes.tolist(), quotas.tolist(), strict=True)]
    return torch.cat(chosen).sort().values


def hold_out(labels: Tensor, ids: Tensor, held: int | float, *, last: bool) -> tuple[Tensor, Tensor]:
    """Split positions into (kept, held out), both ascending.

    Args:
        labels: int64 [n].
        ids: int64 [n].
        held: images (int) or share (float) to hold out.
        last: take the last ones in file order; otherwise the classes in proportion, always the same images.

    Raises:
        UsageError: if nothing would be left.
    """
    n = len(ids)
    count = held if isinstance(held, int) else math.floor(n * held + 1e-6)
    if not 0 <= count < n:
        raise UsageError(f"{count} images cannot be held out of {n}: at least one must be left to train on.")
    if last:
        positions = torch.arange(n)
        return positions[: n - count], positions[n - count :]
    out = stratified(labels, ids, count, "hold out") if count else torch.empty(0, dtype=torch.int64)
    kept = torch.ones(n, dtype=torch.bool)
    kept[out] = False
    return kept.nonzero().flatten(), out


def _largest_remainder(sizes: Tensor, count: int, *parts: object) -> Tensor:
    """Whole shares of ``count`` in proportion to ``sizes``; exact, in integers."""
    total = int(sizes.sum())
    quotas, remainders = sizes * count // total, sizes * count % total
    luck = torch.empty_like(sizes)
    luck[random_order(torch.arange(len(sizes)), "remainder", *parts)] = torch.arange(len(sizes))
    first = sorted(range(len(sizes)), key=lambda c: (-int(remainders[c]), int(luck[c])))
    for c in first[: count - int(quotas.sum())]:
        quotas[c] += 1
    return quotas

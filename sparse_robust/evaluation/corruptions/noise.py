"""Corruptions of single pixels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_robust.evaluation.corruptions.basics import Draws


def gaussian_noise(x: Tensor, level: float, draws: Draws) -> Tensor:
    """Normal noise of the standard deviation ``level`` on every element."""
    return x + level * draws.normal(*x.shape[1:])


def shot_noise(x: Tensor, level: int, draws: Draws) -> Tensor:
    """Photons counted: Poisson numbers with mean x * level, divided by level; x is rounded to 8 bits for that."""
    shades = (x.double() * 255).round()
    table = _poisson(level).to(x.device)
    wanted = (shades + draws.uniform(*x.shape[1:]).double()).flatten()
    # Row s of the table holds s + the distribution of shade s, so that the rows in turn are one ascending sequence.
    photons = torch.searchsorted(table.flatten(), wanted, right=True) - (shades * table.shape[1]).long().flatten()
    return (photons.to(x.dtype) / level).view_as(x)


@functools.lru_cache(maxsize=16)
def _poisson(level: int) -> Tensor:
    """Return s + P(k photons or fewer at shade s), float64 [256, enough], for means s / 255 * level."""
    mean = torch.arange(256, dtype=torch.float64)[:, None] / 255 * level
    count = torch.arange(int(level + 8 * level**0.5) + 24, dtype=torch.float64)
    logarithm = torch.where(count == 0, -mean, count * mean.log() - mean - torch.lgamma(count + 1))
    cumulated = logarithm.exp().cumsum(1).clamp(max=1.0)
    cumulated[:, -1] = 1.0
    return cumulated + torch.arange(256, dtype=torch.float64)[:, None]


def impulse_noise(x: Tensor, level: float, draws: Draws) -> Tensor:
    """Salt and pepper: a share ``level`` of the elements becomes 0 or 1."""
    drawn = draws.uniform(*x.shape[1:])
    return torch.where(drawn < level, (drawn < level / 2).to(x.dtype), x)

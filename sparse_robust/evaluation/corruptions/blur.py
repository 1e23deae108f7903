"""Corruptions by optics."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparse_robust.evaluation.corruptions.basics import (
    Draws,
    centre_zoom,
    correlate,
    gaussian_blur,
    reflect_101,
    replicate,
    smear,
)


def defocus_blur(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """Every pixel spread over a disk with a soft edge."""
    return correlate(x, _disk(*level), reflect_101)


def _disk(radius: float, softness: float) -> Tensor:
    """Return a disk with the sum 1, smoothed with a 3x3 Gaussian (5x5 from radius 9 on)."""
    half = 1 if radius <= 8 else 2
    reach = int(radius) + half
    place = torch.arange(-reach, reach + 1, dtype=torch.float64)
    disk = (place[:, None] ** 2 + place**2 <= radius**2).double()
    weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float64) / softness) ** 2)
    edge = torch.outer(weights, weights) / weights.sum() ** 2
    # The disk keeps clear of the border by the reach of the smoothing, so nothing is lost there.
    return torch.nn.functional.conv2d((disk / disk.sum())[None, None], edge[None, None], padding=half)[0, 0]


def glass_blur(x: Tensor, level: tuple[float, int, int], draws: Draws) -> Tensor:
    """Pixels that wander: smoothed, moved about at random, smoothed again.

    From the bottom right to the top left each pixel becomes a copy of one near it. The authors mean to swap the two,
    but in what they published the second assignment has no effect on colour images; that is what is done here.
    """
    sigma, reach, rounds = level
    x = gaussian_blur(x, sigma, truncate=4, border=replicate)
    height, width = x.shape[-2:]
    pixels = [h * width + w for h in range(height - reach, reach, -1) for w in range(width - reach, reach, -1)]
    # Shifts in -reach..reach-1, to the right and down.
    shifts = (draws.uniform(rounds, len(pixels), 2) * (2 * reach)).long() - reach
    jumps = (shifts[..., 1] * width + shifts[..., 0]).flatten(1)
    moved = [_wander(height * width, pixels * rounds, jump) for jump in jumps.tolist()]
    places = torch.tensor(moved, device=x.device).view(len(x), 1, -1).expand(-1, x.shape[1], -1)
    x = x.flatten(2).gather(2, places).view_as(x)
    return gaussian_blur(x, sigma, truncate=4, border=replicate)


def _wander(count: int, pixels: list[int], jumps: list[int]) -> list[int]:
    """Return which pixel each one shows after the moves in turn."""
    shown = list(range(count))
    for pixel, jump in zip(pixels, jumps, strict=True):
        shown[pixel] = shown[pixel + jump]
    return shown


def motion_blur(x: Tensor, level: tuple[int, float], draws: Draws) -> Tensor:
    """A camera that moves, in a direction of -45 to 45 degrees."""
    return smear(x, *level, degrees=draws.between(-45, 45))


def zoom_blur(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """The mean of the image and of ever larger enlargements of its centre."""
    factors = np.arange(1, *level).tolist()  # the published list, with the rounding of its end
    return (x + sum(centre_zoom(x, factor) for factor in factors)) / (len(factors) + 1)

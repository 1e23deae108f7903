"""Corruptions by weather."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.evaluation.corruptions.basics import Draws, centre_zoom, smear

# Luma of red, green and blue.
LUMA = (0.299, 0.587, 0.114)

# What frost adds, against the mean of the channels, and the range of its mean over images: measured on the first five
# photographs that come with ImageNet-C.
FROST_TINT = (0.90, 1.02, 1.08)
FROST_SHADE = (0.44, 0.80)
NEEDLES = 12


def grey(x: Tensor) -> Tensor:
    """Return the brightness [n, 1, H, W]: luma of three channels, else the mean of all."""
    channels = x.split(1, 1)
    weights = LUMA if len(channels) == 3 else (1 / len(channels),) * len(channels)
    return sum(
        (weight * channel for weight, channel in zip(weights, channels, strict=True)), torch.zeros_like(x[:, :1])
    )


def snow(x: Tensor, level: tuple[float, float, float, float, int, float, float], draws: Draws) -> Tensor:
    """Falling flakes before a whitened image."""
    mean, deviation, zoom, threshold, radius, sigma, share = level
    flakes = centre_zoom(mean + deviation * draws.normal(1, *x.shape[-2:]), zoom)
    flakes = torch.where(flakes < threshold, 0, flakes).clamp(0, 1)
    flakes = smear(flakes, radius, sigma, degrees=draws.between(-135, -45))
    whitened = share * x + (1 - share) * torch.maximum(x, grey(x) * 1.5 + 0.5)
    return whitened + flakes + flakes.flip(2, 3)


def frost(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """Ice on the window: ``share`` of the image plus ``strength`` of frost.

    The original takes crops of photographs; the frost here is drawn by `ice`, with the brightness, contrast and tint of
    those.
    """
    share, strength = level
    tint = torch.tensor(FROST_TINT if x.shape[1] == 3 else (1.0,), dtype=x.dtype, device=x.device)
    return share * x + strength * ice(x.shape[-2], x.shape[-1], draws) * tint.view(1, -1, 1, 1)


def ice(height: int, width: int, draws: Draws) -> Tensor:
    """Return a texture of needles [n, 1, H, W] in [0, 1]: ridges of stretched noise in many directions.

    A layer is smooth noise seen through a turned and stretched grid. Where it crosses its middle lies a bright line, as
    bright as a second noise lets it be; the brightest of all layers counts. Needles are as long in shares of the
    shorter side whatever the size.
    """
    side = min(height, width)
    down, right = ((torch.arange(size) - (size - 1) / 2) / side for size in (height, width))
    down, right = (axis.to(draws.ids.device, draws.dtype) for axis in (down[:, None], right[None, :]))
    brightest = torch.zeros(len(draws.ids), 1, height, width, dtype=draws.dtype, device=draws.ids.device)
    for layer in range(NEEDLES):
        angle, scale = draws.between(0, torch.pi).view(-1, 1, 1), 0.25 + 0.75 * layer / (NEEDLES - 1)
        along = (right * angle.cos() + down * angle.sin()) * scale
        across = (down * angle.cos() - right * angle.sin()) * scale
        ridge = 1 - 2 * (_smooth(draws, (64, 16), across, along) - 0.5).abs()
        brightest = torch.maximum(brightest, ridge**2 * _smooth(draws, (12, 12), across, along))
    shade = draws.between(*FROST_SHADE).view(-1, 1, 1, 1)
    return (shade + 0.9 * (brightest - 0.6)).clamp(0, 1)


def _smooth(draws: Draws, cells: tuple[int, int], down: Tensor, right: Tensor) -> Tensor:
    """Return noise of ``cells`` random values over [-1, 1] x [-1, 1], read at positions [n, H, W] each."""
    grid = torch.stack([right, down], 3)
    return F.grid_sample(draws.uniform(1, *cells), grid, "bilinear", "reflection", align_corners=True)


def fog(x: Tensor, level: tuple[float, float], draws: Draws) -> Tensor:
    """A fractal cloud before the image, which keeps its largest value."""
    thickness, decay = level
    height, width = x.shape[-2:]
    most = x.amax((1, 2, 3), keepdim=True)
    size = 1 << (max(height, width) - 1).bit_length()
    return (x + thickness * cloud(size, decay, draws)[:, :, :height, :width]) * most / (most + thickness)


def cloud(size: int, decay: float, draws: Draws) -> Tensor:
    """Return height maps [n, 1, size, size] in [0, 1] by the diamond-square algorithm; size is a power of two.

    They wrap around. From one octave to the next the noise shrinks by decay squared, as in the original.
    """
    wobble = 2 * draws.uniform(1, size, size) - 1
    heights = torch.zeros_like(wobble)
    step, amplitude = size, 1.0
    while step > 1:
        half = step // 2
        first, second = slice(0, None, step), slice(half, None, step)
        corners = heights[..., first, first]
        pair = corners + corners.roll(-1, -2)
        centres = (pair + pair.roll(-1, -1)) / 4 + amplitude * wobble[..., second, second]
        heights[..., second, second] = centres
        for axis, at in ((-1, (..., first, second)), (-2, (..., second, first))):
            # Between two corners along the axis, and between two centres across it.
            mean = (corners + corners.roll(-1, axis) + centres + centres.roll(1, -3 - axis)) / 4
            heights[at] = mean + amplitude * wobble[at]
        step, amplitude = half, amplitude / decay**2
    low, high = heights.amin((2, 3), keepdim=True), heights.amax((2, 3), keepdim=True)
    return (heights - low) / (high - low)

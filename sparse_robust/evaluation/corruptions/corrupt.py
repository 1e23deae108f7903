"""The registry of corruptions, and the one function that applies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_robust.errors import UsageError, unknown
from sparse_robust.evaluation.corruptions import blur, digital, noise, weather
from sparse_robust.evaluation.corruptions.basics import Draws
from sparse_robust.evaluation.corruptions.levels import LEVELS, levels_for
from sparse_robust.seeding import derive_seed

SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE = 8


@dataclass(frozen=True)
class Corruption:
    """One of the corruptions.

    Attributes:
        apply: (images [n, C, H, W], level, draws) -> images, not yet clipped.
        group: ``noise``, ``blur``, ``weather`` or ``digital``.
        note: how it departs from the published one; empty where it does not.
    """

    apply: Callable[[Tensor, Any, Draws], Tensor]
    group: str
    note: str = ""


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(noise.gaussian_noise, "noise"),
    "shot_noise": Corruption(noise.shot_noise, "noise"),
    "impulse_noise": Corruption(noise.impulse_noise, "noise"),
    "defocus_blur": Corruption(blur.defocus_blur, "blur"),
    "glass_blur": Corruption(blur.glass_blur, "blur"),
    "motion_blur": Corruption(blur.motion_blur, "blur"),
    "zoom_blur": Corruption(blur.zoom_blur, "blur"),
    "snow": Corruption(weather.snow, "weather"),
    "frost": Corruption(
        weather.frost, "weather", note="a drawn texture of needles instead of the photographs of the original"
    ),
    "fog": Corruption(weather.fog, "weather"),
    "brightness": Corruption(digital.brightness, "digital"),
    "contrast": Corruption(digital.contrast, "digital"),
    "elastic_transform": Corruption(digital.elastic_transform, "digital"),
    "pixelate": Corruption(digital.pixelate, "digital"),
    "jpeg_compression": Corruption(digital.jpeg_compression, "digital"),
}


def corrupt(
    x: Tensor, name: str, severity: int, *, ids: Tensor | None = None, seed: int = 0, levels: str = "auto"
) -> Tensor:
    """Return images under one of the 15 corruptions of ImageNet-C, in [0, 1].

    What comes of an image is a function of (image, its id, seed, name, severity) alone: batch, order and rank do not
    matter. The published sets are stored in 8 bits (ImageNet-C as JPEG); here nothing is rounded after the corruption,
    and pictures are made at the size of the image, without the crop of the original. Frost is drawn, not photographed.

    Source: Hendrycks and Dietterich, Benchmarking neural network robustness to common corruptions and perturbations
    (2019), with the strengths of the scripts that made the published sets. ``levels`` chooses among these:

    - ``cifar``, made for 32 pixels, where the shorter side has at most 45;
    - ``tiny-imagenet``, made for 64, up to 120;
    - ``imagenet``, made for 224, beyond. Strengths in pixels do not grow with larger images, so these suffer less.

    Args:
        x: float32 or float64 images [n, C, H, W] in [0, 1], at least 8 x 8, any number of channels. Hue and luma only
            exist with three; otherwise brightness is the mean of the channels.
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.
        ids: int64 sample ids [n] that key the randomness; None means 0..n-1.
        seed: any integer.
        levels: ``cifar``, ``tiny-imagenet``, ``imagenet``, or ``auto``, which goes by the size.

    Raises:
        UsageError: for arguments of another kind.
    """
    if name not in CORRUPTIONS:
        raise unknown("corruption", name, CORRUPTIONS)
    if severity not in SEVERITIES or isinstance(severity, bool):
        raise UsageError(f"severity is one of 1, 2, 3, 4, 5, got {severity!r}.")
    ids = _checked(x, ids)
    level = LEVELS[name][levels_for(x.shape[-2], x.shape[-1], levels)][severity - 1]
    if not len(x):
        return x.clone()
    draws = Draws(ids, key=derive_seed(int(seed), "corruption", name), severity=severity, dtype=x.dtype)
    with torch.no_grad():
        return CORRUPTIONS[name].apply(x.detach().contiguous(), level, draws).clamp(0, 1).contiguous()


def _checked(x: Tensor, ids: Tensor | None) -> Tensor:
    """Return the sample ids on the device of the images, if both are as they should be."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.dim() != 4:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UsageError(f"corruptions take float images [n, C, H, W] in [0, 1], got {got}.")
    if min(x.shape[1:]) < 1 or min(x.shape[2:]) < LEAST_SIDE:
        raise UsageError(f"corruptions need images of at least {LEAST_SIDE} x {LEAST_SIDE}, got {list(x.shape[1:])}.")
    if len(x) and x.device.type == "cpu" and not 0 <= float(x.min()) <= float(x.max()) <= 1:
        raise UsageError(
            f"corruptions take images in [0, 1], got values from {float(x.min()):g} to {float(x.max()):g}. Divide "
            "8-bit pixels by 255, and normalise inside the model."
        )
    if ids is None:
        return torch.arange(len(x), device=x.device)
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != (len(x),):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UsageError(f"sample ids are int64 [{len(x)}] for these images, got {got}.")
    return ids.to(x.device)

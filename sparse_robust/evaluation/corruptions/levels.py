"""How strong each corruption is at severities 1 to 5: the published numbers, for three sizes of image.

Source: the scripts that made ImageNet-C, Tiny ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich, Benchmarking neural
network robustness to common corruptions and perturbations, 2019). Lengths are in pixels of the image, except where a
comment says shares of its side.
"""

from __future__ import annotations

from typing import Any

from sparse_robust.errors import unknown

# The shorter side of an image, up to which a table is used: half-way, on a log scale, between the sizes 32, 64 and 224
# that the tables were made for.
SIDES = {"cifar": 45, "tiny-imagenet": 120, "imagenet": 2**31}

# The script for 224 pixels counts on a side of 244.
_ELASTIC_SIDE = 244 / 224


def _elastic(*rows: tuple[float, float, float], side: float = 1.0) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(side * share for share in row) for row in rows)


LEVELS: dict[str, dict[str, tuple[Any, ...]]] = {
    # standard deviation
    "gaussian_noise": {
        "cifar": (0.04, 0.06, 0.08, 0.09, 0.10),
        "tiny-imagenet": (0.04, 0.08, 0.12, 0.15, 0.18),
        "imagenet": (0.08, 0.12, 0.18, 0.26, 0.38),
    },
    # photons of a white pixel
    "shot_noise": {
        "cifar": (500, 250, 100, 75, 50),
        "tiny-imagenet": (250, 100, 50, 30, 15),
        "imagenet": (60, 25, 12, 5, 3),
    },
    # share of the elements
    "impulse_noise": {
        "cifar": (0.01, 0.02, 0.03, 0.05, 0.07),
        "tiny-imagenet": (0.01, 0.02, 0.05, 0.08, 0.14),
        "imagenet": (0.03, 0.06, 0.09, 0.17, 0.27),
    },
    # radius of the disk, standard deviation of its edge
    "defocus_blur": {
        "cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "tiny-imagenet": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        "imagenet": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    # standard deviation of the blur, reach of a move, rounds
    "glass_blur": {
        "cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "tiny-imagenet": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        "imagenet": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    },
    # radius, standard deviation
    "motion_blur": {
        "cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "tiny-imagenet": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        "imagenet": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    # enlarged by 1, 1 + step, ... below the end
    "zoom_blur": {
        "cifar": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "tiny-imagenet": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "imagenet": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    },
    # flakes: mean, standard deviation, enlargement, threshold; their motion: radius, standard deviation; share of the
    # image that stays as it was
    "snow": {
        "cifar": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "tiny-imagenet": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8), (0.1, 0.2, 1, 0.5, 10, 4, 0.8), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        "imagenet": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    },
    # share of the image, share of the frost
    "frost": {
        "cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "tiny-imagenet": ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        "imagenet": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    },
    # thickness, decay of the fractal from octave to octave
    "fog": {
        "cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "tiny-imagenet": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        "imagenet": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    },
    # added to the value of hue, saturation, value
    "brightness": {
        "cifar": (0.05, 0.1, 0.15, 0.2, 0.3),
        "tiny-imagenet": (0.1, 0.2, 0.3, 0.4, 0.5),
        "imagenet": (0.1, 0.2, 0.3, 0.4, 0.5),
    },
    # share of the contrast that is left
    "contrast": {
        "cifar": (0.75, 0.5, 0.4, 0.3, 0.15),
        "tiny-imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
        "imagenet": (0.4, 0.3, 0.2, 0.1, 0.05),
    },
    # shares of the side: strength and smoothness of the displacement, reach of the affine map
    "elastic_transform": {
        "cifar": _elastic((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "tiny-imagenet": _elastic(
            (0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)
        ),
        "imagenet": _elastic(
            (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02),
            side=_ELASTIC_SIDE,
        ),
    },
    # share of the side that is left
    "pixelate": {
        "cifar": (0.95, 0.9, 0.85, 0.75, 0.65),
        "tiny-imagenet": (0.9, 0.8, 0.7, 0.6, 0.5),
        "imagenet": (0.6, 0.5, 0.4, 0.3, 0.25),
    },
    # quality
    "jpeg_compression": {
        "cifar": (80, 65, 58, 50, 40),
        "tiny-imagenet": (65, 58, 50, 40, 25),
        "imagenet": (25, 18, 15, 10, 7),
    },
}  # fmt: skip


def levels_for(height: int, width: int, levels: str = "auto") -> str:
    """Return the name of the table for images of this size: ``levels`` itself, unless it is ``auto``.

    Raises:
        UsageError: for an unknown table.
    """
    if levels == "auto":
        return next(name for name, side in SIDES.items() if min(height, width) <= side)
    if levels not in SIDES:
        raise unknown("table of corruption levels", levels, [*SIDES, "auto"])
    return levels

"""The small classification problem on which attacks and training steps are timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_robust.models import create_model

EPS = 0.1


@dataclass(frozen=True)
class Problem:
    """A network, and one batch of noise for it: the time of a step does not depend on what the pictures show."""

    name: str
    network: nn.Module
    x: torch.Tensor  # [n, C, H, W] in [0, 1]
    y: torch.Tensor  # [n]

    def copy(self) -> nn.Module:
        """Return an independent network with the same weights."""
        return copy.deepcopy(self.network)


def problem(device: torch.device, scale: str) -> Problem:
    """Return a toy at quick scale; else the quickstart's network on the CPU, and a ResNet-18 for 32 x 32 on a GPU."""
    kwargs: dict[str, Any]
    if scale == "quick":
        batch, channels, size, name, kwargs = 8, 1, 28, "resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}
    elif device.type == "cpu":
        batch, channels, size, name, kwargs = (
            128,
            1,
            28,
            "resnet10t",
            {"channels": (32, 64, 128, 256), "stem_width": 16},
        )
    else:
        batch, channels, size, name, kwargs = 512, 3, 32, "resnet18", {"stem": "small"}
    network = create_model(name, num_classes=10, in_chans=channels, seed=0, **kwargs).to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, channels, size, size, generator=generator).to(device)
    y = torch.randint(10, (batch,), generator=generator).to(device)
    return Problem(f"{name} {batch}x{channels}x{size}x{size}", network, x, y)

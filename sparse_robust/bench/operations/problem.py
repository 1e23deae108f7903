"""The small classification problem on which attacks and training steps are timed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import pairwise
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
    return of_network(
        device, name, batch, channels, size, create_model(name, num_classes=10, in_chans=channels, seed=0, **kwargs)
    )


def perceptron(device: torch.device, scale: str) -> Problem:
    """Return a network that is all weights, 20 million at full scale, where a step reads each of them a few times."""
    widths = (784, 4096, 4096, 10) if scale == "full" else (784, 32, 10)
    layers: list[nn.Module] = [nn.Flatten()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    name = "perceptron " + "-".join(map(str, widths))
    return of_network(device, name, 128 if scale == "full" else 8, 1, 28, nn.Sequential(*layers[:-1]))


def small_resnet18(device: torch.device, scale: str) -> Problem:
    """Return a ResNet-18 for 32 x 32 images with a small batch, 11 million weights."""
    return of_network(device, "resnet18", 16, 3, 32, create_model("resnet18", num_classes=10, stem="small", seed=0))


def of_network(device: torch.device, name: str, batch: int, channels: int, size: int, network: nn.Module) -> Problem:
    """Return a problem of this network and a batch of that shape."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, channels, size, size, generator=generator).to(device)
    y = torch.randint(10, (batch,), generator=generator).to(device)
    return Problem(f"{name} {batch}x{channels}x{size}x{size}", network.to(device), x, y)

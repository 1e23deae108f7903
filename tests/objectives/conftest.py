"""A network that trains in a blink, with batch norm, and a batch of images for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def make_net() -> Callable[..., nn.Module]:
    def make(seed: int = 0, norm: bool = True) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(6 * 25, 4),
        )

    return make


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 1, 5, 5, generator=generator)
    x[0].fill_(0.0)
    x[1].fill_(1.0)
    return x, torch.randint(4, (12,), generator=generator), torch.arange(100, 112)

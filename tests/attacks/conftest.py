"""A network that attacks find neither trivial nor impossible, trained in about a second on images made here."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 5


class Trained(NamedTuple):
    """A network in eval mode, and test images [n, 3, 8, 8] with labels and sample ids."""

    model: nn.Module
    x: Tensor
    y: Tensor
    ids: Tensor


def make_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def make_images(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weak coarse patterns, one a class, under noise; clipped, so that exact zeros and ones occur."""
    patterns = torch.rand(CLASSES, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    y = torch.randint(CLASSES, (count,), generator=generator)
    x = 0.5 + 0.35 * (F.interpolate(patterns[y], 8) - 0.5) + 0.25 * torch.randn(count, 3, 8, 8, generator=generator)
    return x.clamp(0, 1), y


@pytest.fixture(scope="session")
def _trained() -> Trained:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, generator = make_network(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(60):
            x, y = make_images(128, generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        x, y = make_images(200, generator)
    return Trained(model.eval(), x, y, torch.arange(1000, 1200))


@pytest.fixture
def trained(_trained: Trained) -> Trained:
    """A copy, so that no test sees what another did to the model."""
    return _trained._replace(model=copy.deepcopy(_trained.model))

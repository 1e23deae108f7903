"""A small network with everything that matters here: convolutions, norms with counters, a downsample path, a head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three convolutions and a head of 4 classes for images [3, 8, 8]; 27 * 8 + 72 * 8 + 72 * 12 prunable weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 12, 3, stride=2)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x + torch.relu(self.bn2(self.conv2(x)))
        out: Tensor = self.fc(torch.relu(self.conv3(x)).mean((2, 3)))
        return out


@pytest.fixture
def make_net() -> Callable[..., SmallNet]:
    def make(seed: int = 0) -> SmallNet:
        torch.manual_seed(seed)
        return SmallNet()

    return make


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.rand(8, 3, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(8)
    ]

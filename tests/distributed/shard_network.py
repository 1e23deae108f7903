"""A small network for sharding: layers with fewer rows than there are processes, odd sizes, norms, a shared block."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """Images [3, 8, 8] to 5 logits; prunable weights of 7, 6, 1 and 2 rows."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(7) if norm else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(7, 6, 3, bias=False), nn.ReLU())
        self.gate = nn.Conv2d(6, 1, 1)
        self.narrow = nn.Linear(6, 2)
        self.fc = nn.Linear(2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.norm(self.stem(x))))
        x = (x * torch.sigmoid(self.gate(x))).mean((2, 3))
        out: Tensor = self.fc(self.narrow(x))
        return out


def make(seed: int = 0, norm: bool = True) -> Network:
    torch.manual_seed(seed)
    return Network(norm)


def batch(step: int, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.rand(size, 3, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator)

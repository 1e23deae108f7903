"""A small network with batch norm, trained for a second on real digits, and test images of them."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.data import DataSpec, eval_loader, load_data


class Digits(NamedTuple):
    """A network in eval mode, and 64 test images [n, 1, 8, 8] with labels and sample ids."""

    model: nn.Module
    x: Tensor
    y: Tensor
    ids: Tensor


def make_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


@pytest.fixture(scope="session")
def _digits() -> Digits:
    data = load_data(DataSpec(name="digits"))
    images, labels, _ = next(iter(eval_loader(data.train, len(data.train))))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for step in range(150):
            at = torch.randint(len(images), (128,))
            x = (images[at] + 0.1 * torch.randn(128, *images.shape[1:])).clamp(0, 1) if step % 2 else images[at]
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[at]).backward()
            optimizer.step()
        optimizer.zero_grad()
    return Digits(model.eval(), *next(iter(eval_loader(data.test, 64, limit=64))))


@pytest.fixture
def digits(_digits: Digits) -> Digits:
    """A copy, so that no test sees what another did to the model."""
    return _digits._replace(model=copy.deepcopy(_digits.model))

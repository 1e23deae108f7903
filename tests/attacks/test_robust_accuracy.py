"""Robust accuracy behaves as robust accuracy must, and pixel budgets mean pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks import PGD

RADII = [0, 2 / 255, 4 / 255, 8 / 255, 16 / 255]


def robust_accuracy(trained: Any, attack: PGD, eps: float) -> float:
    model, x, y, ids = trained
    return 100 * float((~attack.run(model, x, y, eps=eps, ids=ids).success).float().mean())


@pytest.mark.acceptance("double-win", "A-23")
@pytest.mark.parametrize("loss", ["ce", "cw"])
def test_robust_accuracy_falls_with_the_radius(trained: Any, loss: str) -> None:
    attack = PGD(steps=20, loss=loss)
    series = [robust_accuracy(trained, attack, eps) for eps in RADII]
    assert all(later <= earlier + 0.5 for earlier, later in zip(series, series[1:], strict=False)), series
    assert 10 < series[3] < series[0] - 10, series  # the network is worth the test: neither 0 nor unmoved
    clean = 100 * float((trained.model(trained.x).argmax(1) == trained.y).float().mean())
    assert series[0] == clean > 80
    assert robust_accuracy(trained, attack, 128 / 255) < 20  # chance, for five classes


@pytest.mark.acceptance("double-win", "A-23")
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_restarts_never_help_the_defence(trained: Any, norm: str) -> None:
    gained = 0
    for eps in (0.02, 0.04) if norm == "Linf" else (0.3, 0.6, 0.9):
        single = PGD(norm=norm, steps=1, step_size=eps / 4)
        restarted = dataclasses.replace(single, n_restarts=10)
        model, x, y, ids = trained
        first, many = (attack.run(model, x, y, eps=eps, ids=ids).success for attack in (single, restarted))
        assert (many >= first).all()  # image by image: restart 0 is the single attack
        gained += int(many.sum() - first.sum())
    assert gained > 0


def test_more_steps_and_the_margin_loss_find_at_least_about_as_much(trained: Any) -> None:
    few, many, margin = (
        robust_accuracy(trained, PGD(steps=steps, step_size=8 / 255 / 4, loss=loss), 8 / 255)
        for steps, loss in ((2, "ce"), (20, "ce"), (20, "cw"))
    )
    assert many < few
    assert abs(margin - many) < 5


class Normalised(nn.Module):
    """A network behind its normalisation, which remembers what it was shown."""

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean.view(1, 3, 1, 1), std.view(1, 3, 1, 1)
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.mean) / self.std
        self.shown.append(z.detach())
        logits: Tensor = self.network(z)
        return logits


@pytest.mark.acceptance("double-win", "A-22")
def test_a_pixel_radius_is_eps_over_std_in_normalised_space(trained: Any) -> None:
    _, x, y, ids = trained
    mean, std, eps = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]), 8 / 255
    model = Normalised(trained.model, mean, std)
    x_adv = PGD(steps=4)(model, x, y, eps="8/255", ids=ids)
    with torch.no_grad():
        inside, outside = model(x_adv), trained.model((x_adv - model.mean) / model.std)
    assert ((inside - outside).abs() <= 1e-5 * outside.abs()).all()
    clean = (x - model.mean) / model.std
    for z in model.shown:
        reached = (z - clean).abs().amax((0, 2, 3))
        assert (reached <= eps / std * (1 + 1e-5)).all()
    # The last iterate uses the radius up, in each channel its own.
    torch.testing.assert_close((model.shown[-1] - clean).abs().amax((0, 2, 3)), eps / std, rtol=1e-5, atol=0)


@pytest.mark.acceptance("double-win", "A-22")
def test_normalising_inside_or_before_is_the_same_attack(trained: Any) -> None:
    """A pixel attack equals one in normalised space with bounds and steps divided by std, channel by channel."""
    _, x, y, _ = trained
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(1, 3, 1, 1)
    model, eps, step_size = Normalised(trained.model, mean, std), 8 / 255, 2 / 255
    attack = PGD(steps=5, step_size=step_size, random_start=False)
    x_adv = attack(model, x, y, eps=eps)
    z = clean = (x - mean) / std
    lo, hi = torch.maximum(clean - eps / std, -mean / std), torch.minimum(clean + eps / std, (1 - mean) / std)
    for _ in range(5):
        leaf = z.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(trained.model(leaf), y, reduction="sum")
        z = (z + step_size / std * torch.autograd.grad(loss, leaf)[0].sign()).clamp(lo, hi)
    # Rounding flips the sign of a few gradients that are nearly zero.
    assert ((x_adv - (z * std + mean)).abs() < 1e-6).float().mean() > 0.99

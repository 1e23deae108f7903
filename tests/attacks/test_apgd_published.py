"""APGD against what is known: optima of linear models, and a plain second implementation of the published algorithm."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.attacks import Budget
from sparse_robust.attacks.apgd import APGD
from sparse_robust.attacks.l1 import project_l1_box
from sparse_robust.attacks.losses import dlr, dlr_targeted
from sparse_robust.attacks.norms import L2_ROOM
from tests.attacks.walks import RADII, binary, walk

LOSSES = ["ce", "dlr", "cw", "dlr-targeted", "ce-targeted"]


@pytest.mark.acceptance("double-win", "A-18")
@pytest.mark.parametrize("loss", LOSSES)
def test_linf_reaches_the_optimum_of_a_linear_model_exactly(loss: str) -> None:
    x, y = torch.rand(16, 3, 4, 4), torch.arange(16) % 2
    model, eps = binary(0.1 * torch.randn(48)), RADII["Linf"]
    away = model.weight[1].detach().view(3, 4, 4).sign() * (1 - 2 * y.view(-1, 1, 1, 1))
    *_, (last, _) = walk(APGD(steps=20, loss=loss).prepare(Budget("Linf", eps), 2), model, x, y)
    assert torch.equal(last["shown"], Budget("Linf", eps).project(x + 2 * eps * away, x))
    torch.testing.assert_close(last["best"], last["shown"], rtol=0, atol=1e-6)


@pytest.mark.acceptance("double-win", "A-18")
@pytest.mark.parametrize("loss", LOSSES)
def test_l2_reaches_the_optimum_of_a_linear_model(loss: str) -> None:
    x, y = 0.4 + 0.2 * torch.rand(16, 3, 4, 4), torch.arange(16) % 2
    model, eps = binary(0.1 * torch.randn(48)), RADII["L2"]
    unit = (model.weight[1] / model.weight[1].norm()).detach().view(3, 4, 4) * (1 - 2 * y.view(-1, 1, 1, 1))
    *_, (last, _) = walk(APGD(norm="L2", steps=100, loss=loss).prepare(Budget("L2", eps), 2), model, x, y)
    for image in (last["best"], last["shown"]):
        gain = ((image - x) * unit).flatten(1).sum(1)
        assert (gain >= 0.9999 * eps).all()
        torch.testing.assert_close(image, x + eps * unit, rtol=0, atol=eps * 0.015)


@pytest.mark.acceptance("double-win", "A-18")
@pytest.mark.parametrize("schedule", [True, False])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_l1_reaches_the_optimum_of_a_linear_model(loss: str, schedule: bool) -> None:
    """The best sparse change fills the elements with the largest weights, each up to the box, until eps is used up."""
    x, y = torch.rand(16, 3, 4, 4), torch.arange(16) % 2
    model, eps = binary(0.1 * torch.randn(48)), RADII["L1"]
    away = model.weight[1].detach() * (1 - 2 * y[:, None])
    room = torch.where(away > 0, 1 - x.flatten(1), x.flatten(1))
    order = away.abs().argsort(1, descending=True)
    used = room.gather(1, order).cumsum(1).clamp(max=eps)
    gains = torch.cat([used[:, :1], used.diff(dim=1)], 1) * away.abs().gather(1, order)
    attack = APGD(norm="L1", steps=100, loss=loss, large_eps_schedule=schedule)
    *_, (last, _) = walk(attack.prepare(Budget("L1", eps), 2), model, x, y)
    gained = ((last["best"] - x).flatten(1) * away).sum(1)
    assert (gained <= gains.sum(1) * (1 + 1e-5)).all()
    assert (gained >= 0.98 * gains.sum(1)).all()
    assert Budget("L1", eps).contains(last["best"], x).all()


def plain_check(history: list[float], best_at_checks: list[float], best: float, interval: int, halved: bool) -> bool:
    """The two conditions of the paper, section 3.2."""
    rises = sum(history[-i] > history[-i - 1] for i in range(1, interval + 1))
    stuck = len(best_at_checks) > 0 and not halved and best_at_checks[-1] >= best
    return rises <= 0.75 * interval or stuck


def plain_apgd(loss_of: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, eps: float, steps: int, norm: str) -> Any:
    """One image, with its history kept; the images shown and the step sizes."""

    def project(point: Tensor) -> Tensor:
        if norm == "Linf":
            return point.clamp(x - eps, x + eps).clamp(0, 1)
        delta = point - x
        return (x + delta * min(1.0, eps * (1 - L2_ROOM) / float(delta.norm()))).clamp(0, 1)

    def evaluate(point: Tensor) -> tuple[float, Tensor]:
        leaf = point.clone().requires_grad_(True)
        value = loss_of(leaf)
        return float(value.detach()), torch.autograd.grad(value, leaf)[0]

    size, here, previous = 2 * eps, start, start
    loss, grad = evaluate(start)
    best, history, shown, sizes = (loss, start, grad), [loss], [start], list[float]()
    interval = max(int(0.22 * steps), 1)
    due, checked, halved = interval, list[float](), True
    for step in range(steps):
        if step == due:
            halved = plain_check(history, checked, best[0], interval, halved)
            if halved:
                size, here, grad = size / 2, best[1], best[2]
            checked.append(best[0])
            interval = max(interval - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
            due += interval
        sizes.append(size)
        ahead = project(here + size * (grad.sign() if norm == "Linf" else grad / grad.norm()))
        share = 0.75 if step else 1.0
        here, previous = project(here + share * (ahead - here) + (1 - share) * (here - previous)), here
        loss, grad = evaluate(here)
        history.append(loss)
        shown.append(here)
        if loss > best[0]:
            best = (loss, here, grad)
    return shown, sizes


@pytest.mark.parametrize("steps", [3, 40])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_is_the_published_algorithm(trained: Any, norm: str, loss: str, steps: int) -> None:
    """Image by image, in float64."""
    model, x, y = trained.model.double(), trained.x[:8].double(), trained.y[:8]
    procedure = APGD(norm=norm, loss=loss, steps=steps).prepare(Budget(norm, RADII[norm]), 5)
    states = list(walk(procedure, model, x, y))
    for i in range(len(x)):

        def loss_of(point: Tensor, i: int = i) -> Tensor:
            logits, label = model(point[None]), y[i : i + 1]
            if loss == "ce":
                return F.cross_entropy(logits, label)
            if loss == "dlr":
                return dlr(logits, label)[0]
            return dlr_targeted(logits, label, states[0][0]["target"][i : i + 1])[0]

        shown, sizes = plain_apgd(loss_of, x[i], states[0][0]["shown"][i], RADII[norm], steps, norm)
        assert [float(rows["step_size"][i]) for rows, _ in states[1:]] == pytest.approx(sizes, rel=1e-12)
        for (rows, _), expected in zip(states, shown, strict=True):
            torch.testing.assert_close(rows["shown"][i], expected, rtol=0, atol=1e-7)


def plain_l1(
    gradient: Callable[[Tensor], tuple[float, Tensor]], x: Tensor, start: Tensor, eps: float, steps: int, ball: int
) -> tuple[list[Tensor], Tensor]:
    """One image in one ball; the images shown, and the best."""
    here, numel = start, x.numel()
    changed = int((start != x).sum()) if ball else numel
    share = changed / numel / 1.5 if ball else 0.2
    size, apart = eps, max(int(0.04 * steps), 1)
    value, grad = gradient(here)
    best, shown = (value, here, grad), [here]
    for step in range(1, steps + 1):
        # Where (1 - share) * numel is a whole number its rounding decides; there is no such case below.
        least = grad.abs().flatten().sort().values[int(max(0, min((1 - share) * numel, numel - 1)))]
        signs = torch.where(grad.abs() >= least, grad.sign(), 0)
        here = project_l1_box((here + size * signs / signs.abs().sum())[None], x[None], eps)[0]
        value, grad = gradient(here)
        shown.append(here)
        if value > best[0]:
            best = (value, here, grad)
        if step % apart == 0:
            now = int((best[1] != x).sum())
            share, sparser = now / numel / 1.5, now / changed < 0.95
            size = eps if sparser else max(size / 1.5, eps / 10)
            changed = now
            if sparser:
                here, grad = best[1], best[2]
    return shown, best[1]


@pytest.mark.parametrize("schedule", [True, False])
@pytest.mark.parametrize("steps", [7, 40])
def test_l1_apgd_is_the_published_algorithm(trained: Any, steps: int, schedule: bool) -> None:
    model, x, y, eps = trained.model.double(), trained.x[:6].double(), trained.y[:6], RADII["L1"]
    attack = APGD(norm="L1", steps=steps, large_eps_schedule=schedule)
    states = [rows["shown"] for rows, _ in walk(attack.prepare(Budget("L1", eps), 5), model, x, y)]
    early = math.ceil(0.3 * steps)
    parts = [(3, early), (2, early), (1, steps - 2 * early)] if schedule else [(1, steps)]
    for i in range(len(x)):

        def gradient(point: Tensor, i: int = i) -> tuple[float, Tensor]:
            leaf = point[None].clone().requires_grad_(True)
            value = F.cross_entropy(model(leaf), y[i : i + 1])
            return float(value.detach()), torch.autograd.grad(value, leaf)[0][0]

        shown, best = list[Tensor](), states[0][i]
        for times, count in parts:
            start = project_l1_box(best[None], x[i : i + 1], times * eps)[0]
            seen, best = plain_l1(gradient, x[i], start, times * eps, count, len(parts) - 1)
            shown += seen
        for state, expected in zip(states, shown, strict=True):
            torch.testing.assert_close(state[i], expected, rtol=0, atol=1e-6)

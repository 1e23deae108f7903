"""Free-AT against its pseudo-code, and its perturbation as a part of a run's state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.objectives import build_objective
from sparse_robust.objectives.free import FreeObjective

EPS, REPLAYS, LR = 0.1, 3, 0.05


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sizes = (12, 12, 5, 12)  # a short batch in between
    return [(torch.rand(n, 1, 5, 5, generator=generator), torch.randint(4, (n,), generator=generator)) for n in sizes]


def literal(net: nn.Module) -> tuple[nn.Module, Tensor]:
    """Algorithm 1 of the paper, with the perturbation clipped to the box where it is added."""
    delta = torch.zeros(12, 1, 5, 5)
    for x, y in batches():
        n = len(y)
        for _ in range(REPLAYS):
            noise = delta[:n].clone().requires_grad_()
            weights = list(net.parameters())
            loss = F.cross_entropy(net((x + noise).clamp(0, 1)), y)
            *g_weights, g_noise = torch.autograd.grad(loss, [*weights, noise])
            with torch.no_grad():
                for weight, gradient in zip(weights, g_weights, strict=True):
                    weight -= LR * gradient
                delta[:n] = (delta[:n] + EPS * g_noise.sign()).clamp(-EPS, EPS)
    return net, delta


def train(net: nn.Module, objective: FreeObjective, only: slice = slice(None)) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    for x, y in batches()[only]:
        for _ in range(objective.replays):
            loss, _ = objective(net, net, x, y, torch.arange(len(y)), seed=0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def free() -> FreeObjective:
    objective = build_objective("free", eps=EPS, replays=REPLAYS)
    assert isinstance(objective, FreeObjective)
    return objective


def test_it_is_the_pseudo_code(make_net: Callable[..., nn.Module]) -> None:
    objective = free()
    ours, (theirs, delta) = train(make_net(), objective), literal(make_net())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    assert objective.delta is not None and torch.equal(objective.delta, delta)
    assert delta.abs().max() == EPS


def test_an_interrupted_run_goes_on_where_it_was(make_net: Callable[..., nn.Module]) -> None:
    whole, first, second = free(), free(), free()
    expected = train(make_net(), whole)
    net = train(make_net(), first, slice(2))
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    net = train(net, second, slice(2, None))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert torch.equal(second.delta, whole.delta)  # type: ignore[arg-type]
    fresh = free()
    fresh.load_state_dict(free().state_dict())
    assert fresh.delta is None


def test_scaled_and_missing_gradients(make_net: Callable[..., nn.Module]) -> None:
    objective = free()
    x, y = batches()[0]
    loss, _ = objective(make_net(), make_net(), x, y, torch.arange(12), seed=0)
    (loss * 65536).backward()  # as a gradient scaler has it
    other = free()
    loss, _ = other(make_net(), make_net(), x, y, torch.arange(12), seed=0)
    loss.backward()
    assert torch.equal(objective.delta, other.delta)  # type: ignore[arg-type]
    other._ascend(torch.full((12, 1, 5, 5), torch.nan))
    assert torch.equal(objective.delta, other.delta)  # type: ignore[arg-type]

"""AWP against a slow literal version; weights come back bit for bit, pruned ones never move."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.masks import Masks
from sparse_robust.objectives import build_objective

Batch = tuple[Tensor, Tensor, Tensor]
EPS, GAMMA = 0.1, 0.05


def literal_direction(net: nn.Module, x_adv: Tensor, y: Tensor, masks: Masks | None) -> dict[str, Tensor]:
    """The authors' way: a proxy takes one optimizer step up the loss; its difference is scaled layer by layer."""
    proxy = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    optimizer.zero_grad()
    (-F.cross_entropy(proxy(x_adv), y)).backward()
    optimizer.step()
    moved = {}
    for (name, old), new in zip(net.named_parameters(), proxy.parameters(), strict=True):
        if old.dim() <= 1:
            continue
        difference = (new - old).detach()
        if masks is not None and name in masks:
            difference = torch.where(masks[name], difference, 0.0)
        moved[name] = old.detach().norm() / (difference.norm() + 1e-20) * difference
    return moved


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_it_is_the_literal_version(masked: bool, make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    net = make_net().double().train()
    masks = Masks.from_bools({"0.weight": torch.rand(6, 1, 3, 3) < 0.5}) if masked else None
    if masks is not None:
        masks.apply_(net)
    reference = copy.deepcopy(net)
    objective = build_objective("adversarial", eps=EPS, steps=2, awp=GAMMA)
    x_adv, _ = objective.craft(net, x.double(), y, ids, seed=1)

    for name, step in literal_direction(reference, x_adv, y, masks).items():
        reference.get_parameter(name).data.add_(GAMMA * step)
    expected = F.cross_entropy(reference(x_adv), y)
    expected.backward()

    before = {name: value.clone() for name, value in net.named_parameters()}
    with objective.around(net):
        loss, _ = objective(net, net, x.double(), y, ids, seed=1)
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter, reference.get_parameter(name), rtol=1e-9, atol=1e-12)
            if masks is not None and name in masks:
                pruned = parameter.detach()[~masks[name]]
                assert not pruned.view(torch.int64).any(), "pruned weights stay +0.0 while the others are perturbed"
        assert not torch.equal(net.get_parameter("0.weight"), before["0.weight"])
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter.detach().view(torch.int64), before[name].view(torch.int64)), name
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad, rtol=1e-8, atol=1e-12)
    # the search for the perturbation leaves no trace in the running statistics: one update, at the perturbed weights
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer, reference.get_buffer(name), rtol=1e-9, atol=0)


def test_each_layer_moves_by_its_own_norm(make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    net = make_net()
    before = copy.deepcopy(net)
    for regime in ("fast", "n-fgsm", "adversarial", "free", "trades", "mart"):
        objective = build_objective(regime, eps=EPS, steps=2, awp=GAMMA)
        with objective.around(net):
            objective(net, net, x, y, ids, seed=0)
            for name in ("0.weight", "4.weight"):
                moved = (net.get_parameter(name) - before.get_parameter(name)).detach().norm()
                assert (moved / before.get_parameter(name).detach().norm()).item() == pytest.approx(GAMMA, rel=1e-4)
            for name in ("1.weight", "1.bias", "4.bias"):
                assert torch.equal(net.get_parameter(name), before.get_parameter(name))


def test_it_makes_the_loss_worse(make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    for regime in ("adversarial", "trades", "mart"):
        net = make_net()
        plain, _ = build_objective(regime, eps=EPS, steps=2)(net, net, x, y, ids, seed=0)
        net = make_net()
        objective = build_objective(regime, eps=EPS, steps=2, awp=GAMMA)
        with objective.around(net):
            worse, _ = objective(net, net, x, y, ids, seed=0)
        assert worse.item() > plain.item()


def test_an_error_inside_puts_the_weights_back(make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    net, before = make_net(), make_net()
    objective = build_objective("adversarial", eps=EPS, steps=1, awp=GAMMA)
    with pytest.raises(KeyboardInterrupt), objective.around(net):
        objective(net, net, x, y, ids, seed=0)
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))


def test_layers_without_a_gradient_stay(batch: Batch) -> None:
    x, y, ids = batch
    net = nn.Sequential(nn.Flatten(), nn.Linear(25, 4))
    net.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    net[1].weight.data.zero_()
    objective = build_objective("fast", eps=EPS, awp=GAMMA)
    with objective.around(net):
        loss, _ = objective(net, net, x, y, ids, seed=0)
        assert loss.isfinite() and not net[1].weight.any() and torch.equal(net.unused, torch.ones(2, 2))  # type: ignore[arg-type]


def test_autocast_sees_the_perturbed_weights(make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    x, net = x + 0, make_net(norm=False)
    objective = build_objective("fast", eps=EPS, awp=1.0)  # so large that bfloat16 must show it
    with objective.around(net), torch.autocast("cpu", dtype=torch.bfloat16):
        net(x)  # autocast now holds the weights as they are
        loss, logits = objective(net, net, x, y, ids, seed=0)
        crafted, _ = objective.craft(net, x, y, ids, seed=0)
    fresh = make_net(norm=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unperturbed = fresh(crafted)
    assert (logits - unperturbed).abs().max() > 0.1
    loss.backward()

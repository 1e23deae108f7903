"""Regimes: their attacks against literal versions, their registry, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.errors import UsageError
from sparse_robust.objectives import REGIMES, build_objective
from sparse_robust.objectives.crafting import NFGSM, NearPGD

Batch = tuple[Tensor, Tensor, Tensor]
EPS = 0.1


def test_every_regime_has_its_line_and_gives_gradients(make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    assert list(REGIMES) == ["standard", "fast", "n-fgsm", "adversarial", "rgd", "free", "trades", "mart"]
    for name, regime in REGIMES.items():
        assert regime.name == name and regime.description.endswith(".") and regime.source
        net = make_net()
        objective = build_objective(name, eps=EPS, steps=2)
        with objective.around(net):
            loss, logits = objective(net, net, x, y, ids, seed=0)
            loss.backward()
        assert loss.isfinite() and logits.shape == (12, 4)
        assert all(parameter.grad is not None for parameter in net.parameters())
    assert [name for name, regime in REGIMES.items() if regime.single_step] == ["fast", "n-fgsm", "free"]


def test_n_fgsm_noise_fills_twice_the_radius_and_nothing_is_clipped(make_net: Callable[..., nn.Module]) -> None:
    x, y, ids = torch.full((400, 1, 5, 5), 0.5), torch.zeros(400, dtype=torch.int64), torch.arange(400)
    net = make_net().eval()
    noisy = NFGSM(step_size=0.0)(net, x, y, eps=EPS, ids=ids) - x
    assert noisy.abs().max() <= 2 * EPS + 1e-6 and noisy.abs().max() > 1.99 * EPS
    # uniform: mean 0, variance (2 eps)^2 / 3
    assert abs(noisy.mean()) < 0.01 * EPS and noisy.var() == pytest.approx((2 * EPS) ** 2 / 3, rel=0.03)

    crafted = NFGSM()(net, x, y, eps=EPS, ids=ids) - x
    shown = (x + noisy).requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(shown), y, reduction="sum"), shown)
    torch.testing.assert_close(crafted, noisy + EPS * gradient.sign(), rtol=0, atol=1e-6)
    assert crafted.abs().max() > 2.9 * EPS, "it leaves the ball"
    assert (crafted.abs() > EPS).float().mean() > 0.5


def test_n_fgsm_stays_in_the_box(make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    crafted = NFGSM()(make_net(), x, y, eps=0.4, ids=ids)
    assert crafted.min() >= 0 and crafted.max() <= 1


def literal_near(net: nn.Module, x: Tensor, start: Tensor, y: Tensor, steps: int, size: float, kl: bool) -> Tensor:
    """The crafting of TRADES (kl) and MART as their authors wrote it, in eval mode."""
    net.eval()
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        if kl:
            loss = F.kl_div(net(x_adv).log_softmax(1), net(x).softmax(1), reduction="sum")
        else:
            loss = F.cross_entropy(net(x_adv), y)
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + size * gradient.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    net.train()
    return x_adv


@pytest.mark.parametrize("regime", ["trades", "mart"])
def test_trades_and_mart_craft_as_published(regime: str, make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    net = make_net().train()
    for _ in range(3):
        net(x + torch.rand(1))  # running statistics that differ from the batch's
    before = {name: value.clone() for name, value in net.state_dict().items()}
    # whatever mode is asked for elsewhere, these two craft in eval mode
    objective = build_objective(regime, eps=EPS, steps=3, step_size=0.04, mode="train")
    assert objective.attack is not None and objective.attack.mode == "eval"
    shown, _ = objective.craft(net, x, y, ids, seed=5)
    start = replace(objective.attack, seed=5, steps=0)(net, x, y, eps=EPS, ids=ids)
    assert torch.equal(shown, literal_near(net, x, start, y, 3, 0.04, kl=regime == "trades"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_start_near_x_is_gaussian_and_keyed_by_sample(make_net: Callable[..., nn.Module]) -> None:
    x, y, ids = torch.full((2000, 1, 5, 5), 0.5), torch.zeros(2000, dtype=torch.int64), torch.arange(2000)
    attack = NearPGD(steps=0)
    noise = (attack(make_net(), x, y, eps=EPS, ids=ids) - x).double() / 0.001
    assert abs(noise.mean()) < 0.02 and noise.std() == pytest.approx(1, abs=0.01)
    assert (noise**4).mean() == pytest.approx(3, abs=0.15), "a normal distribution has kurtosis 3"
    some = attack(make_net(), x[:5], y[:5], eps=EPS, ids=ids[10:15])
    torch.testing.assert_close((some - x[:5]).double() / 0.001, noise[10:15], rtol=0, atol=1e-4)


@pytest.mark.parametrize("regime", ["fast", "n-fgsm", "adversarial", "trades", "mart"])
def test_noise_is_a_function_of_seed_and_id(regime: str, make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    net = make_net().eval()
    objective = build_objective(regime, eps=EPS, steps=2)
    whole, _ = objective.craft(net, x, y, ids, seed=3)
    part, _ = objective.craft(net, x[4:9], y[4:9], ids[4:9], seed=3)
    other, _ = objective.craft(net, x, y, ids, seed=4)
    torch.testing.assert_close(part, whole[4:9], rtol=0, atol=1e-6)
    assert not torch.equal(whole, other)


def test_rgd_crafts_as_its_authors_wrote_it(make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    net = make_net().eval()
    shown, _ = build_objective("rgd", eps=EPS, steps=3, step_size=20.0).craft(net, x, y, ids, seed=0)
    hidden = torch.zeros_like(x)
    for _ in range(3):
        leaf = (x + hidden.clamp(-EPS, EPS)).clamp(0, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), y, reduction="sum"), leaf)
        hidden = hidden + 20.0 * gradient
    torch.testing.assert_close(shown, (x + hidden.clamp(-EPS, EPS)).clamp(0, 1), rtol=0, atol=1e-6)
    assert (hidden.abs() > 2 * EPS).any() and ((shown - x).abs() < 0.9 * EPS).any(), "neither clipped nor all corners"


def test_where_an_attack_starts(make_net: Callable[..., nn.Module], batch: Batch) -> None:
    x, y, ids = batch
    published = {name: build_objective(name, eps=EPS).attack for name in ("fast", "adversarial", "rgd")}
    assert [attack.random_start for attack in published.values() if attack is not None] == [True, True, False]
    net = make_net().eval()
    for name in published:
        starts = [
            build_objective(name, eps=EPS, steps=1, random_start=random, step_size=0.0).craft(net, x, y, ids, seed=0)[0]
            for random in (False, True)
        ]
        assert torch.equal(starts[0], x) and not torch.equal(starts[1], x)


def test_published_numbers_are_the_defaults() -> None:
    assert build_objective("trades", eps="8/255").loss.keywords["beta"] == 6.0  # type: ignore[attr-defined]
    assert build_objective("mart", eps="8/255").loss.keywords["beta"] == 5.0  # type: ignore[attr-defined]
    assert build_objective("n-fgsm", eps=0.1).attack.resolve_step_size(0.1) == 0.1  # type: ignore[union-attr]
    assert build_objective("fast", eps=0.1).attack.resolve_step_size(0.1) == pytest.approx(0.125)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("regime", "settings", "message"),
    [
        ("tradez", {}, "unknown regime 'tradez'.*trades"),
        ("standard", {"awp": 0.01}, "awp is an option of the adversarial regimes"),
        ("adversarial", {"mixup": 0.2}, "mixup and cutmix are options of the regime standard"),
        ("free", {"cutmix": 1.0}, "mixup and cutmix are options of the regime standard"),
        ("free", {"norm": "L2"}, "free is defined for the norm Linf"),
        ("rgd", {"norm": "L2"}, "RGD is defined in norm Linf"),
        ("trades", {"random_start": False}, "random_start is an option of the regimes fast, adversarial, rgd; leave"),
        ("n-fgsm", {"norm": "L2"}, "N-FGSM is defined for the norm Linf"),
        ("free", {"replays": 0}, "replays must be at least 1, got 0"),
        ("trades", {"beta": -1.0}, "beta must be 0 or more, got -1.0"),
        ("trades", {"awp": float("nan")}, "awp must be 0 or more, got nan"),
    ],
)
def test_what_a_regime_refuses(regime: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_objective(regime, eps=EPS, **settings)

"""RGD and its relatives: the hidden perturbation, step sizes of one image, and APGD that begins with raw steps."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.attacks import PGD, Budget
from sparse_robust.attacks.apgd import APGD
from sparse_robust.attacks.procedure import Procedure, Rows, Seen, Task
from sparse_robust.attacks.rgd import RGD, RGDAPGD, boundary_ratio, calibrate_rgd_step, hidden_overshoot
from sparse_robust.errors import UsageError
from tests.attacks.walks import binary, walk

EPS = 8 / 255
VARIANTS = [(direction, recursion) for direction in ("raw", "sign") for recursion in ("hidden", "clipped")]
variants = pytest.mark.parametrize(("direction", "recursion"), VARIANTS)


class Robust(NamedTuple):
    """A network trained against an attack of radius ``eps``, and test images that it has not seen."""

    model: nn.Module
    x: Tensor
    y: Tensor
    eps: float


@pytest.fixture(scope="module")
def robust() -> Robust:
    """A small network for 8x8 digits, after some seconds of adversarial training."""
    digits, eps = load_digits(), 0.12
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None][order]
    y = torch.tensor(digits.target)[order]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        optimizer, attack = torch.optim.Adam(model.parameters(), lr=5e-3), PGD(steps=3, step_size=eps / 2)
        for _ in range(15):
            for batch in torch.randperm(1000).split(100):
                x_adv = attack(model, x[batch], y[batch], eps=eps, ids=batch)
                optimizer.zero_grad()
                F.cross_entropy(model(x_adv), y[batch]).backward()
                optimizer.step()
        optimizer.zero_grad()
    return Robust(model.eval(), x[1000:], y[1000:], eps)


def states_of(procedure: Procedure, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> list[Rows]:
    """Return the states at the start and after every step."""
    return [rows for rows, _ in walk(procedure, model, x, y)]


def scripted(attack: RGD, grads: list[float]) -> list[tuple[float, float]]:
    """Return hidden and visible perturbation of one pixel at 0, eps 1, after each of these gradients."""
    x, y = torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64)
    procedure, task, states = attack.prepare(Budget("Linf", 1.0), 2), Task(x, y, y, torch.zeros(1, 2)), []
    rows = procedure.start(task, y)
    for grad in grads:
        seen = Seen(task.logits, torch.zeros(1), torch.full((1, 1), grad))
        rows, _ = procedure.advance(task, rows, seen, lambda images: task.logits)
        states.append((float(rows["hidden"]), float(rows["shown"])))
    return states


def cross_entropy(model: nn.Module, x_adv: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(x_adv), y))


def robust_accuracy(model: nn.Module, x_adv: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(x_adv).argmax(1) == y).double().mean())


def published(attack: RGD | PGD, robust: Robust) -> tuple[float, float]:
    """Return mean cross-entropy and robust accuracy in percent of the last iterates."""
    x_adv = attack(robust.model, robust.x, robust.y, eps=robust.eps)
    return cross_entropy(robust.model, x_adv, robust.y), robust_accuracy(robust.model, x_adv, robust.y)


@pytest.mark.acceptance("rgd-attack", "1")
@variants
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step_size", ["auto", 1, 1e6])
def test_images_stay_in_the_budget(
    trained: Any, direction: str, recursion: str, random_start: bool, dtype: torch.dtype, step_size: Any
) -> None:
    model, x, y, ids = trained
    attack = RGD(direction=direction, recursion=recursion, random_start=random_start, step_size=step_size, keep="last")
    x = x[:40].to(dtype)
    x_adv = attack(model.to(dtype), x, y[:40], eps=EPS, ids=ids[:40])
    assert x_adv.dtype == dtype
    assert float((x_adv - x).abs().max()) <= EPS + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert Budget("Linf", EPS).contains(x_adv, x).all()
    assert not torch.equal(x_adv, x)


@pytest.mark.acceptance("rgd-attack", "2")
@pytest.mark.parametrize(
    ("recursion", "step_size"), [("hidden", EPS), ("hidden", 0.3), ("hidden", 1e6), ("clipped", EPS)]
)
def test_one_sign_step_is_fgsm(trained: Any, recursion: str, step_size: float) -> None:
    model, x, y, ids = trained
    leaf = x[:64].clone().requires_grad_(True)  # a batch of the size that attacks use
    (grad,) = torch.autograd.grad(F.cross_entropy(model(leaf), y[:64], reduction="sum"), leaf)
    x = x[:64]
    fgsm = (x + EPS * grad.sign()).clamp(0, 1)
    attack = RGD(steps=1, direction="sign", recursion=recursion, step_size=step_size, keep="last")
    x_adv = attack(model, x, y[:64], eps=EPS)
    torch.testing.assert_close(x_adv, fgsm, rtol=0, atol=1e-7)
    assert torch.equal(x_adv, Budget("Linf", EPS).project(fgsm, x))


@pytest.mark.acceptance("rgd-attack", "3")
@pytest.mark.parametrize("direction", ["raw", "sign"])
def test_the_hidden_perturbation_remembers_what_is_clipped(direction: str) -> None:
    hidden = RGD(direction=direction, recursion="hidden", step_size=1.0)
    assert scripted(hidden, [1.0, 1.0, -1.0]) == [(1, 1), (2, 1), (1, 1)]
    clipped = RGD(direction=direction, recursion="clipped", step_size=1.0)
    assert scripted(clipped, [1.0, 1.0, -1.0]) == [(1, 1), (1, 1), (0, 0)]


def test_the_box_clips_what_is_seen_alone() -> None:
    assert scripted(RGD(step_size=2.0), [-1.0, -1.0, 1.0, 1.0, 0.25]) == [(-2, 0), (-4, 0), (-2, 0), (0, 0), (0.5, 0.5)]


@pytest.mark.acceptance("rgd-attack", "4")
def test_recursions_agree_where_nothing_is_clipped(trained: Any) -> None:
    model, x, y, _ = trained
    x = x.clamp(0.1, 0.9)
    hidden, clipped = (
        RGD(recursion=recursion, step_size=1e-3, steps=10, keep="last")(model, x, y, eps=EPS)
        for recursion in ("hidden", "clipped")
    )
    assert 1e-5 < float((hidden - x).abs().max()) < EPS
    torch.testing.assert_close(hidden, clipped, rtol=0, atol=1e-6)


@pytest.mark.acceptance("rgd-attack", "5")
@pytest.mark.parametrize("attack", [RGD(keep="last"), RGD(step_size=100, random_start=True), RGDAPGD(steps=10)])
def test_the_batch_does_not_matter(trained: Any, attack: RGD | RGDAPGD) -> None:
    model, x, y, ids = (value[:64] if isinstance(value, Tensor) else value for value in trained)
    whole = attack(model, x, y, eps=EPS, ids=ids)
    parts = torch.arange(64).split(8)
    assert torch.equal(torch.cat([attack(model, x[i], y[i], eps=EPS, ids=ids[i]) for i in parts]), whole)
    alone = attack(model, x[5:6], y[5:6], eps=EPS, ids=ids[5:6])
    assert torch.equal(alone, whole[5:6])
    shuffled = torch.randperm(64)
    assert torch.equal(attack(model, x[shuffled], y[shuffled], eps=EPS, ids=ids[shuffled]), whole[shuffled])


@pytest.mark.acceptance("rgd-attack", "6")
@variants
@pytest.mark.parametrize(("eps", "changes"), [(EPS, {"step_size": 0}), (EPS, {"steps": 0}), (0, {})])
def test_an_attack_that_cannot_move_returns_x(
    trained: Any, direction: str, recursion: str, eps: float, changes: dict[str, Any]
) -> None:
    model, x, y, _ = trained
    model[1].train()  # a mixture of modes has to come back
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    attack = RGD(**({"direction": direction, "recursion": recursion, "keep": "last"} | changes))
    assert torch.equal(attack(model, x, y, eps=eps).view(torch.int32), x.view(torch.int32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[4].weight.grad is None
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.acceptance("rgd-attack", "7")
@pytest.mark.parametrize("step_size", [1e6, "auto"])
def test_one_huge_step_reaches_a_corner(step_size: Any) -> None:
    weight = torch.randn(48).sign() * (0.5 + torch.rand(48))
    weight[::7] = 0
    x, y = torch.rand(16, 3, 4, 4), torch.arange(16) % 2
    x[:, :, 0] = torch.tensor([0.0, 1.0, 0.01, 0.99])
    model = binary(0.1 * weight)
    x_adv = RGD(steps=1, step_size=step_size, keep="last")(model, x, y, eps=EPS)
    away = weight.view(3, 4, 4).sign() * (1 - 2 * y.view(-1, 1, 1, 1))
    torch.testing.assert_close(x_adv, (x + EPS * away).clamp(0, 1), rtol=0, atol=1e-7)
    assert torch.equal(x_adv[:, weight.view(3, 4, 4) == 0], x[:, weight.view(3, 4, 4) == 0])


@pytest.mark.acceptance("rgd-attack", "8")
@pytest.mark.parametrize("steps", [7, 20])
def test_rgd_is_as_strong_as_pgd_at_the_training_radius(robust: Robust, steps: int) -> None:
    def best(*attacks: RGD | PGD) -> tuple[float, float]:
        return max(published(attack, robust) for attack in attacks)

    raw_sizes = (10, 100, 1e3, 1e4)
    rgd = best(*(RGD(steps=steps, step_size=size, keep="last") for size in raw_sizes))
    raw = best(*(RGD(steps=steps, step_size=size, recursion="clipped", keep="last") for size in raw_sizes))
    sign_sizes = (robust.eps / 10, robust.eps / 4, robust.eps / 2)
    pgd = best(*(PGD(steps=steps, step_size=size, random_start=False) for size in sign_sizes))
    assert abs(rgd[1] - pgd[1]) <= 0.5
    assert rgd[0] >= raw[0] - 0.002
    automatic = published(RGD(steps=steps, keep="last"), robust)
    assert abs(automatic[1] - rgd[1]) <= 0.5 and automatic[0] >= rgd[0] - 0.002


@pytest.mark.acceptance("rgd-attack", "9")
def test_the_step_size_hardly_matters(robust: Robust) -> None:
    attacks = [RGD(step_size=step_size, keep="last") for step_size in (10, 30, 100, 300, 1e3, 1e4)]
    accuracies = [published(attack, robust)[1] for attack in attacks]
    assert max(accuracies) - min(accuracies) < 1
    assert accuracies[0] < robust_accuracy(robust.model, robust.x, robust.y) - 10


@pytest.mark.acceptance("rgd-attack", "10")
@variants
def test_more_steps_never_help_the_defence(robust: Robust, direction: str, recursion: str) -> None:
    step_size = 30.0 if direction == "raw" else robust.eps / 4
    fooled = torch.zeros(len(robust.x), dtype=torch.bool)
    for steps in (0, 1, 2, 3, 5, 8, 13):
        attack = RGD(steps=steps, direction=direction, recursion=recursion, step_size=step_size)
        result = attack.run(robust.model, robust.x, robust.y, eps=robust.eps)
        assert (result.success | ~fooled).all()
        fooled = result.success
    assert float(fooled.double().mean()) > 0.15


@pytest.mark.acceptance("rgd-attack", "11")
def test_targeted_steps_approach_the_target(robust: Robust) -> None:
    model, x, y, eps = robust
    target = (y + 1) % 10
    reached = [
        cross_entropy(model, RGD(steps=steps, targeted=True, keep="last")(model, x, target, eps=eps), target)
        for steps in (0, 3, 20)
    ]
    assert reached[0] > reached[1] + 0.5 and reached[1] > reached[2]
    result = RGD(targeted=True).run(model, x, target, eps=eps)
    assert torch.equal(result.success, model(result.images).argmax(1) == target)


@pytest.mark.acceptance("rgd-attack", "12")
@pytest.mark.parametrize(("switch", "step_size"), [(1, "auto"), (2, "auto"), (2, 20.0), (30, 20.0)])
def test_raw_steps_end_at_the_switch(trained: Any, switch: int, step_size: Any) -> None:
    model, x, y, _ = trained
    budget, steps, x, y = Budget("Linf", EPS), 50, x[:64], y[:64]
    hybrid, raw = (
        states_of(RGDAPGD(steps=steps, raw_steps=raw_steps, step_size=step_size).prepare(budget, 5), model, x, y)
        for raw_steps in (switch, steps)
    )
    assert len(hybrid) == len(raw) == steps + 1
    for i in range(switch + 1):
        assert torch.equal(hybrid[i]["shown"], raw[i]["shown"])
    assert not torch.equal(hybrid[switch + 1]["shown"], raw[switch + 1]["shown"])
    assert (hybrid[switch + 1]["step_size"] == 2 * torch.tensor(EPS)).all()
    assert (hybrid[switch]["step_size"] != 2 * torch.tensor(EPS)).all()
    assert (hybrid[-1]["step_size"] < 2 * EPS).any() and torch.equal(raw[-1]["step_size"], raw[1]["step_size"])
    for rows in hybrid + raw:
        assert budget.contains(rows["shown"], x).all()


def test_raw_steps_are_momentum_on_a_hidden_point(trained: Any) -> None:
    """Two raw steps and one sign step, from the formulas."""
    model, x, y, _ = trained
    budget = Budget("Linf", EPS)
    states = states_of(RGDAPGD(steps=3, raw_steps=2, step_size=5.0).prepare(budget, 5), model, x, y)

    def gradient(image: Tensor) -> Tensor:
        leaf = image.clone().requires_grad_(True)
        return torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)[0]

    h0 = states[0]["shown"]
    h1 = h0 + 5 * gradient(h0)
    x1 = budget.project(h1, x)
    h2 = h1 + 0.75 * (5 * gradient(x1)) + 0.25 * (h1 - h0)
    x2 = budget.project(h2, x)
    ahead = budget.project(x2 + 2 * EPS * gradient(x2).sign(), x)
    x3 = budget.project(x2 + 0.75 * (ahead - x2) + 0.25 * (x2 - x1), x)
    for state, expected in zip(states, (h0, x1, x2, x3), strict=True):
        torch.testing.assert_close(state["shown"], expected, rtol=0, atol=1e-6)


def test_without_raw_steps_it_is_apgd(trained: Any) -> None:
    model, x, y, _ = trained
    budget, plain, hybrid = Budget("Linf", EPS), APGD(steps=25), RGDAPGD(steps=25, raw_steps=0)
    ours, theirs = hybrid.prepare(budget, 5), plain.prepare(budget, 5)
    ours.key = theirs.key  # the same start
    for a, b in zip(states_of(ours, model, x, y), states_of(theirs, model, x, y), strict=True):
        assert torch.equal(a["shown"], b["shown"]) and torch.equal(a["step_size"], b["step_size"])


def test_clipped_sign_steps_are_pgd(trained: Any) -> None:
    model, x, y, ids = trained
    ours = RGD(steps=5, direction="sign", recursion="clipped", step_size="2/255", keep="last")
    pgd = PGD(steps=5, step_size="2/255", random_start=False, keep="last")
    assert torch.equal(ours(model, x, y, eps=EPS), pgd.run(model, x, y, eps=EPS).images)
    assert torch.equal(
        dataclasses.replace(ours, step_size="auto")(model, x, y, eps=EPS),
        dataclasses.replace(pgd, step_size=None).run(model, x, y, eps=EPS).images,
    )


def test_the_automatic_step_size_follows_the_scale_of_the_gradient() -> None:
    """Scaling the logits of a linear model scales no direction, so the images stay the same."""
    weight, x, y = torch.randn(48), 0.2 + 0.6 * torch.rand(8, 3, 4, 4), torch.arange(8) % 2
    procedure = RGD(step_size="auto").prepare(Budget("Linf", EPS), 2)
    small, large = (states_of(procedure, lambda z, s=s: s * binary(weight)(z), x, y) for s in (1e-3, 1.0))
    torch.testing.assert_close(small[1]["hidden"], large[1]["hidden"], rtol=1e-4, atol=0)
    lengths = hidden_overshoot(small[1]["hidden"], EPS)
    torch.testing.assert_close(lengths, torch.full((8,), 30.0), rtol=1e-4, atol=0)
    assert torch.equal(small[1]["step_size"], small[-1]["step_size"])


def test_zero_and_broken_gradients_move_nothing() -> None:
    assert scripted(RGD(), [0.0, 0.0]) == [(0, 0), (0, 0)]
    assert scripted(RGD(), [0.0, float("nan"), float("inf"), 1e-30])[-1] == pytest.approx((30, 1))
    assert scripted(RGD(), [1e-45, 1e30, -1e30])[-1][1] in (0.0, 1.0)  # no NaN
    flat = binary(torch.zeros(48))
    x, y = torch.rand(4, 3, 4, 4), torch.ones(4, dtype=torch.int64)
    assert torch.equal(RGD(keep="last")(flat, x, y, eps=EPS), x)


def test_calibration_takes_the_step_size_of_the_highest_loss(robust: Robust) -> None:
    model, x, y, eps = robust
    candidates = (0.0, 1e-3, 100.0)
    assert calibrate_rgd_step(model, x[:100], y[:100], eps, candidates) == 100
    assert calibrate_rgd_step(model, x[:100], y[:100], "0.12", (5.0,)) == 5
    assert calibrate_rgd_step(model, x[:100], y[:100], 0.0, (3, 2)) == 3
    with pytest.raises(UsageError, match="needs candidates and images, got 0 and 100"):
        calibrate_rgd_step(model, x[:100], y[:100], eps, ())


def test_diagnostics_count_what_is_clipped(robust: Robust) -> None:
    model, x, y, eps = robust
    for step_size, least, most in ((1e-4, 0.0, 0.0), (1e4, 0.5, 1.0)):
        *_, (last, _) = walk(RGD(step_size=step_size).prepare(Budget("Linf", eps), 10), model, x, y)
        ratio = boundary_ratio(last["shown"], x, eps)
        assert ratio.shape == (len(x),) and least <= float(ratio.mean()) <= most
        overshoot = hidden_overshoot(last["hidden"], eps)
        assert (overshoot.mean() > 1) == (step_size > 1)
    known = torch.tensor([[0.5, 0.5, 0.25, 0.0]])
    moved = known + torch.tensor([[0.125, -0.125, 0.1249, 0.0]])
    assert boundary_ratio(moved, known, 0.125).tolist() == [0.5]
    assert hidden_overshoot(torch.tensor([[1.0, -3.0]]), 0.5).tolist() == [4.0]


def test_costs_are_those_of_pgd(trained: Any) -> None:
    model, x, y, _ = trained
    result = RGD(steps=6, keep="last").run(model, x, y, eps=EPS)
    assert (result.counts.backward == 6).all()
    withstood = ~RGD(steps=6).run(model, x, y, eps=EPS).success
    counts = RGD(steps=6, random_start=True, n_restarts=3).run(model, x, y, eps=EPS).counts
    assert int(counts.backward[withstood].max()) == 18 and RGD(steps=6, n_restarts=3, random_start=True).passes(5) == 57


def test_names_tell_the_variants_apart() -> None:
    attacks = [RGD(direction=direction, recursion=recursion) for direction, recursion in VARIANTS]
    names = [attack.name for attack in (*attacks, RGD(random_start=True, n_restarts=5), RGDAPGD())]
    assert names == ["rgd-7", "rgd-7-clipped", "rgd-7-sign", "rgd-7-sign-clipped", "rgd-7x5", "rgd-apgd-ce"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "L2"}, "defined in norm Linf, got 'L2'; use PGD or APGD"),
        ({"norm": "L1"}, "defined in norm Linf"),
        ({"direction": "signed"}, "unknown attack direction 'signed'. Did you mean 'sign'"),
        ({"recursion": "clip"}, "unknown attack recursion"),
        ({"loss": "xent"}, "unknown attack loss"),
        ({"keep": "best"}, "unknown attack keep"),
        ({"step_size": -1}, "0 or more, got -1"),
        ({"step_size": "automatic"}, "got 'automatic'"),
        ({"step_size": 3.0, "alpha": 4.0}, "got both"),
        ({"steps": 1.5}, "steps must be an integer of at least 0"),
        ({"n_restarts": 2}, "repeat one attack"),
    ],
)
def test_wrong_arguments_of_rgd_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RGD(**arguments)


def test_wrong_arguments_of_the_hybrid_are_named() -> None:
    with pytest.raises(UsageError, match="raw steps are defined in norm Linf"):
        RGDAPGD(norm="L2")
    with pytest.raises(UsageError, match="raw_steps must be an integer"):
        RGDAPGD(raw_steps=-1)
    with pytest.raises(UsageError, match="step sizes"):
        RGDAPGD(step_size="large")
    assert RGD(alpha=7).step_size == 7

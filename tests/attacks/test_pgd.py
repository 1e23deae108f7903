"""PGD and FGSM: closed forms on linear models, a plain second implementation, noise by sample id, restarts, costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.attacks import FGSM, PGD, Attack, AttackResult
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.rng import philox_uniform

EPS = 8 / 255


class Linear(nn.Module):
    """Logits (0, w.x) for flattened images."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight
        return torch.stack([torch.zeros_like(score), score], 1)


class Counter:
    """Counts calls and images of a model, whose results it passes on."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model, self.batches = model, list[int]()

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return self.model(x)


def zero_model(x: Tensor) -> Tensor:
    """Logits that do not depend on the image, but have a graph."""
    return x.flatten(1)[:, :3] * 0


def noise(seed: int, ids: Tensor, numel: int, restart: int = 0) -> Tensor:
    return philox_uniform(ids, numel, key=derive_seed(seed, "pgd"), stream=restart)


def linf_start(x: Tensor, ids: Tensor, eps: float, *, seed: int = 0, restart: int = 0) -> Tensor:
    uniform = noise(seed, ids, x[0].numel(), restart).view_as(x)
    return torch.minimum(torch.maximum(x + (2 * uniform - 1) * eps, (x - eps).clamp(min=0)), (x + eps).clamp(max=1))


def plain_pgd(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, *, eps: float, step_size: float, steps: int, loss: str
) -> Tensor:
    """Linf PGD as in any tutorial, in eval mode."""
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.clone().requires_grad_(True)
        logits = model(x_adv)
        if loss == "ce":
            F.cross_entropy(logits, y).backward()
        else:
            for row, label in enumerate(y):
                others = torch.cat([logits[row, :label], logits[row, label + 1 :]])
                (others.max() - logits[row, label]).backward(retain_graph=True)
        assert x_adv.grad is not None
        x_adv = x_adv.detach() + step_size * torch.sign(x_adv.grad)
        x_adv = torch.max(torch.min(x_adv, x + eps), x - eps).clamp(0, 1)
    model.zero_grad()
    return x_adv


@pytest.mark.acceptance("double-win", "A-18")
@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize(("steps", "step_size"), [(1, 2 * EPS), (8, EPS / 4), (20, 2 / 255)])
def test_linf_reaches_the_optimum_of_a_linear_model_exactly(
    steps: int, step_size: float, random_start: bool, loss: str
) -> None:
    x, y = torch.rand(16, 3, 4, 4), torch.arange(16) % 2
    model = Linear(0.1 * torch.randn(48))
    attack = PGD(steps=steps, step_size=step_size, random_start=random_start, loss=loss)
    # The margin of the true class falls along -sign(w) for class 1 and +sign(w) for class 0.
    margin_gradient = model.weight.detach().sign() * (2 * y[:, None] - 1)
    optimum = (x - EPS * margin_gradient.view_as(x)).clamp(0, 1)
    assert torch.equal(attack(model, x, y, eps=EPS), optimum)


@pytest.mark.acceptance("double-win", "A-18")
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_linf_reaches_steps_times_step_size_and_no_further(steps: int) -> None:
    x, y = torch.full((4, 1, 3, 3), 0.5), torch.tensor([0, 1, 1, 0])
    model = Linear(torch.tensor([1.0, -1, 0, 1, -1, 0, 0.5, -0.25, 1]))
    attack = PGD(steps=steps, step_size=1 / 64, random_start=False)
    direction = model.weight.detach().sign() * (1 - 2 * y[:, None])
    assert torch.equal(attack(model, x, y, eps="16/255"), x + steps / 64 * direction.view_as(x))


@pytest.mark.acceptance("double-win", "A-18")
def test_l2_reaches_the_optimum_of_a_linear_model() -> None:
    x, y = 0.3 + 0.4 * torch.rand(16, 3, 4, 4), torch.arange(16) % 2
    model = Linear(0.1 * torch.randn(48))
    unit = (model.weight / model.weight.norm()).detach() * (1 - 2 * y[:, None])
    for random_start, steps in ((False, 4), (True, 40)):
        attack = PGD(norm="L2", steps=steps, step_size=0.125, random_start=random_start)
        torch.testing.assert_close(attack(model, x, y, eps=0.25), x + 0.25 * unit.view_as(x), rtol=0, atol=2e-5)
    short = PGD(norm="L2", steps=3, step_size=0.0625, random_start=False)(model, x, y, eps=0.25)
    torch.testing.assert_close(short, x + 0.1875 * unit.view_as(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("random_start", [True, False])
def test_linf_is_plain_pgd_bit_for_bit(trained: Any, loss: str, random_start: bool) -> None:
    model, x, y, ids = trained
    attack = PGD(steps=7, step_size="2/255", random_start=random_start, loss=loss, seed=3)
    start = linf_start(x, ids, EPS, seed=3) if random_start else x
    expected = plain_pgd(model, x, y, start, eps=EPS, step_size=2 / 255, steps=7, loss=loss)
    assert torch.equal(attack(model, x, y, eps="8/255", ids=ids), expected)


def test_l2_is_plain_pgd(trained: Any) -> None:
    """Image by image, in float64."""
    model, x, y, ids = trained
    x, y, ids = x[:20], y[:20], ids[:20]
    ours = PGD(norm="L2", steps=5, step_size=0.1, random_start=False)(model, x, y, eps=0.3)
    model = model.double()
    for i in range(20):
        clean = x[i : i + 1].double()
        x_adv = clean
        for _ in range(5):
            x_adv = x_adv.clone().requires_grad_(True)
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y[i : i + 1]), x_adv)
            delta = x_adv.detach() + 0.1 * grad / grad.norm() - clean
            x_adv = (clean + delta * min(1.0, 0.3 / float(delta.norm()))).clamp(0, 1)
        torch.testing.assert_close(ours[i].double(), x_adv[0], rtol=0, atol=2e-5)


@pytest.mark.acceptance("double-win", "A-21")
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_constant_model_returns_its_random_start(norm: str) -> None:
    x, y, ids = torch.rand(6, 3, 4, 4), torch.zeros(6, dtype=torch.int64), torch.arange(6)
    start = PGD(norm=norm, steps=0)(zero_model, x, y, eps=0.25, ids=ids)
    assert torch.equal(PGD(norm=norm, steps=5)(zero_model, x, y, eps=0.25, ids=ids), start)
    assert not torch.equal(start, x)
    if norm == "Linf":
        assert torch.equal(start, linf_start(x, ids, 0.25))


@pytest.mark.acceptance("double-win", "A-21", "A-41")
@pytest.mark.parametrize("attack", [PGD(steps=3), PGD(norm="L2", steps=3), FGSM()], ids=repr)
def test_seeds_reproduce_and_differ(trained: Any, attack: PGD) -> None:
    model, x, y, ids = trained
    eps = 0.25
    first = attack(model, x, y, eps=eps, ids=ids)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(attack(model, x, y, eps=eps, ids=ids), first)
    assert torch.equal(dataclasses.replace(attack, seed=0)(model, x, y, eps=eps, ids=ids), first)
    other = dataclasses.replace(attack, seed=1)(model, x, y, eps=eps, ids=ids)
    assert (other != first).flatten(1).any(1).all()


@pytest.mark.acceptance("double-win", "A-21")
def test_ranks_draw_different_noise_and_the_noise_of_the_whole() -> None:
    """Rank r of 2 holds every second image; together they hold what one rank would."""
    x, y, ids = torch.full((8, 1, 4, 4), 0.5), torch.zeros(8, dtype=torch.int64), torch.arange(40, 48)
    attack = PGD(steps=0)
    whole = attack(zero_model, x, y, eps=0.25, ids=ids)
    shards = [attack(zero_model, x[r::2], y[r::2], eps=0.25, ids=ids[r::2]) for r in range(2)]
    assert all(torch.equal(shards[r], whole[r::2]) for r in range(2))
    assert (shards[0] != shards[1]).flatten(1).any(1).all()
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 8


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_noise_and_verdicts_do_not_depend_on_batch_size_and_order(trained: Any, batch_size: int, norm: str) -> None:
    model, x, y, ids = trained
    eps = EPS if norm == "Linf" else 0.3
    start, attack = PGD(norm=norm, steps=0), PGD(norm=norm, steps=5, n_restarts=2)
    whole, verdicts = start(model, x, y, eps=eps, ids=ids), attack.run(model, x, y, eps=eps, ids=ids)
    order = torch.randperm(len(x))
    for part in order.split(batch_size):
        drawn = start(model, x[part], y[part], eps=eps, ids=ids[part])
        torch.testing.assert_close(drawn, whole[part], rtol=0, atol=0 if norm == "Linf" else 1e-6)
        run = attack.run(model, x[part], y[part], eps=eps, ids=ids[part])
        assert torch.equal(run.success, verdicts.success[part]) and torch.equal(run.step, verdicts.step[part])
        assert torch.equal(run.images, verdicts.images[part])


def test_ids_default_to_the_position(trained: Any) -> None:
    model, x, y, _ = trained
    attack = PGD(steps=1)
    assert torch.equal(attack(model, x, y, eps=EPS), attack(model, x, y, eps=EPS, ids=torch.arange(len(x))))


@pytest.mark.acceptance("double-win", "A-26")
@pytest.mark.parametrize("eps", [2 / 255, 4 / 255, 0.1])
def test_a_fat_step_takes_one_gradient_and_stays_in_the_ball(trained: Any, eps: float) -> None:
    model, x, y, ids = trained
    counter = Counter(model)
    x_adv = FGSM(seed=5)(counter, x, y, eps=eps, ids=ids)
    assert counter.batches == [len(x)]
    assert bool((x_adv >= (x - eps).clamp(min=0)).all()) and bool((x_adv <= (x + eps).clamp(max=1)).all())
    # delta1 = clip(delta0 + 1.25 eps sign(grad)), written down plainly.
    start = linf_start(x, ids, eps, seed=5)
    expected = plain_pgd(model, x, y, start, eps=eps, step_size=1.25 * eps, steps=1, loss="ce")
    assert torch.equal(x_adv, expected)
    result, right = FGSM().run(model, x, y, eps=eps), model(x).argmax(1) == y
    assert torch.equal(result.counts.backward, right.long())  # what is wrong already is not attacked
    assert torch.equal(result.counts.forward, 1 + 2 * right)  # before, for the gradient, after


def test_fgsm_is_pgd_with_one_step(trained: Any) -> None:
    model, x, y, ids = trained
    for random_start in (True, False):
        for norm, eps in (("Linf", 0.1), ("L2", 0.5)):
            fast = FGSM(norm=norm, random_start=random_start, seed=2)
            slow = PGD(norm=norm, random_start=random_start, seed=2, steps=1, step_size=1.25 * eps)
            assert torch.equal(fast(model, x, y, eps=eps, ids=ids), slow(model, x, y, eps=eps, ids=ids))
    assert FGSM(step_size="2/255").resolve_step_size(EPS) == 2 / 255
    assert isinstance(dataclasses.replace(FGSM(), seed=7), FGSM)
    assert PGD(steps=10).resolve_step_size(0.1) == 2.5 * 0.1 / 10


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_call_costs_exactly_its_steps(trained: Any, steps: int) -> None:
    model, x, y, ids = trained
    counter = Counter(model)
    PGD(steps=steps)(counter, x, y, eps=EPS, ids=ids)
    assert counter.batches == [len(x)] * steps


def test_in_the_published_protocol_fooled_images_leave_before_the_next_restart(trained: Any) -> None:
    model, x, y, ids = trained
    attack = PGD(steps=2, step_size="1/255", n_restarts=4, keep="last")
    result = attack.run(model, x, y, eps="1/255", ids=ids)
    assert 0 < int(result.success.sum()) < len(x)

    # The same by hand: restart after restart on what is left.
    images, fooled, restarts = x.clone(), torch.zeros(len(x), dtype=torch.bool), torch.zeros(len(x), dtype=torch.int64)
    for restart in range(4):
        left = (~fooled).nonzero().flatten()
        start = linf_start(x[left], ids[left], 1 / 255, restart=restart)
        images[left] = plain_pgd(model, x[left], y[left], start, eps=1 / 255, step_size=1 / 255, steps=2, loss="ce")
        fooled[left] = model(images[left]).argmax(1) != y[left]
        restarts[left] += 1
    assert torch.equal(result.images, images)
    assert torch.equal(result.success, fooled)
    assert torch.equal(result.counts.forward, 1 + 3 * restarts)
    assert torch.equal(result.counts.backward, 2 * restarts)
    assert torch.equal(result.counts.queries, 1 + restarts)
    assert torch.equal(result.step[fooled], 3 * restarts[fooled] - 1)
    assert torch.equal(attack(model, x, y, eps="1/255", ids=ids), images)


def test_an_image_leaves_as_soon_as_it_is_fooled(trained: Any) -> None:
    """At the very iterate that fools the model, wherever in its restart that is, and at no further cost."""
    model, x, y, ids = trained
    counter = Counter(model)
    result = PGD(steps=10, step_size="1/255").run(counter, x, y, eps=EPS, ids=ids)
    x_adv, first = linf_start(x, ids, EPS), torch.full((len(x),), -1)
    first[model(x).argmax(1) != y] = 0
    wrong = first == 0
    images = x.clone()
    for step in range(11):
        fooled = (model(x_adv).argmax(1) != y) & (first < 0)
        images[fooled], first[fooled] = x_adv[fooled], step
        x_adv = plain_pgd(model, x, y, x_adv, eps=EPS, step_size=1 / 255, steps=1, loss="ce")
    assert torch.equal(result.step, first) and torch.equal(result.success, first >= 0)
    assert torch.equal(result.images[first >= 0], images[first >= 0])
    steps = torch.where(first >= 0, first + 1, 10).clamp(max=10).where(~wrong, torch.tensor(0))
    assert torch.equal(result.counts.backward, steps)
    last = PGD(steps=10, step_size="1/255", keep="last").run(model, x, y, eps=EPS, ids=ids)
    assert int(result.success.sum()) >= int(last.success.sum())
    assert int(result.counts.backward.sum()) < int(last.counts.backward.sum())


def test_a_result_reports_verdicts_and_norms_of_the_returned_images(trained: Any) -> None:
    model, x, y, ids = trained
    for norm, eps in (("Linf", EPS), ("L2", 0.2)):
        result = PGD(norm=norm, steps=3).run(model, x, y, eps=eps, ids=ids)
        assert isinstance(result, AttackResult)
        assert torch.equal(result.success, model(result.images).argmax(1) != y)
        delta = (result.images - x).flatten(1)
        expected = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
        torch.testing.assert_close(result.norms, expected)
        assert not result.images.requires_grad


def test_a_single_restart_returns_the_last_iterate_not_the_best() -> None:
    """A loss that is highest on the way: the attack passes it, and what it returns fools nobody."""
    x, y = torch.full((1, 1), 0.5), torch.tensor([0])

    def bump(images: Tensor) -> Tensor:
        # Class 1 wins near 0.6 only; its margin keeps a small slope beyond, so that the iterate walks on.
        score = torch.exp(-(((images - 0.6) / 0.02) ** 2)) - 0.5 + 1e-3 * images
        return torch.cat([torch.zeros_like(images), 0 * images + score.detach() + 100 * (images - images.detach())], 1)

    attack = PGD(steps=3, step_size=0.1, random_start=False)
    assert float(attack(bump, x, y, eps=0.3)) == pytest.approx(0.8)
    assert not dataclasses.replace(attack, keep="last").run(bump, x, y, eps=0.3).success.any()
    passed = attack.run(bump, x, y, eps=0.3)
    assert passed.success.all() and float(passed.images) == pytest.approx(0.6) and passed.step.tolist() == [1]
    assert dataclasses.replace(attack, steps=1).run(bump, x, y, eps=0.3).success.all()


def test_attacks_are_values() -> None:
    assert PGD(steps=3) == PGD(steps=3) != PGD(steps=4)
    assert len({PGD(), PGD(), FGSM()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        PGD().steps = 3
    attack: Attack = FGSM()
    assert callable(attack.run)

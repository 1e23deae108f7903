"""FMN and DDN: smallest norms on linear models, the first steps by hand, and rows that know nothing of each other."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.fab import FABT
from sparse_robust.attacks.minimum_norm import DDN, FMN, MinimumNormAttack
from sparse_robust.attacks.procedure import Rows, Seen, Task
from sparse_robust.errors import UsageError
from tests.attacks.conftest import Trained
from tests.attacks.linear_models import NORMS, ORDERS, Linear, run_to_end, smallest_norms, staggered, step, task_of

ATTACKS = [*(FMN(norm=norm) for norm in NORMS), DDN()]
EPS = {"Linf": 8 / 255, "L2": 0.5, "L1": 5.0}
each_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name}-{attack.norm}")


def linear_problem(classes: int, *, box: bool) -> tuple[Linear, Tensor, Tensor]:
    """A linear model, images of 16 pixels that it classifies, and their classes. With ``box`` most pixels are 0 or 1,
    and smallest perturbations end at the box."""
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    x = (0.5 + (2 if box else 0.02) * noise).clamp(0, 1)
    model = Linear(weight, -(weight * 0.5).sum(1)).requires_grad_(False)
    return model, x, model(x).argmax(1)


def small_network() -> nn.Module:
    """Three classes of 16 pixels; exact arithmetic but for sums along a row, so that batches cannot matter."""
    generator = torch.Generator().manual_seed(0)
    first = Linear(torch.randn(12, 16, generator=generator), torch.randn(12, generator=generator))
    second = Linear(torch.randn(3, 12, generator=generator), torch.zeros(3))
    return nn.Sequential(first, nn.ReLU(), second).requires_grad_(False)


def images(n: int) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def norm_of(delta: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), ORDERS[norm], dim=1)


def same(one: Rows, other: Rows) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@each_attack
@pytest.mark.parametrize("box", [False, True])
def test_norms_on_linear_models_of_two_classes_are_the_smallest_there_are(attack: MinimumNormAttack, box: bool) -> None:
    model, x, y = linear_problem(2, box=box)
    result = replace(attack, steps=150).minimize(model, x, y)
    ratio = result.norms / smallest_norms(model, x, y, attack.norm)
    assert result.success.all() and (model(result.images).argmax(1) != y).all()
    assert (ratio >= 1 - 1e-9).all() and (ratio <= 1.005).all()
    assert result.images.min() >= 0 and result.images.max() <= 1


@pytest.mark.parametrize("classes", [3, 6])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_with_more_classes_fmn_mostly_finds_the_nearest(norm: str, box: bool, classes: int) -> None:
    model, x, y = linear_problem(classes, box=box)
    result = FMN(norm=norm, steps=100).minimize(model, x, y)
    ratio = result.norms / smallest_norms(model, x, y, norm)
    assert result.success.all() and (ratio >= 1 - 1e-9).all()
    assert ratio.median() <= 1.005 and (ratio <= 1.4).all()


@each_attack
def test_what_it_keeps_fools_the_model_and_never_grows(attack: MinimumNormAttack, trained: Trained) -> None:
    model, x, _, ids = trained
    task = task_of(model, x[:40], model(x[:40]).argmax(1), ids[:40])
    procedure = replace(attack, steps=40).prepare(Budget(attack.norm, EPS[attack.norm]), 5)
    rows, over, smallest = procedure.start(task, torch.zeros_like(task.y)), torch.tensor(False), torch.inf
    assert torch.equal(rows["best"], task.x) and rows["best_norm"].isinf().all()
    while not over.any():
        rows, over = step(procedure, model, task, rows)
        assert (rows["best_norm"] <= smallest).all() and over.all() == over.any()
        smallest = rows["best_norm"]
        for name in ("shown", "best"):
            assert rows[name].min() >= 0 and rows[name].max() <= 1
    assert smallest.isfinite().all() and (model(rows["best"]).argmax(1) != task.y).all()
    torch.testing.assert_close(norm_of(rows["best"] - task.x, attack.norm), smallest)
    assert (rows["step"] == 40).all()


@each_attack
def test_it_finds_norms_like_those_of_fab(attack: MinimumNormAttack, trained: Trained) -> None:
    model, x, y, _ = trained
    found = replace(attack, steps=60).minimize(model, x[:30], y[:30])
    walked = FABT(norm=attack.norm, steps=15, n_target_classes=4).minimize(model, x[:30], y[:30])
    assert found.success.all() and walked.success.all()
    assert (found.norms.mean() / walked.norms.mean() - 1).abs() < 0.08


@each_attack
def test_within_a_budget_it_fools_what_it_fools_with_a_norm_that_small(
    attack: MinimumNormAttack, trained: Trained
) -> None:
    model, x, y, _ = trained
    attack, x, y, eps = replace(attack, steps=30), x[:60], y[:60], EPS[attack.norm]
    within, smallest = attack.run(model, x, y, eps=eps), attack.minimize(model, x, y)
    # Its last image, which takes no gradient, counts within a budget alone.
    assert (within.success >= (smallest.success & (smallest.norms <= eps))).all()
    assert 0.1 < within.success.float().mean() < 0.95


@each_attack
def test_a_row_has_the_same_bits_alone_in_a_batch_and_beside_rows_at_other_steps(attack: MinimumNormAttack) -> None:
    model, x = small_network(), images(9)
    task = task_of(model, x, model(x).argmax(1))
    procedure = replace(attack, steps=25).prepare(Budget(attack.norm, EPS[attack.norm]), 3)
    together = run_to_end(procedure, model, task)
    assert together["best_norm"].isfinite().all()
    for i in (0, 4, 8):
        alone = run_to_end(procedure, model, task.select(torch.tensor([i])))
        assert same(alone, {name: value[i : i + 1] for name, value in together.items()})
    assert same(staggered(procedure, model, task, delay=9), together)


@pytest.mark.parametrize("norm", NORMS)
def test_fmn_first_goes_as_far_as_the_boundary_would_be(norm: str) -> None:
    model, x, y = linear_problem(2, box=False)
    task, procedure = task_of(model, x, y), FMN(norm=norm, step_size=2.0, gamma=0.1).prepare(Budget(norm, EPS[norm]), 2)
    rows, _ = step(procedure, model, task, procedure.start(task, torch.zeros_like(y)))
    smallest = smallest_norms(model, x, y, norm)
    torch.testing.assert_close(rows["radius"], 1.1 * smallest)
    torch.testing.assert_close(norm_of(rows["shown"] - x, norm), rows["radius"])
    # From there: smaller where it fools the model, larger elsewhere, by a gamma that has fallen a little.
    fooled = model(rows["shown"]).argmax(1) != y
    gamma = 0.1 * (0.02 + 0.98 * (1 + math.cos(math.pi / 100)) / 2)
    then, _ = step(procedure, model, task, rows)
    found = torch.where(fooled, rows["radius"] * (1 - gamma), then["radius"])
    assert fooled.any()
    torch.testing.assert_close(then["radius"], found)
    assert torch.equal(then["best"][fooled], rows["shown"][fooled]) and torch.equal(then["best"][~fooled], x[~fooled])


@pytest.mark.parametrize("norm", NORMS)
def test_fmn_shrinks_and_grows_the_radius_once_it_has_found_an_image(norm: str) -> None:
    model, x, y = linear_problem(2, box=False)
    task, procedure = task_of(model, x, y), FMN(norm=norm, gamma=0.1).prepare(Budget(norm, EPS[norm]), 2)
    beyond = FMN(norm=norm, steps=20).minimize(model, x, y)
    worst = norm_of(torch.maximum(x, 1 - x), norm)

    def next_radius(shown: Tensor, radius: Tensor, best_norm: Tensor) -> Tensor:
        rows = procedure.start(task, torch.zeros_like(y))
        rows |= {"shown": shown, "radius": radius, "best_norm": best_norm}
        return step(procedure, model, task, rows)[0]["radius"]

    size = beyond.norms
    for shown, radius, best_norm, wanted in (
        (beyond.images, size * 1.05, size * 2, size * 1.05 * 0.9),
        (beyond.images, size * 1.5, size * 2, size),  # never above the best norm
        (x, size * 0.9, size, size * 0.9 * 1.1),
        (x, worst, size, worst),  # never above the norm of the farthest corner of the box
    ):
        torch.testing.assert_close(next_radius(shown, radius, best_norm), wanted)


def test_ddn_gives_perturbations_a_norm_that_follows_success() -> None:
    model, x, y = linear_problem(2, box=False)
    task, procedure = task_of(model, x, y), DDN(init_norm=0.05, gamma=0.1).prepare(Budget("L2", 1.0), 2)
    rows, radius = procedure.start(task, torch.zeros_like(y)), torch.full((8,), 0.05, dtype=torch.float64)
    for _ in range(20):
        radius = radius * torch.where(model(rows["shown"]).argmax(1) != y, 0.9, 1.1)
        rows, _ = step(procedure, model, task, rows)
        torch.testing.assert_close(norm_of(rows["shown"] - x, "L2"), radius, rtol=1e-6, atol=0)
    assert rows["best_norm"].isfinite().any()


@each_attack
def test_a_class_can_be_aimed_at(attack: MinimumNormAttack, trained: Trained) -> None:
    model, x, y, _ = trained
    x, aims = x[:20], (model(x[:20]).argmax(1) + 1) % 5
    attack = replace(attack, steps=50)
    result = replace(attack, targeted=True).minimize(model, x, aims)
    assert result.success.float().mean() > 0.9
    assert torch.equal(model(result.images).argmax(1) == aims, result.success)
    assert result.norms.sum() > attack.minimize(model, x, model(x).argmax(1)).norms.sum()


@pytest.mark.parametrize("broken", [0.0, torch.nan, torch.inf])
@each_attack
def test_gradients_without_direction_move_nothing(attack: MinimumNormAttack, broken: float) -> None:
    model, x = small_network(), images(4)
    task = task_of(model, x, model(x).argmax(1))
    procedure = attack.prepare(Budget(attack.norm, EPS[attack.norm]), 3)
    rows = procedure.start(task, torch.zeros_like(task.y))
    for _ in range(3):
        rows, _ = procedure.advance(task, rows, Seen(task.logits, -torch.ones(4), torch.full_like(x, broken)), model)
    assert torch.equal(rows["shown"], x) and not rows["radius"].isnan().any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each_attack
def test_the_length_of_a_gradient_does_not_matter(attack: MinimumNormAttack, scale: float) -> None:
    model, x = small_network(), images(4)
    task = task_of(model, x, model(x).argmax(1))
    procedure = attack.prepare(Budget(attack.norm, EPS[attack.norm]), 3)
    rows = procedure.start(task, torch.zeros_like(task.y))
    grad, loss = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), -torch.full((4,), 0.5)
    expected, _ = procedure.advance(task, rows, Seen(task.logits, loss, grad), model)
    rows, _ = procedure.advance(task, rows, Seen(task.logits, loss * scale, grad * scale), model)
    torch.testing.assert_close(rows["shown"], expected["shown"])


@each_attack
def test_a_step_reads_nothing_back_from_the_device(attack: MinimumNormAttack) -> None:
    x, whole = torch.empty(5, 3, 4, 4, device="meta"), torch.empty(5, dtype=torch.int64, device="meta")
    logits, loss = torch.empty(5, 7, device="meta"), torch.empty(5, device="meta")
    task, procedure = Task(x, whole, whole, logits), attack.prepare(Budget(attack.norm, EPS[attack.norm]), 7)
    state = procedure.start(task, whole)
    rows, over = procedure.advance(task, state, Seen(logits, loss, x), lambda z: logits)
    kinds = [{name: (value.shape, value.dtype) for name, value in each.items()} for each in (state, rows)]
    assert kinds[0] == kinds[1] and over.shape == (5,) and over.dtype == torch.bool


@each_attack
def test_what_it_costs(attack: MinimumNormAttack, trained: Trained) -> None:
    model, x, _, _ = trained
    counts = replace(attack, steps=6).minimize(model, x[:5], model(x[:5]).argmax(1)).counts
    assert (counts.backward == 6).all() and (counts.forward == 6 + counts.queries).all()
    assert (counts.queries <= 2).all()  # the clean image and the last look
    assert replace(attack, steps=6, eot_iter=2).passes(10) == 2 * (3 * 6 + 1)


def test_names_and_wrong_arguments() -> None:
    assert (FMN().name, DDN().name, DDN().norm) == ("fmn", "ddn", "L2")
    for wrong in ({"steps": 0}, {"step_size": 0.0}, {"gamma": 1.0}, {"gamma": "0.05"}, {"norm": "L0"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            FMN(**wrong)
    for wrong in ({"steps": True}, {"init_norm": math.inf}, {"gamma": 0}, {"eot_iter": 0}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            DDN(**wrong)

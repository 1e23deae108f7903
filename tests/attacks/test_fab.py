"""FAB and FAB-T: smallest norms on linear models, one step by hand, and rows that know nothing of each other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.fab import FAB, FABT
from sparse_robust.attacks.procedure import Rows, Seen, Task
from sparse_robust.errors import UsageError
from tests.attacks.conftest import Trained
from tests.attacks.linear_models import (
    NORMS,
    ORDERS,
    Linear,
    run_to_end,
    see,
    smallest_move,
    smallest_norms,
    staggered,
    step,
    task_of,
)

EPS = {"Linf": 8 / 255, "L2": 0.5, "L1": 5.0}


def linear_problem(classes: int, *, box: bool, numel: int = 16) -> tuple[Linear, Tensor, Tensor]:
    """A linear model, images that it classifies, and their classes. With ``box`` most pixels are 0 or 1, and smallest
    perturbations end at the box."""
    generator = torch.Generator().manual_seed(classes)
    weight = torch.randn(classes, numel, generator=generator, dtype=torch.float64)
    x = 0.5 + 0.02 * torch.randn(8, 1, 4, numel // 4, generator=generator, dtype=torch.float64)
    if box:
        x = (0.5 + 2 * torch.randn(8, 1, 4, numel // 4, generator=generator, dtype=torch.float64)).clamp(0, 1)
    bias = -(weight * 0.5).sum(1)
    model = Linear(weight * (0.3 if box else 1.0), bias * (0.3 if box else 1.0)).requires_grad_(False)
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


# FAB measures which boundary is nearest without the box, so that with several it may miss the nearest inside it.
@pytest.mark.parametrize(
    ("attack", "box", "classes"),
    [(FAB, False, 2), (FAB, False, 3), (FAB, False, 6), (FAB, True, 2)]
    + [(FABT, box, classes) for box in (False, True) for classes in (2, 3, 6)],
)
@pytest.mark.parametrize("norm", NORMS)
def test_norms_on_linear_models_are_the_smallest_there_are(
    attack: type[FAB], norm: str, box: bool, classes: int
) -> None:
    model, x, y = linear_problem(classes, box=box)
    result = attack(norm=norm, steps=40).minimize(model, x, y)
    smallest = smallest_norms(model, x, y, norm)
    assert result.success.all() and (model(result.images).argmax(1) != y).all()
    assert (result.norms >= smallest * (1 - 1e-9)).all()
    # It overshoots by 5 %, of what is left after a step back by 10 % of the way.
    assert (result.norms <= smallest * 1.02).all()


@pytest.mark.parametrize("norm", NORMS)
def test_the_first_step_goes_beyond_the_boundary_and_back(norm: str) -> None:
    model, x, y = linear_problem(2, box=False)
    looked: list[Tensor] = []

    def look(shown: Tensor) -> Tensor:
        looked.append(shown)
        return model(shown)

    task, procedure = (
        task_of(model, x, y),
        FABT(norm=norm, eta=1.2, beta=0.5).prepare(Budget(norm, EPS[norm]), 2),
    )
    rows = procedure.start(task, torch.zeros_like(y))
    w = (model.weight[1 - y] - model.weight[y]).view_as(x)
    ahead = (model(x).gather(1, 1 - y[:, None]) - model(x).gather(1, y[:, None]))[:, 0]
    rows, over = procedure.advance(task, rows, Seen(task.logits, ahead, w), look)
    smallest = smallest_norms(model, x, y, norm)
    torch.testing.assert_close(norm_of(looked[0] - x, norm), 1.2 * smallest)
    torch.testing.assert_close(rows["shown"], x + 0.5 * (looked[0] - x))
    assert len(looked) == 1 and not over.any()
    assert torch.equal(rows["best"], looked[0]) and torch.equal(rows["best_norm"], norm_of(looked[0] - x, norm))


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_weighs_the_projections_of_the_point_and_of_x(norm: str) -> None:
    model, x, y = linear_problem(3, box=True)
    attack = FABT(norm=norm, eta=1.1, alpha_max=0.3)
    task, procedure, looked = task_of(model, x, y), attack.prepare(Budget(norm, EPS[norm]), 3), []
    rows = procedure.start(task, torch.zeros_like(y))
    shown = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)).clamp(0, 1)
    seen = see(procedure, model, task, rows | {"shown": shown})
    procedure.advance(task, rows | {"shown": shown}, seen, lambda z: (looked.append(z), model(z))[1])
    weights = []
    for i in range(len(x)):
        w, at, origin = (value[i].flatten().numpy() for value in (seen.grad, shown, x))
        gap = -float(seen.loss[i])
        first = smallest_move(at, w, gap, norm)
        second = smallest_move(origin, w, gap + float(w @ (at - origin)), norm)
        lengths = [np.linalg.norm(move, ORDERS[norm]) for move in (first, second)]
        weights.append(min(lengths[0] / sum(lengths), 0.3))
        wanted = (1 - weights[-1]) * (at + 1.1 * first) + weights[-1] * (origin + 1.1 * second)
        torch.testing.assert_close(looked[0][i].flatten(), torch.from_numpy(wanted).clamp(0, 1))
    assert 0 < min(weights) < 0.3 == max(weights)


@pytest.mark.parametrize("norm", NORMS)
def test_what_it_keeps_fools_the_model_and_never_grows(norm: str, trained: Trained) -> None:
    model, x, y, ids = trained
    task = task_of(model, x[:40], model(x[:40]).argmax(1), ids[:40])
    procedure = FABT(norm=norm, steps=15).prepare(Budget(norm, EPS[norm]), 5)
    rows, over, smallest = procedure.start(task, torch.ones_like(task.y)), torch.tensor(False), torch.inf
    assert torch.equal(rows["best"], task.x) and rows["best_norm"].isinf().all()
    while not over.any():
        rows, over = step(procedure, model, task, rows)
        assert (rows["best_norm"] <= smallest).all() and over.all() == over.any()
        smallest = rows["best_norm"]
        for name in ("shown", "best"):
            assert rows[name].min() >= 0 and rows[name].max() <= 1
    found = smallest.isfinite()
    assert found.float().mean() > 0.9
    assert (model(rows["best"]).argmax(1) != task.y)[found].all()
    torch.testing.assert_close(norm_of(rows["best"] - task.x, norm)[found], smallest[found])
    assert int(rows["step"].min()) == int(rows["step"].max()) == 15


def test_an_image_that_fools_the_model_where_the_gradient_is_taken_counts_too() -> None:
    model, x, y = linear_problem(2, box=False)
    task, procedure = task_of(model, x, y), FABT(norm="L2").prepare(Budget("L2", 0.5), 2)
    beyond = FABT(norm="L2", steps=5).minimize(model, x, y).images
    rows = procedure.start(task, torch.zeros_like(y)) | {"shown": beyond}
    rows, _ = procedure.advance(task, rows, see(procedure, model, task, rows), lambda z: task.logits)
    assert torch.equal(rows["best"], beyond)
    torch.testing.assert_close(rows["best_norm"], norm_of(beyond - x, "L2"))


@pytest.mark.parametrize("attack", [FAB(steps=20), FABT(steps=20)], ids=lambda attack: attack.name)
@pytest.mark.parametrize("norm", NORMS)
def test_within_a_budget_it_fools_what_it_fools_with_a_norm_that_small(
    attack: FAB, norm: str, trained: Trained
) -> None:
    model, x, y, ids = trained
    attack = replace(attack, norm=norm)
    within, smallest = (
        attack.run(model, x[:80], y[:80], eps=EPS[norm], ids=ids[:80]),
        attack.minimize(model, x[:80], y[:80]),
    )
    assert torch.equal(within.success, smallest.success & (smallest.norms <= EPS[norm]))
    assert 0.1 < within.success.float().mean() < 0.95


@pytest.mark.parametrize("attack", [FAB(steps=12, n_restarts=2), FABT(steps=12, n_restarts=2)], ids=lambda a: a.name)
@pytest.mark.parametrize("norm", NORMS)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_beside_rows_at_other_steps(attack: FAB, norm: str) -> None:
    model, x = small_network(), images(9)
    task = task_of(model, x, model(x).argmax(1), torch.arange(50, 59))
    procedure = replace(attack, norm=norm).prepare(Budget(norm, EPS[norm]), 3)
    together = run_to_end(procedure, model, task, run=1)
    assert together["best_norm"].isfinite().sum() > 4
    for i in (0, 4, 8):
        alone = run_to_end(procedure, model, task.select(torch.tensor([i])), run=1)
        assert same(alone, {name: value[i : i + 1] for name, value in together.items()})
    assert same(staggered(procedure, model, task, delay=5), run_to_end(procedure, model, task))


@pytest.mark.parametrize("norm", NORMS)
def test_restarts_begin_at_half_the_radius_as_ids_and_runs_have_it(norm: str) -> None:
    x, y = torch.full((6, 1, 16, 16), 0.5), torch.zeros(6, dtype=torch.int64)
    task = Task(x, y, torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([[2.0, 1.0, 0.0]]).expand(6, 3))
    attack = FABT(norm=norm, n_restarts=3)
    procedure = attack.prepare(Budget(norm, EPS[norm]), 3)

    def begin(run: int, attack: FABT = attack, task: Task = task) -> Tensor:
        return attack.prepare(Budget(norm, EPS[norm]), 3).start(task, torch.full_like(task.y, run))["shown"]

    assert torch.equal(begin(0), x) and torch.equal(begin(3), x)
    for run in (1, 2, 4, 5):
        torch.testing.assert_close(norm_of(begin(run) - x, norm), torch.full((6,), EPS[norm] / 2))
        assert begin(run).min() >= 0 and begin(run).max() <= 1
        assert torch.equal(begin(run)[1], begin(run)[3]) and not torch.equal(begin(run)[0], begin(run)[1])
    assert len({begin(run).numpy().tobytes() for run in range(6)}) == 5  # each its own noise, but 0 and 3
    assert not torch.equal(begin(1), begin(1, replace(attack, seed=1)))
    back = torch.arange(5, -1, -1)
    assert torch.equal(begin(1, task=task.select(back)), begin(1)[back])
    assert procedure.runs == 6

    without_limit = attack.prepare(Budget(norm, {"Linf": 1.0, "L2": 16.0, "L1": 256.0}[norm]), 3).start(
        task, torch.ones_like(task.y)
    )["shown"]
    common = {"Linf": 0.15, "L2": 0.5, "L1": 2.5}[norm]
    torch.testing.assert_close(norm_of(without_limit - x, norm), torch.full((6,), common))


def test_targets_are_the_wrong_classes_with_the_largest_clean_logits() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0, 2.0], [0.0, 1.0, 3.0, 7.0]])
    task = Task(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3]), torch.arange(2), logits)
    budget = Budget("Linf", 0.1)
    procedure = FABT(n_restarts=2).prepare(budget, 4)
    assert procedure.runs == 6
    targets = [procedure.start(task, torch.full((2,), run))["target"].tolist() for run in range(6)]
    assert targets == [[2, 2], [2, 2], [3, 1], [3, 1], [1, 0], [1, 0]]
    rows = procedure.start(task, torch.tensor([0, 4]))
    assert procedure.losses(logits, task, rows).tolist() == [-2.0, -7.0]
    assert [FABT().prepare(budget, classes).runs for classes in (2, 3, 10, 1000)] == [1, 2, 9, 9]
    assert [FAB(n_restarts=5).prepare(budget, classes).runs for classes in (2, 3, 10)] == [5, 5, 5]


@pytest.mark.parametrize("norm", NORMS)
def test_all_classes_at_once_means_the_nearest_boundary(norm: str) -> None:
    model, x, y = linear_problem(6, box=False)
    task, looked = task_of(model, x, y), []
    procedure = FAB(norm=norm, eta=1.0).prepare(Budget(norm, EPS[norm]), 6)
    assert procedure.jacobian
    jacobian = model.weight.view(1, 6, 1, 4, 4).expand(8, -1, -1, -1, -1)
    rows = procedure.start(task, torch.zeros_like(y))
    procedure.advance(
        task, rows, Seen(task.logits, task.logits.new_empty(0), jacobian), lambda z: (looked.append(z), model(z))[1]
    )
    torch.testing.assert_close(norm_of(looked[0] - x, norm), smallest_norms(model, x, y, norm))


@pytest.mark.parametrize("broken", [0.0, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("attack", [FAB(), FABT()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("norm", NORMS)
def test_gradients_without_direction_move_nothing(attack: FAB, norm: str, broken: float) -> None:
    model, x = small_network(), images(4)
    task = task_of(model, x, model(x).argmax(1))
    procedure = replace(attack, norm=norm).prepare(Budget(norm, EPS[norm]), 3)
    rows = procedure.start(task, torch.zeros_like(task.y))
    grad = torch.full((4, 3, 1, 4, 4) if attack.name == "fab" else (4, 1, 4, 4), broken)
    rows, _ = procedure.advance(task, rows, Seen(task.logits, torch.ones(4), grad), model)
    assert torch.equal(rows["shown"], x) and rows["best_norm"].isinf().all()


@pytest.mark.parametrize("attack", [FAB(), FABT()], ids=lambda attack: attack.name)
@pytest.mark.parametrize("norm", NORMS)
def test_a_step_reads_nothing_back_from_the_device(attack: FAB, norm: str) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, whole, logits = meta(5, 3, 4, 4), meta(5, dtype=torch.int64), meta(5, 7)
    procedure = replace(attack, norm=norm).prepare(Budget(norm, EPS[norm]), 7)
    state: Rows = procedure.start(Task(x, whole, whole, logits), whole)
    grad = meta(5, 7, 3, 4, 4) if attack.name == "fab" else x
    rows, over = procedure.advance(Task(x, whole, whole, logits), state, Seen(logits, meta(5), grad), lambda z: logits)
    assert {name: (v.shape, v.dtype) for name, v in rows.items()} == {
        name: (v.shape, v.dtype) for name, v in state.items()
    }
    assert over.shape == (5,) and over.dtype == torch.bool


def test_what_it_costs(trained: Trained) -> None:
    model, x, y, _ = trained
    y = model(x).argmax(1)
    counts = FABT(steps=4, n_target_classes=2).minimize(model, x[:6], y[:6]).counts
    assert (counts.backward == 2 * 4).all()
    # A look at every step and at the end of each run, and the clean image.
    assert (counts.queries == 2 * (4 + 1) + 1).all() and (counts.forward == counts.backward + counts.queries).all()
    assert FABT(steps=4, n_target_classes=2).passes(5) == 2 * (4 * 4 + 1)
    assert (FAB(steps=4).minimize(model, x[:6], y[:6]).counts.backward == 4 * 5).all()
    assert FAB(steps=4, n_restarts=3).passes(5) == 3 * (4 * (1 + 2 * 5 + 1) + 1)


def test_names_and_wrong_arguments() -> None:
    assert (FAB().name, FABT().name) == ("fab", "fab-t")
    for wrong in (
        {"steps": 0},
        {"n_restarts": 1.5},
        {"n_target_classes": True},
        {"alpha_max": 1.0},
        {"beta": 0},
        {"eta": -1.0},
        {"eta": float("nan")},
        {"eot_iter": 0},
        {"norm": "l2"},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            FABT(**wrong)


def same(one: Rows, other: Rows) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

"""APGD: starts, checkpoints, radii, targets, costs, and independence of the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.attacks import Budget
from sparse_robust.attacks.apgd import APGD
from sparse_robust.attacks.l1 import project_l1_box
from sparse_robust.attacks.procedure import Rows, Seen, Task
from sparse_robust.errors import UsageError
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.rng import philox_uniform
from tests.attacks.walks import RADII, walk

LOSSES = ["ce", "dlr", "cw", "dlr-targeted", "ce-targeted"]
norms = pytest.mark.parametrize("norm", RADII)


def scripted(attack: APGD, losses: list[float], grads: list[Tensor] | None = None) -> list[Rows]:
    """Return the states from the start on, for one image of ten pixels, with these losses and gradients (else 1)."""
    x, y = torch.full((1, 10), 0.5), torch.zeros(1, dtype=torch.int64)
    task = Task(x, y, y, torch.zeros(1, 2))
    procedure = attack.prepare(Budget(attack.norm, 2.0 if attack.norm == "L1" else 0.25), 2)
    states = [procedure.start(task, y)]
    for i, loss in enumerate(losses):
        seen = Seen(task.logits, torch.tensor([loss]), grads[i][None] if grads else torch.ones_like(x))
        states.append(procedure.advance(task, states[-1], seen, lambda images: task.logits)[0])
    return states


def halvings(attack: APGD, losses: list[float]) -> list[int]:
    """Return the steps before which the step size was halved: ``losses`` are those of the images 0, 1, 2, ..."""
    sizes = [float(state["step_size"]) for state in scripted(attack, losses)]
    assert all(after in (before, before / 2) for before, after in zip(sizes, sizes[1:], strict=False))
    return [step for step in range(len(losses)) if sizes[step + 1] < sizes[step]]


# Starts


def test_linf_starts_touch_the_ball_and_follow_their_ids(trained: Any) -> None:
    x = 0.3 + 0.4 * trained.x[:6]
    task = Task(x, trained.y[:6], torch.arange(6), torch.zeros(6, 5))
    procedure = APGD(seed=3).prepare(Budget("Linf", 0.1), 5)
    start = procedure.start(task, torch.tensor([0, 0, 1, 1, 2, 2]))["shown"]
    uniform = philox_uniform(
        torch.arange(6), x[0].numel(), key=derive_seed(3, "apgd-ce"), stream=torch.tensor([0, 0, 1, 1, 2, 2])
    )
    noise = (2 * uniform - 1) / (2 * uniform - 1).abs().amax(1, keepdim=True)
    torch.testing.assert_close(start, x + 0.1 * noise.view_as(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", [True, False])
@norms
def test_starts_are_on_the_sphere_of_their_radius(trained: Any, norm: str, schedule: bool) -> None:
    times = 3 if norm == "L1" and schedule else 1
    attack = APGD(norm=norm, large_eps_schedule=schedule and norm == "L1")
    x, eps = 0.4 + 0.2 * trained.x, 0.2 if norm == "Linf" else 1.5
    task = Task(x, trained.y, trained.ids, torch.zeros(len(x), 5))
    start = attack.prepare(Budget(norm, eps), 5).start(task, torch.zeros_like(trained.y))["shown"]
    length = Budget(norm, times * eps).measure(start, x)
    assert (length > 0.995 * times * eps).all() and (length <= times * eps * (1 + 1e-6)).all()


# Checkpoints


def test_checkpoints_come_sooner_and_sooner() -> None:
    """Losses that never rise halve at every one; 100 steps: after 22, 19, 16, 13, 10, 7, 6, 6 steps."""
    assert halvings(APGD(steps=100), [-float(i) for i in range(100)]) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert halvings(APGD(steps=7), [-float(i) for i in range(7)]) == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_rises_keeps_the_step_size() -> None:
    assert halvings(APGD(steps=100), [float(i) for i in range(100)]) == []


@pytest.mark.parametrize(("rises", "expected"), [(16, [22]), (17, [])])
@pytest.mark.parametrize("offset", [-100.0, 0.0, 100.0])
def test_three_quarters_of_the_steps_have_to_raise_the_loss(rises: int, expected: list[int], offset: float) -> None:
    """16.5 of the first 22; the first step counts against the start, whatever the sign of the loss."""
    changes = [1.0] * rises + [-0.5] * (22 - rises)
    losses = [offset + sum(changes[:i]) for i in range(23)]
    assert halvings(APGD(steps=100), losses) == expected
    assert halvings(APGD(steps=100), [offset + sum(reversed(changes[22 - i :])) for i in range(23)]) == expected


def test_a_best_loss_that_stays_halves_once_although_the_loss_rises() -> None:
    first = [float(i) for i in range(23)]
    later = [-1000.0 + i for i in range(78)]  # one fall, then it rises all the way, but never as high as before
    assert halvings(APGD(steps=100), first + later[:77]) == [41, 70, 87, 99]


def test_rho_is_the_share_that_has_to_rise() -> None:
    losses = [0.0] + [float(i % 2) + i / 100 for i in range(99)]  # every second step rises
    assert halvings(APGD(steps=100, rho=0.4), losses) == []
    assert 22 in halvings(APGD(steps=100, rho=0.6), losses)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_a_halving_goes_back_to_the_best_point(norm: str) -> None:
    losses = [0.0, 5.0] + [-1.0] * 30
    states = scripted(APGD(norm=norm, steps=100), losses)
    assert torch.equal(states[23]["best"], states[1]["shown"])
    assert torch.equal(states[23]["previous"], states[1]["shown"])  # the step was taken from there
    assert float(states[23]["step_size"]) == 0.25


def test_l1_goes_back_to_the_best_point_where_it_became_sparser() -> None:
    """Its gradient comes back too. With 25 steps every one ends at a checkpoint."""
    grads = [torch.eye(10)[3], torch.eye(10)[7]]
    states = scripted(APGD(norm="L1", steps=25, large_eps_schedule=False), [1.0, 0.0], grads)
    start, x = states[0]["shown"], torch.full((1, 10), 0.5)
    changed = int((start != x).sum())
    assert changed < 9.5 and int(states[2]["changed"]) == changed and int(states[2]["count"]) == -(-2 * changed // 3)
    assert float(states[2]["step_size"]) == 2
    assert torch.equal(states[2]["shown"], project_l1_box(start + 2 * grads[0], x, 2.0))


@settings(max_examples=20)
@given(st.lists(st.floats(-3, 3, width=32), min_size=20, max_size=20))
def test_the_best_loss_never_falls(losses: list[float]) -> None:
    for norm in ("Linf", "L1"):
        states = scripted(APGD(norm=norm, steps=21, large_eps_schedule=False), losses)
        for i, state in enumerate(states[1:]):
            assert float(state["best_loss"]) == max(losses[: i + 1])
            first = losses.index(max(losses[: i + 1]))
            assert torch.equal(state["best"], states[first]["shown"])


@norms
def test_the_best_point_has_the_best_loss(trained: Any, norm: str) -> None:
    model, x, y, _ = trained
    attack = APGD(norm=norm, steps=30, large_eps_schedule=False)
    seen = list(walk(attack.prepare(Budget(norm, RADII[norm]), 5), model, x, y))
    losses = torch.stack([loss for _, loss in seen[:-1]])
    last, start = seen[-1][0], losses[0]
    assert torch.equal(last["best_loss"].float(), losses.amax(0))
    torch.testing.assert_close(F.cross_entropy(model(last["best"]), y, reduction="none"), losses.amax(0))
    assert (last["best_loss"] >= start).all() and float((last["best_loss"] - start).mean()) > 0.05


# The budget, and the larger balls before it


@norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_image_is_inside_its_ball(trained: Any, norm: str, dtype: torch.dtype) -> None:
    model, x, y, eps = trained.model.to(dtype), trained.x[:64].to(dtype), trained.y[:64], RADII[norm]
    procedure = APGD(norm=norm, steps=20).prepare(Budget(norm, eps), 5)
    assert procedure.inside == (norm != "L1")
    for rows, _ in walk(procedure, model, x, y):
        radii = (3 - rows["ball"]) * eps if norm == "L1" else torch.full((64,), eps)
        for radius in radii.unique().tolist():
            mine = radii == radius
            assert Budget(norm, radius).contains(rows["shown"][mine], x[mine]).all()
        assert rows["shown"].dtype == dtype
    assert Budget(norm, eps).contains(rows["shown"], x).all()


@pytest.mark.parametrize(("steps", "expected"), [(100, [31, 31, 40]), (10, [4, 4, 4]), (7, [4, 4, 1]), (3, [2, 2, 1])])
def test_l1_shrinks_its_ball_from_three_radii_to_one(trained: Any, steps: int, expected: list[int]) -> None:
    """Images shown with a gradient in each ball; the last one of a larger ball only tells which was best."""
    model, x, y, eps = trained.model, trained.x[:8], trained.y[:8], RADII["L1"]
    states = list(walk(APGD(norm="L1", steps=steps).prepare(Budget("L1", eps), 5), model, x, y))
    balls = torch.stack([rows["ball"] for rows, _ in states[:-1]])
    assert (balls == balls[:, :1]).all()
    assert balls[:, 0].bincount(minlength=3).tolist() == expected
    for before, after in zip(states[:-1], states[1:], strict=True):
        if int(after[0]["ball"][0]) > int(before[0]["ball"][0]):
            radius = (3 - int(after[0]["ball"][0])) * eps
            assert (after[0]["best_loss"] == -torch.inf).all() and (after[0]["step_size"] == radius).all()
            assert torch.equal(after[0]["count"], (2 * after[0]["changed"] / 3).ceil().long())


@norms
def test_returned_images_are_inside_and_fool_the_model(trained: Any, norm: str) -> None:
    model, x, y, ids = trained
    result = APGD(norm=norm, steps=15).run(model, x, y, eps=RADII[norm], ids=ids)
    assert Budget(norm, RADII[norm]).contains(result.images, x).all()
    wrong = model(result.images).argmax(1) != y
    assert torch.equal(wrong, result.success)
    clean = model(x).argmax(1) == y
    assert 0.05 < float((wrong & clean).double().mean()) < 0.9


# Rows, classes, targets


@norms
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_a_result_does_not_depend_on_the_batch(trained: Any, norm: str, loss: str) -> None:
    model, x, y, ids = (value[:40] if isinstance(value, Tensor) else value for value in trained)
    attack, eps = APGD(norm=norm, loss=loss, steps=6, n_target_classes=2), RADII[norm]
    whole = attack.run(model, x, y, eps=eps, ids=ids)
    order = torch.randperm(40)
    for batches in ([order], order.split(7), [torch.tensor([3])]):
        for batch in batches:
            part = attack.run(model, x[batch], y[batch], eps=eps, ids=ids[batch])
            assert torch.equal(part.images, whole.images[batch]) and torch.equal(part.step, whole.step[batch])
            assert torch.equal(part.success, whole.success[batch])


@norms
def test_rows_at_different_steps_do_not_meet(trained: Any, norm: str) -> None:
    """Half of the rows begin seven steps later; each walks as if all had begun together."""
    model, x, y, ids = (value[:20] if isinstance(value, Tensor) else value for value in trained)
    weight = torch.randn(192, 5)

    def separate(images: Tensor) -> Tensor:  # bits of a row that do not depend on its neighbours
        return (images.flatten(1)[:, :, None] * weight).sum(1)

    steps, late = 20, torch.arange(20) % 2 == 1
    procedure = APGD(norm=norm, steps=steps).prepare(Budget(norm, RADII[norm]), 5)
    task = Task(x, y, ids, separate(x))

    def look(rows: Rows) -> Seen:
        leaf = rows["shown"].clone().requires_grad_(True)
        logits = separate(leaf)
        loss = procedure.losses(logits, task, rows)
        return Seen(logits.detach(), loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0])

    start = procedure.start(task, torch.zeros_like(y))
    rows, together = start, [start]
    for _ in range(steps):
        rows, _ = procedure.advance(task, rows, look(rows), separate)
        together.append(rows)
    rows = start
    for step in range(steps - 7):
        if step == 7:
            rows = {name: torch.where(late.view(-1, *[1] * (v.dim() - 1)), start[name], v) for name, v in rows.items()}
        rows, _ = procedure.advance(task, rows, look(rows), separate)
    for name, value in rows.items():
        assert torch.equal(value[~late], together[steps - 7][name][~late])
        assert torch.equal(value[late], together[steps - 14][name][late])


@norms
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_enough(trained: Any, norm: str, loss: str, classes: int) -> None:
    model, x, _, _ = trained

    def few(images: Tensor) -> Tensor:
        return model(images)[:, :classes]

    with torch.no_grad():
        y = few(x).argmax(1)[:40]
    attack = APGD(norm=norm, loss=loss, steps=8, n_restarts=2)
    result = attack.run(few, x[:40], y, eps=RADII[norm])
    assert 0 < int(result.success.sum()) < 40
    targets = classes - 1 if "targeted" in loss else 1
    assert attack.targets(classes) == targets and attack.prepare(Budget(norm, 1.5 if norm != "Linf" else 0.1), classes)
    gradients = 8 + 2 * (norm == "L1")
    assert (result.counts.backward[~result.success] == targets * 2 * gradients).all()


def test_targets_are_the_nearest_classes_on_the_clean_image() -> None:
    logits = torch.tensor([[5.0, 1.0, 4.0, 3.0, 2.0], [0.0, 9.0, 0.0, 8.0, 7.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    x, y = torch.full((3, 4), 0.5), torch.tensor([0, 1, 2])
    task = Task(x, y, y, logits)
    procedure = APGD(loss="dlr-targeted", n_restarts=2, n_target_classes=9).prepare(Budget("Linf", 0.1), 5)
    assert procedure.runs == 8
    chosen = [procedure.start(task, torch.full_like(y, run))["target"].tolist() for run in range(8)]
    assert [row[0] for row in chosen] == [2, 2, 3, 3, 4, 4, 1, 1]
    assert [row[1] for row in chosen] == [3, 3, 4, 4, 0, 0, 2, 2]
    assert [row[2] for row in chosen] == [0, 0, 1, 1, 3, 3, 4, 4]
    assert procedure.start(task, torch.tensor([0, 2, 7]))["target"].tolist() == [2, 4, 4]
    assert APGD(loss="ce-targeted", n_target_classes=3).prepare(Budget("Linf", 0.1), 5).runs == 3


@norms
def test_a_targeted_loss_brings_the_target_nearer(trained: Any, norm: str) -> None:
    model, x, y, _ = trained
    procedure = APGD(norm=norm, loss="ce-targeted", steps=30).prepare(Budget(norm, RADII[norm]), 5)
    *_, (last, _) = walk(procedure, model, x, y, run=1)
    with torch.no_grad():
        before, after = (F.cross_entropy(model(images), last["target"]) for images in (x, last["best"]))
    assert after < before - 0.2
    assert not (last["target"] == y).any()


def test_restarts_and_targets_fool_more(trained: Any) -> None:
    model, x, y, ids = trained
    few, many = (
        APGD(loss="dlr-targeted", steps=5, n_target_classes=count).run(model, x, y, eps="8/255", ids=ids)
        for count in (1, 4)
    )
    assert (many.success | ~few.success).all() and int(many.success.sum()) > int(few.success.sum())


# Costs, names, errors


@norms
def test_a_step_costs_one_gradient(trained: Any, norm: str) -> None:
    """The reference takes one more a run; with larger balls 103 for 100 steps, here 102."""
    model, x, y, ids = trained
    attack = APGD(norm=norm, steps=10, n_restarts=2)
    result = attack.run(model, x, y, eps=RADII[norm] / 2, ids=ids)
    gradients = 10 + 2 * (norm == "L1")
    assert int(result.counts.backward.max()) == 2 * gradients
    assert attack.passes(5) == 2 * (3 * gradients + 1)


def test_names_are_those_of_autoattack() -> None:
    names = [APGD(loss=loss).name for loss in LOSSES]
    assert names == ["apgd-ce", "apgd-dlr", "apgd-cw", "apgd-t", "apgd-ce-t"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "l2"}, "unknown attack norm 'l2'"),
        ({"loss": "dlr_targeted"}, "unknown attack loss 'dlr_targeted'. Did you mean 'dlr-targeted'"),
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"n_restarts": True}, "n_restarts must be an integer"),
        ({"n_target_classes": 0}, "n_target_classes must be an integer"),
        ({"eot_iter": 0}, "eot_iter must be"),
        ({"rho": 1.5}, r"in \[0, 1\], got 1.5"),
        ({"large_eps_schedule": True}, "belongs to norm L1, got norm 'Linf'"),
        ({"norm": "L1", "steps": 2}, "needs 3 steps or more, got 2"),
    ],
)
def test_wrong_arguments_of_apgd_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        APGD(**arguments)


def test_two_l1_steps_are_enough_without_the_schedule(trained: Any) -> None:
    result = APGD(norm="L1", steps=1, large_eps_schedule=False).run(trained.model, trained.x, trained.y, eps=5.0)
    assert int(result.counts.backward.max()) == 1

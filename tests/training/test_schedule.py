"""Learning rates at the epochs where the published recipes state them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_robust.training import Recipe
from sparse_robust.training.schedule import RecipeScheduler, learning_rate


@pytest.mark.acceptance("double-win", "A-28")
@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (
            Recipe(lr=1e-3, epochs=150, schedule="multistep", milestones=(50, 100)),
            {0: 1e-3, 49: 1e-3, 50: 1e-4, 99: 1e-4, 100: 1e-5},
        ),
        (
            Recipe(lr=0.1, epochs=100, schedule="multistep", milestones=(50, 75)),
            {0: 0.1, 50: 0.01, 75: 0.001, 99: 0.001},
        ),
        (Recipe(lr=0.01, epochs=80, schedule="cosine"), {0: 0.01, 40: 0.005, 80: 0.0}),
        (Recipe(lr=5e-4, epochs=30, schedule="constant"), {0: 5e-4, 15: 5e-4, 30: 5e-4}),
        (
            Recipe(
                epochs=15, schedule="piecewise_linear", points=((0, 0), (1, 0.4), (6, 0.04), (12, 0.004), (15, 0.0004))
            ),
            {0: 0.0, 0.5: 0.2, 1: 0.4, 6: 0.04, 12: 0.004, 15: 0.0004},
        ),
    ],
    ids=["ST", "AT-cifar", "AT-svhn", "IMP", "FAT"],
)
def test_published_rates(recipe: Recipe, expected: dict[float, float]) -> None:
    for epoch, rate in expected.items():
        assert learning_rate(recipe, epoch) == pytest.approx(rate, rel=1e-9, abs=1e-15)


def test_one_cycle_is_torchs() -> None:
    steps = 50
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.2)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps + 1, cycle_momentum=False)
    recipe = Recipe(lr=0.2, epochs=5, schedule="one_cycle")
    for step in range(steps + 1):
        # torch peaks one step before 30 % of its steps, so the two agree to a step's worth of change
        assert learning_rate(recipe, 5 * step / steps) == pytest.approx(optimizer.param_groups[0]["lr"], abs=0.012)
        optimizer.step()
        if step < steps:
            theirs.step()


def test_scheduler_sets_every_group_and_does_not_depend_on_history() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=0.1)
    scheduler = RecipeScheduler(optimizer, Recipe(lr=0.1, epochs=10, schedule="multistep", milestones=(5,)), 10)
    scheduler.step_update(50)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.01])
    scheduler.step_update(49)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1])


@given(st.sampled_from(["constant", "multistep", "cosine", "one_cycle"]), st.floats(0, 1), st.floats(0, 0.5))
def test_rates_stay_between_zero_and_the_peak(schedule: str, share: float, warmup: float) -> None:
    recipe = Recipe(lr=0.3, epochs=10, schedule=schedule, milestones=(3, 7), warmup_epochs=10 * warmup)
    assert 0 <= learning_rate(recipe, 10 * share) <= 0.3 + 1e-12

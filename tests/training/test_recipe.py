"""What a recipe refuses, before anything is loaded or trained."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from sparse_robust.data import Data
from sparse_robust.errors import UsageError
from sparse_robust.training import Recipe, Trainer
from sparse_robust.training.schedule import learning_rate

MULTISTEP, LINES = {"schedule": "multistep"}, {"schedule": "piecewise_linear"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"regime": "fats"}, "Did you mean 'fast'"),
        ({"schedule": "cos"}, "unknown schedule"),
        ({"epochs": 0}, "recipe.epochs must be at least 1"),
        ({"lr": -1.0}, "recipe.lr"),
        (LINES, "recipe.points"),
        ({"ema_decay": 1.0}, "between 0 and 1"),
        ({"eps": "8 of 255"}, "8 of 255"),
        ({"optimizer": "foo"}, "unknown optimizer 'foo'. Known: .*adam"),
        ({"optimizer": "adamv"}, "Did you mean 'adam'"),
        ({"optimizer": "foo_sgd"}, "unknown optimizer 'foo_sgd'. Did you mean 'sgd'"),
        ({"optimizer": "lookahead_foo"}, "unknown optimizer 'lookahead_foo'"),
        ({"optimizer": "adahessian"}, "recipe.optimizer 'adahessian' needs second derivatives"),
        ({"momentum": 5.0}, r"recipe.momentum must be in \[0, 1.0\), got 5.0"),
        ({"momentum": -1.0}, "recipe.momentum"),
        ({"momentum": 1.0}, "recipe.momentum"),
        ({"clip_grad": -1.0}, "recipe.clip_grad must be above 0, got -1.0. null"),
        ({"clip_grad": 0.0}, "recipe.clip_grad"),
        ({"clip_grad": math.nan}, "recipe.clip_grad"),
        ({"gamma": -1.0}, r"recipe.gamma must be in \[0, inf\)"),
        (MULTISTEP, "multistep needs recipe.milestones"),
        ({**MULTISTEP, "milestones": [-3]}, "recipe.milestones must be in the order of their epochs, from 0 on"),
        ({**MULTISTEP, "milestones": [20, 10]}, "recipe.milestones .* got \\[20, 10\\]"),
        ({**MULTISTEP, "milestones": [math.nan]}, "recipe.milestones"),
        ({**LINES, "points": [[0, 1], [5, -3]]}, "recipe.points must have learning rates"),
        ({**LINES, "points": [[-1, 1], [5, 0]]}, "recipe.points must be in the order"),
        ({**LINES, "points": [[5, 1], [0, 0]]}, "recipe.points must be in the order"),
        ({"schedule": "cosine", "epochs": 1, "warmup_epochs": 99}, "warmup_epochs must not exceed recipe.epochs, 1"),
        ({"warmup_epochs": -1}, "recipe.warmup_epochs must be in"),
        ({"validate_from": -1}, "recipe.validate_from must be at least 0"),
        ({"validation_steps": -1}, "recipe.validation_steps must be at least 0"),
        ({"validation_step_size": "wide"}, "got 'wide'"),
        ({"guard_drop": 5.0}, r"recipe.guard_drop must be in \[0, 1.0\), got 5.0"),
        ({"guard_drop": -0.1}, "recipe.guard_drop"),
    ],
)
def test_recipes_refuse_nonsense(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(**wrong)


@pytest.mark.parametrize(
    "kept",
    [
        {"epochs": 1, "validate_from": 50},  # the last epoch is validated anyway
        {**MULTISTEP, "epochs": 1, "milestones": [50, 50, 75]},  # a published recipe, cut short
        {"schedule": "cosine", "epochs": 5, "warmup_epochs": 5},
        {"epochs": 1, "warmup_epochs": 5},  # one_cycle has a warm-up of its own
        {"regime": "free", "schedule": "constant", "epochs": 9, "warmup_epochs": 9, "replays": 4},
        {"optimizer": "AdamW"},
        {"optimizer": "lookahead_adamw"},
    ],
    ids=str,
)
def test_recipes_keep_what_does_no_harm(kept: dict[str, Any]) -> None:
    Recipe(**kept).in_passes()


def test_a_rate_may_fall_within_an_instant() -> None:
    recipe = Recipe(schedule="piecewise_linear", points=((0, 0.4), (5, 0.4), (5, 0.1), (9, 0.1)))
    assert [learning_rate(recipe, epoch) for epoch in (4.9, 5, 5.1)] == pytest.approx([0.4, 0.4, 0.1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"extra": {"tempo": 1}}, "'tempo'.*recipe.extra, here {'tempo': 1}"),
        ({"extra": {"momentum": 0.5}}, "multiple values .*'momentum'"),
        ({"optimizer": "adamw", "extra": {"betas": [0.9, 5]}}, "beta"),
        ({"optimizer": "sgd", "momentum": 0.0}, "Nesterov momentum requires a momentum"),
    ],
    ids=["unknown", "twice", "out of range", "at odds"],
)
def test_what_the_optimizer_does_not_take_is_named(
    wrong: dict[str, Any], message: str, tiny: Callable[..., nn.Module], digits: Data
) -> None:
    name = wrong.get("optimizer", "momentum")
    with pytest.raises(UsageError, match=f"recipe.optimizer '{name}' cannot be made: .*{message}"):
        Trainer(tiny(), digits, Recipe(epochs=1, **wrong), seed=0)

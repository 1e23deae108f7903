"""What is measured between epochs: accuracies on the validation images, and the guard's on a batch of training."""

from __future__ import annotations

from torch import nn

from sparse_robust.attacks import PGD, parse_eps
from sparse_robust.data import EvalLoader
from sparse_robust.evaluation import evaluate
from sparse_robust.seeding import derive_seed
from sparse_robust.training.recipe import Recipe

GUARD_STEPS = 5


def validate(model: nn.Module, images: EvalLoader, recipe: Recipe, seed: int) -> tuple[float, float | None]:
    """Return clean and robust accuracy in percent, over all ranks; the latter is None where the recipe wants none."""
    attacks = []
    if recipe.validation_steps and recipe.regime != "standard":
        attacks.append(
            PGD(norm=recipe.norm, steps=recipe.validation_steps, step_size=recipe.validation_step_size,
                seed=derive_seed("validation-attack", seed))
        )  # fmt: skip
    result = evaluate(model, images, attacks or None, recipe.radius, check=False, replica=False)
    return result.sa, result.ra if attacks else None


def guard_accuracy(model: nn.Module, images: EvalLoader, recipe: Recipe, seed: int) -> float:
    """Return the PGD-5 accuracy, in [0, 1], that the guard against catastrophic overfitting watches."""
    attack = PGD(norm=recipe.norm, steps=GUARD_STEPS, step_size=parse_eps(recipe.eps) / 4, seed=seed)
    return evaluate(model, images, [attack], recipe.radius, check=False, replica=False).robust

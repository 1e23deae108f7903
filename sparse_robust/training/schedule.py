"""Learning-rate schedules as pure functions of the update count, in timm's scheduler interface."""

from __future__ import annotations

import bisect
import math
from typing import TYPE_CHECKING

from timm.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    import torch

    from sparse_robust.training.recipe import Recipe

ONE_CYCLE_START = 1 / 25
ONE_CYCLE_END = 1e-4 / 25
ONE_CYCLE_PEAK_AT = 0.3


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """Return the learning rate at ``epoch`` (fractional, 0 at the first update).

    Shapes: ``multistep`` has decayed from its milestone on; ``cosine`` falls from the peak to 0 at the end;
    ``one_cycle`` is the two-cosine form of Smith's policy (rise from 1/25 of the peak over the first 30 %, fall to
    4e-6 of it);
    ``piecewise_linear`` interpolates the recipe's points. timm's own multi-step decays one update early, hence this
    one.
    """
    if recipe.schedule == "piecewise_linear":
        return _interpolate(recipe.points, epoch)
    if recipe.schedule == "one_cycle":
        share = min(max(epoch / recipe.epochs, 0.0), 1.0)
        if share < ONE_CYCLE_PEAK_AT:
            return recipe.lr * _cosine(ONE_CYCLE_START, 1.0, share / ONE_CYCLE_PEAK_AT)
        return recipe.lr * _cosine(1.0, ONE_CYCLE_END, (share - ONE_CYCLE_PEAK_AT) / (1 - ONE_CYCLE_PEAK_AT))
    warmup = min(1.0, epoch / recipe.warmup_epochs) if recipe.warmup_epochs else 1.0
    if recipe.schedule == "multistep":
        return recipe.lr * warmup * recipe.gamma ** bisect.bisect_right(recipe.milestones, epoch)
    if recipe.schedule == "cosine":
        return recipe.lr * warmup * _cosine(1.0, 0.0, min(epoch / recipe.epochs, 1.0))
    return recipe.lr * warmup


class RecipeScheduler(Scheduler):
    """timm scheduler of a recipe; call ``step_update(n)`` with the number of updates done so far."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: float) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.recipe, self.updates_per_epoch = recipe, updates_per_epoch
        self.step_update(0)

    def _get_lr(self, t: int) -> list[float]:
        return [learning_rate(self.recipe, t / self.updates_per_epoch)] * len(self.base_values)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _interpolate(points: tuple[tuple[float, float], ...], at: float) -> float:
    if at <= points[0][0]:
        return points[0][1]
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left) if right > left else high
    return points[-1][1]

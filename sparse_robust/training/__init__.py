"""Training on Accelerate: recipes, schedules, the trainer, exact resume."""

from sparse_robust.training.hooks import Hook
from sparse_robust.training.options import Preempted, RunOptions, TrainingError, TrainResult
from sparse_robust.training.recipe import Recipe
from sparse_robust.training.trainer import Trainer

__all__ = ["Hook", "Preempted", "Recipe", "RunOptions", "TrainResult", "Trainer", "TrainingError"]

"""Training on Accelerate: recipes, schedules, the trainer, exact resume."""

from sparse_robust.training.recipe import Recipe
from sparse_robust.training.trainer import RunOptions, Trainer, TrainingError, TrainResult

__all__ = ["Recipe", "RunOptions", "TrainResult", "Trainer", "TrainingError"]

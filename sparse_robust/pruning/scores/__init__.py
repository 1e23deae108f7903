"""Scores: a number a weight, by which pruning decides. Higher is kept; a pruner is nothing more than its score."""

from sparse_robust.pruning.scores import gradients, grasp, hydra, synflow, weights  # each registers its scores
from sparse_robust.pruning.scores.registry import (
    SCORES,
    Attack,
    Batches,
    Evidence,
    Loss,
    Score,
    Scores,
    check_options,
    register_score,
)
from sparse_robust.pruning.scores.weights import uniform

__all__ = [
    "SCORES",
    "Attack",
    "Batches",
    "Evidence",
    "Loss",
    "Score",
    "Scores",
    "check_options",
    "gradients",
    "grasp",
    "hydra",
    "register_score",
    "synflow",
    "uniform",
    "weights",
]

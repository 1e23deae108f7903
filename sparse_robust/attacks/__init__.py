"""Adversarial attacks: budgets, one loop, and the attacks that are built on it."""

from __future__ import annotations

from sparse_robust.attacks.budget import Budget, parse_eps
from sparse_robust.attacks.context import MODES, Model, attack_context
from sparse_robust.attacks.losses import LOSSES
from sparse_robust.attacks.norms import NORMS
from sparse_robust.attacks.pgd import FGSM, PGD
from sparse_robust.attacks.result import Attack, AttackResult, Counts

__all__ = [
    "FGSM",
    "LOSSES",
    "MODES",
    "NORMS",
    "PGD",
    "Attack",
    "AttackResult",
    "Budget",
    "Counts",
    "Model",
    "attack_context",
    "parse_eps",
]

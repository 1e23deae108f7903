"""Adversarial attacks: budgets, one engine, and the attacks that run in it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_robust.attacks.apgd import APGD
from sparse_robust.attacks.autoattack import autoattack
from sparse_robust.attacks.base import EngineAttack
from sparse_robust.attacks.budget import Budget, parse_eps
from sparse_robust.attacks.context import MODES, Model, attack_context
from sparse_robust.attacks.fab import FAB, FABT
from sparse_robust.attacks.losses import LOSSES
from sparse_robust.attacks.minimum_norm import DDN, FMN
from sparse_robust.attacks.norms import NORMS
from sparse_robust.attacks.pgd import FGSM, PGD
from sparse_robust.attacks.result import Attack, AttackResult, Counts
from sparse_robust.attacks.rgd import RGD, RGDAPGD
from sparse_robust.attacks.square import Square

if TYPE_CHECKING:
    from sparse_robust.evaluation.autoattack import AutoAttack

__all__ = [
    "APGD",
    "DDN",
    "FAB",
    "FABT",
    "FGSM",
    "FMN",
    "LOSSES",
    "MODES",
    "NORMS",
    "PGD",
    "RGD",
    "RGDAPGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Budget",
    "Counts",
    "EngineAttack",
    "Model",
    "Square",
    "attack_context",
    "autoattack",
    "parse_eps",
]


def __getattr__(name: str) -> Any:
    # The drop-in is a whole evaluation, which is built on attacks; but this is where its users look for it.
    if name == "AutoAttack":
        return import_module("sparse_robust.evaluation.autoattack").AutoAttack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

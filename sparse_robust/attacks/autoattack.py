"""The ensembles of AutoAttack, as lists of attacks to evaluate with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparse_robust.attacks.apgd import APGD
from sparse_robust.attacks.base import EngineAttack
from sparse_robust.attacks.fab import FAB, FABT
from sparse_robust.attacks.norms import NORMS
from sparse_robust.attacks.square import Square
from sparse_robust.errors import unknown

VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
MEMBERS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
"""Names of the attacks that the ensembles are made of."""


def autoattack(version: str = "standard", *, norm: str = "Linf", seed: int = 0) -> tuple[EngineAttack, ...]:
    """Return the attacks of an ensemble (Croce and Hein, Reliable evaluation of adversarial robustness, 2020).

    Args:
        version: ``standard``; ``plus`` (more attacks, five restarts); ``rand`` for models with randomness of their own
            (every gradient averages 20 passes).
        norm: ``Linf``, ``L2`` or ``L1``. In L1 the standard version is that of Croce and Hein, Mind the box (2021):
            five restarts of APGD-CE and five targets of APGD-T.
        seed: any integer.

    Raises:
        UsageError: for an unknown version or norm.
    """
    if version not in VERSIONS:
        raise unknown("version of AutoAttack", version, VERSIONS)
    attacks = [member(name, norm=norm, seed=seed) for name in VERSIONS[version]]
    changes: dict[str, dict[str, Any]] = {}
    if version == "standard" and norm == "L1":
        changes = {"apgd-ce": {"n_restarts": 5}, "apgd-t": {"n_target_classes": 5}}
    if version == "plus":
        changes = {name: {"n_restarts": 5} for name in ("apgd-ce", "apgd-dlr", "fab")}
    if version == "rand":
        changes = {name: {"eot_iter": 20} for name in VERSIONS["rand"]}
    return tuple(replace(attack, **changes.get(attack.name, {})) for attack in attacks)  # type: ignore[type-var]


def member(name: str, *, norm: str = "Linf", seed: int = 0) -> EngineAttack:
    """Return an attack by the name it has in AutoAttack, one of `MEMBERS`, with the standard settings.

    Raises:
        UsageError: for an unknown name or norm.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    if name not in MEMBERS:
        raise unknown("attack of AutoAttack", name, MEMBERS)
    if name == "square":
        return Square(norm=norm, seed=seed, last_row=False)
    if name == "fab":
        return FAB(norm=norm, seed=seed)
    if name == "fab-t":
        return FABT(norm=norm, seed=seed)
    losses = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "dlr-targeted"}
    return APGD(norm=norm, loss=losses[name], seed=seed)

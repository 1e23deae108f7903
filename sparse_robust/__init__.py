"""Sparse networks that stay accurate and adversarially robust: find, train, transfer, evaluate and ship them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparse_robust._version import __version__

if TYPE_CHECKING:
    from sparse_robust import attacks, data, evaluation, masks, models, pruning, tickets, training
    from sparse_robust.evaluation import evaluate
    from sparse_robust.masks import Masks, select_kth
    from sparse_robust.models import create_model
    from sparse_robust.pruning import enforce, prune
    from sparse_robust.tickets import Ticket

# Everything is imported on first use: timm and Accelerate take seconds, and masks or attacks need neither.
_HOME = {
    "Masks": "masks",
    "Ticket": "tickets",
    "create_model": "models",
    "enforce": "pruning",
    "evaluate": "evaluation",
    "prune": "pruning",
    "select_kth": "masks",
}
_MODULES = ("attacks", "data", "evaluation", "masks", "models", "pruning", "tickets", "training")

__all__ = [
    "Masks",
    "Ticket",
    "__version__",
    "attacks",
    "create_model",
    "data",
    "enforce",
    "evaluate",
    "evaluation",
    "masks",
    "models",
    "prune",
    "pruning",
    "select_kth",
    "tickets",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"sparse_robust.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"sparse_robust.{_HOME[name]}"), name)
    raise AttributeError(f"module 'sparse_robust' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)

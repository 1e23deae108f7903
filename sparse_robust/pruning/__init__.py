"""Finding masks and holding them: scores, one-shot pruning, iterative pruning with rewinding, enforcement."""

from sparse_robust.pruning.budgets import SCOPES, Scope
from sparse_robust.pruning.enforce import Enforcement, MaskViolation, enforce
from sparse_robust.pruning.imp import imp, rewind_
from sparse_robust.pruning.prune import prune, random_like, survivors
from sparse_robust.pruning.scores import SCORES, Evidence, Score, check_options, register_score

__all__ = [
    "SCOPES",
    "SCORES",
    "Enforcement",
    "Evidence",
    "MaskViolation",
    "Scope",
    "Score",
    "check_options",
    "enforce",
    "imp",
    "prune",
    "random_like",
    "register_score",
    "rewind_",
    "survivors",
]

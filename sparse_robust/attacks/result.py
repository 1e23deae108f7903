"""What an attack hands back, and what every attack can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_robust.attacks.context import Model


@dataclass(frozen=True)
class Counts:
    """What each image cost; int64 [n] each.

    Attributes:
        forward: passes through the model, all of them.
        backward: input gradients.
        queries: those forward passes that served no gradient; all that a black-box attack makes.
    """

    forward: Tensor
    backward: Tensor
    queries: Tensor


@dataclass(frozen=True)
class AttackResult:
    """Adversarial images and their verdicts, in the order of the batch.

    Attributes:
        images: [n, ...] like x, inside the budget.
        success: bool [n], whether the model's prediction on ``images``, in eval mode, differs from the label (for a
            targeted attack: is the label given).
        norms: [n], the norm of images - x.
        counts: what each image cost.
        step: int64 [n], how many images the attack had shown the model before the one that fooled it; -1 where none
            did, 0 where the model was wrong without an attack.
    """

    images: Tensor
    success: Tensor
    norms: Tensor
    counts: Counts
    step: Tensor

    @staticmethod
    def empty(x: Tensor) -> AttackResult:
        """Return the result of no images."""
        none = torch.zeros(0, dtype=torch.int64, device=x.device)
        return AttackResult(x.clone(), none.bool(), none.to(x.dtype), Counts(none, none, none), none)


class Attack(Protocol):
    """An attack: hyper-parameters as attributes, the budget in the call."""

    @property
    def name(self) -> str:
        """Name in tables and files."""

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, eps: str | float, ids: Tensor | None = None) -> Tensor:
        """Return adversarial images."""

    def run(self, model: Model, x: Tensor, y: Tensor, *, eps: str | float, ids: Tensor | None = None) -> AttackResult:
        """Return adversarial images with verdicts and costs."""

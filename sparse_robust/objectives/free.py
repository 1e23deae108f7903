"""Free adversarial training: the gradient that trains the weights also moves the perturbation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_robust.attacks import Model
from sparse_robust.objectives.objective import Objective


@dataclass(kw_only=True)
class FreeObjective(Objective):
    """Cross-entropy on images under a perturbation that each backward pass moves one step further.

    Every batch is trained on ``replays`` times in a row. The perturbation belongs to the place in the batch, not to the
    image: it begins at 0, is carried over from batch to batch, and is part of the state of a run. It moves by
    ``step_size`` along the sign of the gradient of the training pass itself, in training mode.

    Attributes:
        replays: updates of a batch, m in the paper.
        step_size: length of a step, in pixel units.
        delta: the perturbation of this rank, [images of the largest batch, ...]; None before the first batch.

    Source: Shafahi et al., Adversarial training for free! (2019), algorithm 1.
    """

    replays: int = 8
    step_size: float = 0.0
    delta: Tensor | None = field(default=None, init=False, repr=False)

    def craft(self, target: Model, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the perturbed images; when the loss on them is differentiated, the perturbation moves."""
        self.delta = x.new_zeros(0, *x.shape[1:]) if self.delta is None else self.delta.to(x)
        if len(self.delta) < len(x):
            self.delta = torch.cat([self.delta, torch.zeros_like(x[len(self.delta) :])])
        leaf = self.delta[: len(x)].clone().requires_grad_()
        leaf.register_hook(self._ascend)
        return (x + leaf).clamp(0, 1), y

    def _ascend(self, gradient: Tensor) -> None:
        assert self.delta is not None
        count = len(gradient)
        moved = self.delta[:count] + self.step_size * gradient.sign().nan_to_num(nan=0.0)
        # A new tensor: the graph still holds the one before.
        self.delta = torch.cat([moved.clamp(-self.eps, self.eps), self.delta[count:]])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the perturbation of this rank."""
        return {} if self.delta is None else {"delta": self.delta.detach()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        self.delta = state["delta"].clone() if "delta" in state else None

"""What training attacks act on: a frozen replica of the network where that is faster, or the network itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_robust.attacks import Model
from sparse_robust.attacks.replica import Replica, make_replica
from sparse_robust.errors import UsageError
from sparse_robust.objectives import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

CHOICES: dict[str, str] = {
    "auto": "a replica, unless the attack's mode forbids it or the network cannot be copied",
    "always": "a replica; refuse where there can be none",
    "never": "the network itself",
}


def attack_mode_of(objective: Objective) -> str | None:
    """Return the batch-norm mode of an objective's attack; None if it has none."""
    return objective.attack.mode if objective.attack is not None else None


class AttackTarget:
    """Gives attacks a network whose weights are those of the last update; no collective is issued by its forward.

    The replica is made at the first batch and refreshed for every batch after, so that it follows the weights and the
    running statistics. It computes what the network computes, with other rounding: see docs/training.md.

    Args:
        model: the network, without wrapper.
        mode: batch-norm mode of the attack; None where nothing is attacked.
        choice: a key of `CHOICES`.

    Raises:
        UsageError: if a replica is asked for and the mode allows none.
    """

    def __init__(self, model: nn.Module, mode: str | None, choice: str, accelerator: Accelerator) -> None:
        self.model, self.mode, self.choice, self.accelerator = model, mode, choice, accelerator
        self.replica: Replica | None = None
        self.reason: str | None = None
        self._earlier: dict[str, Any] | None = None
        if mode is None:
            self.reason = "this regime attacks nothing"
        elif choice == "never":
            self.reason = "recipe.attack_replica is never"
        elif mode == "train":
            self.reason = "attacks in mode train update the running statistics of the network itself"
            if choice == "always":
                raise UsageError(
                    f"recipe.attack_replica is always, but {self.reason}: use attack_mode train_frozen or eval, "
                    "or auto."
                )

    def __call__(self, images: Tensor) -> Model:
        """Return what attacks on these images act on.

        Raises:
            UsageError: if a replica is asked for and the network cannot be copied.
        """
        if self.reason is not None:
            return self.model
        if self.replica is None:
            self.replica = self._make(images)
            return self.replica.target if self.reason is None else self.model
        self.replica.refresh()
        return self.replica.target

    def describe(self) -> dict[str, Any]:
        """Return what was attacked, as JSON; by an earlier start of the run, if this one has attacked nothing yet."""
        if self.replica is None and self._earlier is not None:
            return self._earlier
        if self.replica is None or self.reason is not None:
            return {"replica": False, "mode": self.mode, "reason": self.reason}
        replica = self.replica
        return {
            "replica": True,
            "mode": self.mode,
            "precision": replica.precision,
            "channels_last": replica.channels_last,
            "folded": len(replica.folded),
            "captured": replica.capture,
            "reason": replica.reason,
        }

    def remember(self, earlier: dict[str, Any]) -> None:
        """Take over what an earlier start of the run attacked, which `describe` told."""
        self._earlier = earlier

    def _make(self, images: Tensor) -> Replica:
        assert self.mode is not None
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the step's own random numbers are drawn as without a replica
            replica = make_replica(
                self.model,
                images,
                precision="bf16" if self.accelerator.mixed_precision == "bf16" else "fp32",
                mode=self.mode,
            )
        if replica.module is None:
            self.reason = f"the network cannot be copied: {replica.reason}"
            if self.choice == "always":
                raise UsageError(f"recipe.attack_replica is always, but {self.reason}. Use auto or never.")
            logger.warning("attacks act on the network itself, which is slower: %s", self.reason)
        return replica

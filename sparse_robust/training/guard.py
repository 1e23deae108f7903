"""Guard against catastrophic overfitting in single-step adversarial training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CatastrophicOverfittingGuard:
    """Trips when PGD accuracy on a fixed training batch falls by more than ``drop`` from one check to the next.

    Source: the training-time check of Wong, Rice, Kolter, "Fast is better than free" (2020): PGD-5, 0.20 absolute.
    """

    drop: float = 0.20
    previous: float | None = None

    def trips(self, accuracy: float) -> bool:
        """Record an accuracy in [0, 1]; return whether it fell too far below the one before."""
        fell = self.previous is not None and self.previous - accuracy > self.drop
        if not fell:
            self.previous = accuracy
        return fell

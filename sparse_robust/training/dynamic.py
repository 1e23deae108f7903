"""Changes the masks of a run while it trains, by the schedules of `sparse_robust.pruning.dynamic`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks
from sparse_robust.masks.wrappers import find_parameters
from sparse_robust.objectives import REGIMES
from sparse_robust.pruning.dynamic import Dynamics, MaskSchedule
from sparse_robust.training.agree import gathered
from sparse_robust.training.hooks import Hook
from sparse_robust.training.options import TrainingError

if TYPE_CHECKING:
    from sparse_robust.training.trainee import Trainee


class DynamicMasks(Hook):
    """Gradual pruning, SET, RigL or GraNet, from the masks a run begins with to ``count`` kept weights.

    New masks are decided at the point the gradients are of, before an update, from gradients that no mask has touched
    yet and that are averaged over the ranks; they hold from its end on. The masks are all its state, and the trainer
    keeps those, so a resumed run repeats the uninterrupted one.

    Args:
        dynamics: the method and its numbers.
        count: kept weights at the end.
        seed: of random growth.
    """

    def __init__(self, dynamics: Dynamics, *, count: int, seed: int) -> None:
        self.dynamics, self.count, self.seed = dynamics, count, seed
        self.name = f"{dynamics} to {count}, seed {seed}"
        self._schedule: MaskSchedule | None = None
        self._trainee: Trainee | None = None
        self._next: Masks | None = None

    @property
    def masks(self) -> Masks:
        """The masks as they are now; those of the ticket, when the run is over."""
        if self._trainee is None or self._trainee.masks is None:
            raise UsageError("these masks are those of no run yet: train with this hook first.")
        return self._trainee.masks

    def start(self, trainee: Trainee) -> None:
        """Plan the changes of the whole run."""
        if trainee.masks is None:
            raise UsageError(f"{self.dynamics.method} changes masks: give the trainer those to begin with.")
        if trainee.recipe.guard and REGIMES[trainee.recipe.regime].single_step:
            raise UsageError(
                "the catastrophic-overfitting guard goes back to weights of earlier masks, which "
                f"{self.dynamics.method} has changed since: set recipe.guard to false."
            )
        self._trainee, self._next = trainee, None
        self._schedule = self.dynamics.plan(
            start=trainee.masks.count(), stop=self.count, updates=trainee.updates, seed=self.seed
        )

    def before_update(self, trainee: Trainee, update: int) -> None:
        """Decide, while all gradients are there, what the masks are after this update."""
        assert self._schedule is not None
        if self._schedule.due(update):
            weights = find_parameters(trainee.trained, self.masks.shapes())
            gradients = {name: weight.grad for name, weight in weights.items()}
            needed = self._schedule.method.grows == "gradient"
            if needed and all(gradient is None for gradient in gradients.values()):
                raise UsageError(
                    f"no weight has its gradient in .grad, which {self.dynamics.method} looks at. DeepSpeed keeps "
                    "gradients elsewhere: train with DDP or FSDP2."
                )
            self._next = self._schedule.after(update, self.masks, weights, gradients)

    def after_update(self, trainee: Trainee, update: int) -> None:
        """Put the new masks in place, which are the same on all ranks.

        Raises:
            TrainingError: if they are not; the message has their digests.
        """
        if self._next is not None:
            digests = gathered(trainee.accelerator, self._next.digest())
            if len(set(digests)) > 1:
                raise TrainingError(f"after update {update} the ranks have different masks: {', '.join(digests)}.")
            trainee.set_masks(self._next)
            self._next = None

"""One training step: the batch's gradients, and the update they make once their group is complete."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from sparse_robust.data import Batch
from sparse_robust.errors import UsageError
from sparse_robust.objectives import Objective
from sparse_robust.training.hooks import Hook, around, replays_of
from sparse_robust.training.schedule import RecipeScheduler
from sparse_robust.training.trainee import Trainee


class Stepper:
    """Takes the steps of a run: forward and backward through the objective, accumulation, update, hooks, average.

    Args:
        trainee: what is trained.
        objective: see `Objective`; it may replay batches, act around its passes and have a state (`hooks`).
        steps: batches of an epoch.
        images: training images.
        hooks: called around every update, in this order.
    """

    def __init__(
        self, trainee: Trainee, objective: Objective, *, steps: int, images: int, hooks: Sequence[Hook] = ()
    ) -> None:
        self.trainee, self.objective, self.hooks = trainee, objective, tuple(hooks)
        self.recipe, self.accelerator = trainee.recipe, trainee.accelerator
        self.steps, self.images, self.replays = steps, images, replays_of(objective)
        if self.replays > 1 and self.recipe.accumulate > 1:
            raise UsageError(
                f"recipe.accumulate is {self.recipe.accumulate}, and this regime makes {self.replays} updates of every "
                "batch: use accumulate 1."
            )
        self.updates_per_epoch = -(-steps // self.recipe.accumulate) * self.replays
        trainee.updates = self.recipe.epochs * self.updates_per_epoch
        self.scheduler = RecipeScheduler(trainee.inner_optimizer, self.recipe, self.updates_per_epoch)

    def __call__(self, batch: Batch, *, epoch: int, step: int, seed: int) -> Tensor:
        """Train on a batch, the step-th of its epoch.

        Returns:
            Sums over this rank's images, [3], on the device: losses, correct predictions, images.
        """
        group_start = step - step % self.recipe.accumulate
        group = min(self.recipe.accumulate, self.steps - group_start)  # the epoch's last group may be shorter
        closes = step + 1 == group_start + group
        done = self.updates(epoch, group_start)
        for replay in range(self.replays):
            loss, logits = self._gradients(batch, step, group, closes, seed)
            if closes:
                self._update(done + replay + 1)
        return self._sums(batch, loss, logits)

    def updates(self, epoch: int, step: int) -> int:
        """Return the number of updates made when ``step`` batches of an epoch are done and no group is open."""
        return epoch * self.updates_per_epoch + -(-step // self.recipe.accumulate) * self.replays

    def _gradients(self, batch: Batch, step: int, group: int, closes: bool, seed: int) -> tuple[Tensor, Tensor]:
        trainee, accelerator = self.trainee, self.accelerator
        with nullcontext() if closes else accelerator.no_sync(trainee.model), around(self.objective, trainee.inner):
            with accelerator.autocast():
                loss, logits = self.objective(
                    trainee.model, trainee.target(batch.x), batch.x, batch.y, batch.ids, seed=seed
                )
            accelerator.backward(loss * self._share(len(batch.y), step) / group)
        return loss, logits

    def _update(self, update: int) -> None:
        for hook in self.hooks:
            hook.before_update(self.trainee, update)
        self.trainee.update()
        self.scheduler.step_update(update)
        for hook in self.hooks:
            hook.after_update(self.trainee, update)
        self.trainee.average(update)

    def _share(self, images: int, step: int) -> float:
        """Weight of this rank's mean loss, so that the average over ranks is the mean over the whole batch."""
        world, size = self.accelerator.num_processes, self.recipe.batch_size
        return images * world / min(size, self.images - step * size)

    def _sums(self, batch: Batch, loss: Tensor, logits: Tensor) -> Tensor:
        seen = len(batch.y)
        correct = (logits.detach().argmax(1) == batch.y).sum()
        return torch.stack([loss.detach() * seen, correct, torch.full_like(correct, seen)])

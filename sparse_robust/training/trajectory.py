"""The path of a run: the network after every epoch, kept for a picture of the loss around it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from sparse_robust.errors import UsageError
from sparse_robust.files import atomic_write
from sparse_robust.training.hooks import Hook
from sparse_robust.training.selection import on_cpu

if TYPE_CHECKING:
    from sparse_robust.training.trainee import Trainee


class Trajectory(Hook):
    """Saves the weights before the first update and after the last one of every epoch: ``000.safetensors``, ``001``...

    They are those that are trained, not their moving average. A resumed run leaves the files of the uninterrupted one.

    Args:
        folder: made where it is missing.
    """

    name = "trajectory"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, trainee: Trainee) -> None:
        """Save the first point; a run that goes on has not taken over its checkpoint yet."""
        if trainee.trained is not trainee.inner:
            raise UsageError(
                "the path of a run is kept where weights are whole on every process: not under FSDP or ZeRO."
            )
        self._save(trainee, 0)

    def after_update(self, trainee: Trainee, update: int) -> None:
        """Save the weights where an epoch ends."""
        epochs = trainee.recipe.epochs
        if update * epochs % trainee.updates == 0:
            self._save(trainee, update * epochs // trainee.updates)

    def _save(self, trainee: Trainee, epoch: int) -> None:
        if not trainee.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = on_cpu(trainee.inner.state_dict())
        atomic_write(self.folder / f"{epoch:03d}.safetensors", lambda path: save_file(state, path))

"""What stages are run with: devices, progress, data, and the ways to train and to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from sparse_robust.data import Data, DataSpec, eval_loader, load_data
from sparse_robust.evaluation import Evaluation, evaluate
from sparse_robust.masks import Masks
from sparse_robust.study.config import EvaluationConfig
from sparse_robust.training import Hook, Recipe, RunOptions, Trainer, TrainResult
from sparse_robust.training.progress import SILENT, ProgressReporter
from sparse_robust.training.trainee import Trainee


def anybody() -> None:
    """Let anybody write: the guard of a run that nobody else could be at."""


@dataclass
class Guarded(Hook):
    """Asks after each update whether this process may still go on, before it gets to write a checkpoint."""

    guard: Callable[[], None]
    name = "guard"

    def after_update(self, trainee: Trainee, update: int) -> None:
        """Raise what the guard raises."""
        self.guard()


@dataclass
class Context:
    """With what stages are run.

    Attributes:
        accelerator: devices and precision, shared by all runs of the process.
        keep_weights: whether transfers leave their weights behind.
        trust_pickle: whether checkpoints that need code to be unpickled may run it.
        guard: raises if the stage has been given to another process meanwhile; asked before anything is written.
    """

    accelerator: Accelerator
    progress: ProgressReporter = SILENT
    checkpoint_seconds: float = 60.0
    workers: int = 0
    project: str = "sparse-robust"
    eval_batch_size: int = 500
    keep_weights: bool = False
    trust_pickle: bool = False
    guard: Callable[[], None] = anybody
    _data: tuple[DataSpec, Data] | None = None

    def data(self, spec: DataSpec) -> Data:
        """Load a data set; the one used last is kept, so that a large one is not read for every cell."""
        if self._data is None or self._data[0] != spec:
            self._data = None
            self._data = spec, load_data(spec)
        return self._data[1]

    def train(
        self, model: nn.Module, data: Data, recipe: Recipe, *, seed: int, masks: Masks | None, folder: Path, name: str,
        hooks: Sequence[Hook] = (),
    ) -> TrainResult:  # fmt: skip
        """Train ``model`` in place, resuming from ``folder``."""
        options = RunOptions(
            eval_batch_size=self.eval_batch_size, folder=folder, checkpoint_seconds=self.checkpoint_seconds,
            workers=self.workers,
            progress=self.progress, name=name, project=self.project,
        )  # fmt: skip
        hooks = [Guarded(self.guard), *hooks]
        trainer = Trainer(
            model, data, recipe, seed=seed, masks=masks, accelerator=self.accelerator, options=options, hooks=hooks
        )
        return trainer.fit()

    def evaluate(self, model: nn.Module, data: Data, how: EvaluationConfig, **options: Any) -> Evaluation:
        """Measure SA and RA on the test images, sharded over the ranks; ``options`` are those of `evaluate`."""
        accelerator = self.accelerator
        loader = eval_loader(
            data.test, how.batch_size, device=accelerator.device, workers=self.workers, limit=how.images,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
        options = {"eps": how.radius, "check": False, **options}
        return evaluate(
            model.to(accelerator.device),
            loader,
            how.build(),
            precision=how.precision,
            about={"data": data.name},
            **options,
        )

    def on_main(self, action: Callable[[], None]) -> None:
        """Run ``action`` on the main process while the others wait for it."""
        if self.accelerator.is_main_process:
            self.guard()
            action()
        self.accelerator.wait_for_everyone()

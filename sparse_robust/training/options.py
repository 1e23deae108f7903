"""What a run is told besides its recipe, what it leaves behind, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_robust.errors import SparseRobustError
from sparse_robust.masks import Masks
from sparse_robust.training.progress import SILENT, ProgressReporter
from sparse_robust.training.selection import Selection


class TrainingError(SparseRobustError, RuntimeError):
    """Training cannot go on: the loss is not a number, or the ranks disagree."""


class Preempted(SparseRobustError):
    """The run was told to stop, has saved a checkpoint, and goes on from it when it is started again.

    The exit status 85 is the one that HTCondor's manual gives to jobs that saved a checkpoint; for other batch systems
    it is a number that nothing else uses.
    """

    exit_status = 85

    @classmethod
    def by(cls, name: str | None, message: str) -> Preempted:
        """Return the error for the signal of this name: that of SIGINT has the exit status of an interruption."""
        return Interrupted(message) if name == "SIGINT" else cls(message)


class Interrupted(Preempted):
    """The same, by Ctrl-C. The exit status is the one that shells give to a command which SIGINT ended."""

    exit_status = 130


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        selection: the kept weights (``best_sa``, ``best_ra``, ``last``) and their validation accuracies.
        history: one entry an epoch: epoch, train_loss, train_accuracy, lr, val_sa, val_ra, seconds.
        stopped_by_guard: whether catastrophic overfitting ended it; the weights are those of the epoch before.
        seconds: wall time over all starts of the run.
        how: by what means it was computed, in the words of JSON: device, ranks, precision, compiler, batch norm over
            ranks, and the replica that was attacked, or why there was none.
        masks: those that hold at the end; a hook may have changed them.
    """

    selection: Selection
    history: list[dict[str, Any]]
    stopped_by_guard: bool
    seconds: float
    how: dict[str, Any] = field(default_factory=dict)
    masks: Masks | None = None

    def headline(self, adversarial: bool) -> str:
        """Name the reported weights: best validation RA for adversarial regimes, best validation SA otherwise, else
        the last."""
        preferred = "best_ra" if adversarial else "best_sa"
        return preferred if preferred in self.selection.chosen else "last"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is carried out; none of it changes its result.

    Attributes:
        folder: where log.jsonl and the checkpoints go; None keeps nothing, and leaves signals alone.
        checkpoint_seconds: wall time between checkpoints within a run.
        checkpoint_steps: batches between checkpoints, in addition; None for time alone.
        eval_batch_size: images per batch in validation.
        workers: loader processes of large data sets.
        progress: where progress is shown.
        name: what the display and the trackers call this run.
        project: what the trackers group it under.
    """

    folder: Path | None = None
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int | None = None
    eval_batch_size: int = 500
    workers: int = 0
    progress: ProgressReporter = SILENT
    name: str = "train"
    project: str = "sparse-robust"

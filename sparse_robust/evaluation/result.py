"""What an evaluation found, in all and while it goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparse_robust.errors import FileError, UsageError
from sparse_robust.evaluation.verdicts import UNBROKEN, Verdicts, read_verdicts


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        clean: share of images classified correctly, in [0, 1].
        robust: share that stays correct under every attack at every eps, in [0, 1]; equal to ``clean`` without attacks.
        robust_after: the same after each stage in turn.
        stages: (name of the attack, eps) of each stage; by eps, then by what an image costs.
        per_image: the verdict of each image, in the order of the sample ids.
        counts: passes of images through the model, over the whole set: ``forward``, ``backward``, ``queries``.
        flips: ``candidates``, images that fooled the copy that attacks work on, and ``rejected``, those of them that
            did not fool the model itself and were attacked on. What an earlier, interrupted process did is not in them.
    """

    clean: float
    robust: float
    robust_after: tuple[float, ...]
    stages: tuple[tuple[str, float], ...]
    per_image: Verdicts
    counts: dict[str, int]
    flips: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.per_image)

    @property
    def sa(self) -> float:
        """Standard accuracy in percent."""
        return 100 * self.clean

    @property
    def ra(self) -> float:
        """Robust accuracy in percent."""
        return 100 * self.robust

    @property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """(eps, robust accuracy in [0, 1]) for each eps, ascending: it never rises."""
        last = {eps: robust for (_, eps), robust in zip(self.stages, self.robust_after, strict=True)}
        return tuple(sorted(last.items()))


@dataclass(frozen=True)
class Progress:
    """Where an evaluation is, on this rank.

    Attributes:
        stage: name of the attack at work; ``clean`` before the first.
        images: how many are finished, ``total``: of how many, None if the loader does not tell.
        clean_correct, robust: of the images seen so far, how many are classified correctly without an attack, and
            still.
        seen: images seen so far.
        share: estimate of the share of the work that is done, in [0, 1]; None without a total.
    """

    stage: str
    images: int
    total: int | None
    seen: int
    clean_correct: int
    robust: int
    share: float | None


def summarise(
    rows: Verdicts, stages: Sequence[tuple[str, float]], flips: Mapping[str, int] | None = None
) -> Evaluation:
    """Return the evaluation that verdicts amount to.

    Args:
        rows: of all images, one at least.
        stages: (name of the attack, eps) in the order they were tried.
    """
    total, broken = len(rows), rows.broken_by
    after = [float(((broken == UNBROKEN) | (broken > i)).sum()) / total for i in range(len(stages))]
    clean = float(rows.clean_correct.sum()) / total
    counts = {name: int(getattr(rows, name).sum()) for name in ("forward", "backward", "queries")}
    robust = after[-1] if after else clean
    return Evaluation(clean, robust, tuple(after), tuple(stages), rows, counts, dict(flips or {}))


def read_evaluation(path: str | Path) -> Evaluation:
    """Return what a verdict file amounts to, finished or not; images that attacks still wait for count as robust.

    Raises:
        FileError: if it is missing, damaged or no verdict file.
    """
    header, rows = read_verdicts(path)
    if not len(rows):
        raise UsageError(f"{path} holds no verdict yet.")
    try:
        stages = [(str(stage["attack"]), float(stage["eps"])) for stage in header["stages"]]
    except (TypeError, ValueError) as error:
        raise FileError(f"{path} is damaged at line 1: an eps is no number ({error}).") from error
    return summarise(rows, stages)

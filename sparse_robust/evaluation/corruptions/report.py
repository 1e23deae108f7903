"""Accuracy under common corruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_robust.attacks import Model
from sparse_robust.errors import UsageError, unknown
from sparse_robust.evaluation.corruptions.corrupt import CORRUPTIONS, SEVERITIES, corrupt
from sparse_robust.evaluation.corruptions.levels import levels_for
from sparse_robust.evaluation.streaming import Columns, batches, device_of, merge, predict


@dataclass(frozen=True, eq=False)
class CorruptionReport:
    """Result of `corruption_accuracy`. Accuracies are shares of all images, in [0, 1].

    Attributes:
        names: the corruptions, ``severities``: the severities.
        clean: accuracy without corruption.
        accuracy: float64 [corruptions, severities].
        levels: the tables of strengths that were used, see `corrupt`.
        ids: int64 [n], the sample ids; the per-image results are in their order.
        clean_correct: bool [n].
        correct: bool [n, corruptions, severities].
    """

    names: tuple[str, ...]
    severities: tuple[int, ...]
    clean: float
    accuracy: Tensor
    levels: tuple[str, ...]
    ids: Tensor
    clean_correct: Tensor
    correct: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def mean(self) -> float:
        """Mean accuracy over corruptions and severities."""
        return float(self.accuracy.mean())

    @property
    def by_corruption(self) -> dict[str, float]:
        """Accuracy under each corruption, its mean over the severities."""
        return dict(zip(self.names, self.accuracy.mean(1).tolist(), strict=True))

    @property
    def by_severity(self) -> dict[int, float]:
        """Accuracy at each severity, its mean over the corruptions."""
        return dict(zip(self.severities, self.accuracy.mean(0).tolist(), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the per-image results, as JSON values, and how corruptions depart from the original."""
        rows = self.accuracy.tolist()
        return {
            "images": len(self),
            "clean": self.clean,
            "mean": self.mean,
            "by_corruption": self.by_corruption,
            "by_severity": {str(severity): value for severity, value in self.by_severity.items()},
            "accuracy": {
                name: {str(severity): value for severity, value in zip(self.severities, row, strict=True)}
                for name, row in zip(self.names, rows, strict=True)
            },
            "levels": list(self.levels),
            "notes": {name: CORRUPTIONS[name].note for name in self.names if CORRUPTIONS[name].note},
        }


def corruption_accuracy(
    model: Model,
    loader: Iterable[Any],
    names: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    *,
    seed: int = 0,
    levels: str = "auto",
    on_batch: Callable[[int], None] | None = None,
) -> CorruptionReport:
    """Measure accuracy under the common corruptions of ImageNet-C; the images are corrupted here, see `corrupt`.

    The model is put in eval mode and given back as it was. Results do not depend on the batches or on the number of
    ranks; the shards of a loader with ``world > 1`` are merged, so that all ranks return the same.

    Args:
        model: maps images [n, C, H, W] in [0, 1] to logits [n, classes]; an nn.Module or any function.
        loader: yields (x, y) or (x, y, ids); ids default to 0, 1, ... in the order of the loader. It is streamed.
        names: keys of `CORRUPTIONS`; None means all 15.
        severities: some of 1 to 5.
        seed, levels: see `corrupt`.
        on_batch: called after each batch with the images done, on this rank.

    Raises:
        UsageError: if the loader yields nothing, and for any other wrong argument.
    """
    names, severities = tuple(CORRUPTIONS) if names is None else tuple(names), tuple(severities)
    _check(names, severities)
    rows: list[Columns] = []
    tables: set[str] = set()
    done = 0
    for x, y, ids in batches(loader, device_of(model)):
        tables.add(levels_for(x.shape[-2], x.shape[-1], levels))
        correct = [
            predict(model, corrupt(x, name, severity, ids=ids, seed=seed, levels=levels)) == y
            for name in names
            for severity in severities
        ]
        grid = torch.stack(correct, 1).view(len(y), len(names), len(severities))
        rows.append({"ids": ids, "clean_correct": predict(model, x, y) == y, "correct": grid})
        done += len(y)
        if on_batch is not None:
            on_batch(done)
    columns = merge(rows, loader, "corruption_accuracy")
    accuracy = columns["correct"].double().mean(0)
    clean = float(columns["clean_correct"].double().mean())
    return CorruptionReport(names, severities, clean, accuracy, tuple(sorted(tables)), **columns)


def _check(names: tuple[str, ...], severities: tuple[int, ...]) -> None:
    for name in names:
        if name not in CORRUPTIONS:
            raise unknown("corruption", name, CORRUPTIONS)
    if not names or len(set(names)) < len(names):
        raise UsageError(f"expected one or more corruptions, each once, got {', '.join(names) or 'none'}.")
    if not severities or len(set(severities)) < len(severities) or not set(severities) <= set(SEVERITIES):
        raise UsageError(f"severities are some of 1, 2, 3, 4, 5, each once, got {list(severities)}.")

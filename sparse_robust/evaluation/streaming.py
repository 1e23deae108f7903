"""What passes over a loader share: predictions that do not depend on the batch, and rows merged over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_robust.attacks import Model
from sparse_robust.attacks.context import attack_context
from sparse_robust.attacks.engine import default_chunk
from sparse_robust.attacks.inputs import check_labels
from sparse_robust.attacks.passes import Passes
from sparse_robust.errors import UsageError

T = TypeVar("T")

Columns = dict[str, Tensor]
"""Tensors with one row an image; ``ids`` (int64 [n]) is one of them."""


def batches(loader: Iterable[Any], device: torch.device | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (x, y, ids) of a loader of (x, y) or (x, y, ids), on a device; ids default to 0, 1, ... in its order."""
    seen = 0
    for batch in loader:
        if not isinstance(batch, Sequence) or len(batch) < 2 or not all(isinstance(part, Tensor) for part in batch[:2]):
            parts = f" of {[type(part).__name__ for part in batch]}" if isinstance(batch, Sequence) else ""
            raise UsageError(
                "a loader yields (images, labels) or (images, labels, sample ids) as tensors, got "
                f"{type(batch).__name__}{parts}."
            )
        x, y = batch[0], batch[1]
        ids = batch[2] if len(batch) > 2 else torch.arange(seen, seen + len(y))
        seen += len(y)
        if len(y):
            where = x.device if device is None else device
            yield x.to(where), y.to(where), ids.to(where)


def device_of(model: object) -> torch.device | None:
    """Return the device of a module's parameters; None where there are none, and for a function."""
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return None


def predict(model: Model, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the classes the model predicts in eval mode, int64 [n]; -1 where its logits have a NaN.

    Args:
        labels: checked against the number of classes, if given.
    """
    with attack_context(model, "eval"), torch.no_grad():
        logits = Passes(model, default_chunk(images)).logits(images)
    if labels is not None:
        check_labels(labels, logits)
    return torch.where(logits.isnan().any(1), -1, logits.argmax(1))


def merge(rows: Sequence[Columns], loader: Iterable[Any], caller: str) -> Columns:
    """Return the rows of all batches and, for a sharded loader (``loader.world > 1``), of all ranks, sorted by id.

    Raises:
        UsageError: if there is none, or if the shards overlap.
    """
    rows = [{name: column.cpu() for name, column in part.items()} for part in rows]
    sharded = getattr(loader, "world", 1) > 1
    if sharded:
        rows = [row for part in gather(rows) for row in part]
    if not rows:
        raise UsageError(f"{caller} got a loader that yields no batch; expected at least one image.")
    columns = {name: torch.cat([part[name] for part in rows]) for name in rows[0]}
    order = torch.argsort(columns["ids"], stable=True)
    columns = {name: column[order] for name, column in columns.items()}
    if sharded and len(torch.unique(columns["ids"])) != len(order):
        raise UsageError("the shards of a distributed evaluation overlap: some sample ids came twice.")
    return columns


def gather(mine: T) -> list[T]:
    """Return what every rank gives, in the order of the ranks.

    Raises:
        UsageError: without a process group.
    """
    if not torch.distributed.is_initialized():
        raise UsageError(
            "the loader is one shard of several, but no process group is there to merge the shards: start with "
            "accelerate launch."
        )
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, mine)
    return gathered

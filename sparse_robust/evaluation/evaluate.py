"""Clean and robust accuracy over a loader, every image counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from sparse_robust.attacks import PGD, parse_eps
from sparse_robust.errors import UsageError

UNBROKEN, CLEAN_WRONG = -1, -2


@dataclass(frozen=True)
class PerImage:
    """One entry an image, in the order of the sample ids.

    Attributes:
        ids: int64 [n], the sample ids.
        labels: int64 [n].
        clean_prediction: int64 [n].
        broken_by: int64 [n], index of the attack that fooled the model; -1 if none did, -2 if it was wrong without any.
        norms: float32 [n], size of the perturbation that fooled it, 0 where none did.
    """

    ids: Tensor
    labels: Tensor
    clean_prediction: Tensor
    broken_by: Tensor
    norms: Tensor

    @property
    def clean_correct(self) -> Tensor:
        """bool [n]: classified correctly without an attack."""
        return self.clean_prediction == self.labels

    @property
    def robust_correct(self) -> Tensor:
        """bool [n]: classified correctly under every attack."""
        return self.broken_by == UNBROKEN


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        clean: share of images classified correctly, in [0, 1].
        robust: share that stays correct under every attack, in [0, 1]; equal to ``clean`` without attacks.
        robust_after: the same after each attack in turn.
        per_image: the verdict of each image.
        counts: forward and backward passes of images, over the whole set: ``forward``, ``backward``, ``queries``.
    """

    clean: float
    robust: float
    robust_after: tuple[float, ...]
    per_image: PerImage
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.per_image.ids)

    @property
    def sa(self) -> float:
        """Standard accuracy in percent."""
        return 100 * self.clean

    @property
    def ra(self) -> float:
        """Robust accuracy in percent."""
        return 100 * self.robust


def evaluate(
    model: nn.Module | Callable[[Tensor], Tensor],
    loader: Iterable[Any],
    attacks: Sequence[PGD] = (),
    eps: str | float = 0.0,
    *,
    on_batch: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measure clean accuracy and accuracy under each attack; an image counts as robust if every attack fails on it.

    The model is put in eval mode and given back as it was. An attack only sees the images that are still classified
    correctly.
    In a distributed run with a sharded loader (``loader.world > 1``) the shards are merged, so all ranks return the
    same.

    Args:
        model: maps images [n, C, H, W] in [0, 1] to logits [n, classes].
        loader: yields (x, y) or (x, y, ids); ids default to 0, 1, ... in the order of the loader.
        attacks: tried in turn.
        eps: radius for all of them: a number, or text such as ``8/255``.
        on_batch: called after each batch with the images done and the images still robust, on this rank.

    Raises:
        UsageError: if the loader yields nothing.
    """
    radius = parse_eps(eps)
    rows: list[PerImage] = []
    counts = {"forward": 0, "backward": 0, "queries": 0}
    exact = torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False)
    with evaluating(model), torch.no_grad(), exact:
        for x, y, ids in _batches(loader, _device_of(model)):
            rows.append(_verdicts(model, x, y, ids, attacks, radius, counts))
            if on_batch is not None:
                on_batch(sum(len(r.ids) for r in rows), sum(int(r.robust_correct.sum()) for r in rows))
    sharded = getattr(loader, "world", 1) > 1
    if sharded:
        rows, counts = _merge_ranks(rows, counts)
    if not rows:
        raise UsageError("evaluate got a loader that yields no batch; expected at least one image.")
    merged = PerImage(*(torch.cat([getattr(r, f.name) for r in rows]) for f in fields(PerImage)))
    order = torch.argsort(merged.ids, stable=True)
    per_image = PerImage(*(getattr(merged, f.name)[order] for f in fields(PerImage)))
    if sharded and len(torch.unique(per_image.ids)) != len(per_image.ids):
        raise UsageError("the shards of a distributed evaluation overlap: some sample ids came twice.")
    total, broken = len(per_image.ids), per_image.broken_by
    after = [float(((broken == UNBROKEN) | (broken > i)).sum()) / total for i in range(len(attacks))]
    clean = float(per_image.clean_correct.sum()) / total
    return Evaluation(clean, after[-1] if after else clean, tuple(after), per_image, counts)


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Run a block with every submodule in eval mode; the flags come back as they were, submodule by submodule."""
    if not isinstance(model, nn.Module):
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _verdicts(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    attacks: Sequence[PGD],
    eps: float,
    counts: dict[str, int],
) -> PerImage:
    prediction = model(x).argmax(1)
    counts["forward"] += len(y)
    broken = torch.where(prediction == y, UNBROKEN, CLEAN_WRONG)
    norms = torch.zeros(len(y), device=x.device)
    for index, attack in enumerate(attacks):
        alive = (broken == UNBROKEN).nonzero().flatten()
        if not len(alive):
            break
        result = attack.run(model, x[alive], y[alive], eps=eps, ids=ids[alive])
        fooled = alive[result.success]
        broken[fooled] = index
        norms[fooled] = result.norms[result.success]
        for name in counts:
            counts[name] += int(getattr(result.counts, name).sum())
    return PerImage(ids.cpu(), y.cpu(), prediction.cpu(), broken.cpu(), norms.cpu())


def _batches(loader: Iterable[Any], device: torch.device | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    seen = 0
    for batch in loader:
        x, y = batch[0], batch[1]
        ids = batch[2] if len(batch) > 2 else torch.arange(seen, seen + len(y))
        seen += len(y)
        if len(y):
            where = x.device if device is None else device
            yield x.to(where), y.to(where), ids.to(where)


def _device_of(model: object) -> torch.device | None:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    return None


def _merge_ranks(rows: list[PerImage], counts: dict[str, int]) -> tuple[list[PerImage], dict[str, int]]:
    if not torch.distributed.is_initialized():
        raise UsageError(
            "the loader is one shard of several, but no process group is there to merge the shards: start with "
            "accelerate launch."
        )
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (rows, counts))
    return [row for part, _ in gathered for row in part], {
        name: sum(part[name] for _, part in gathered) for name in counts
    }

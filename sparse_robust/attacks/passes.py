"""Evaluations of a model whose result for an image does not depend on the batch the image is in.

A library's convolution may round differently at another batch size, and an attack of a hundred sign steps turns such a
difference into another verdict. So the model only ever sees batches of a few fixed sizes: the chunk, and those smaller
ones whose results were seen to have the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparse_robust.attacks.context import Model
from sparse_robust.attacks.inputs import NO_GRADIENT, check_logits
from sparse_robust.attacks.procedure import Seen, per_row
from sparse_robust.errors import UsageError

Losses = Callable[[Tensor], Tensor]
"""logits [n, classes] -> [n]."""


@dataclass
class _Sizes:
    """What is known of batch sizes below the chunk.

    Attributes:
        agreed: those that gave the same bits as the chunk.
        refused: the largest that did not, 0 if there is none; the chunk, where the place in the batch matters.
        wasted: rows that were padded because a size was not tried yet.
    """

    agreed: set[int] = field(default_factory=set)
    refused: int = 0
    wasted: Counter[int] = field(default_factory=Counter)


_SIZES: WeakKeyDictionary[Model, dict[Hashable, _Sizes]] = WeakKeyDictionary()


def differentiate(model: Model, images: Tensor, losses: Losses) -> Seen:
    """Return logits, losses and the gradient of each loss with respect to its image.

    Losses are summed, not averaged: an image's gradient does not depend on its batch, and does not underflow in a large
    one. They are taken in fp32 whatever precision the model computes in.
    """
    with torch.enable_grad():
        leaf = images.detach().requires_grad_(True)
        logits = full_precision(check_logits(model(leaf), len(leaf), needs_grad=True))
        values = losses(logits)
        (grad,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
    if grad is None:
        raise UsageError(NO_GRADIENT)
    return Seen(logits.detach(), values.detach(), grad)


def jacobian(model: Model, images: Tensor) -> Seen:
    """Return logits and, as ``grad`` [n, classes, ...], the gradient of each; the loss has no elements."""
    with torch.enable_grad():
        leaf = images.detach().requires_grad_(True)
        logits = full_precision(check_logits(model(leaf), len(leaf), needs_grad=True))
        grads = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in logits.unbind(1)]
    return Seen(logits.detach(), logits.new_empty(0), torch.stack(grads, 1))


def full_precision(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 if they are that."""
    return logits if logits.dtype == torch.float64 else logits.float()


@cache
def keep_freed_memory() -> None:
    """Let the C library keep up to 64 MiB that are freed, instead of giving them back to the system after every pass.

    Fetching them again, page by page, was a fifth of the time of a small ResNet's gradient. glibc raises its thresholds
    when a block of up to 32 MiB is freed that it had from the system; elsewhere this does nothing.
    """
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


class Passes:
    """A model, evaluated at batches of canonical sizes only.

    Args:
        model: maps images [n, ...] to logits [n, classes]. It is frozen and in its mode while this is used (see
            `attack_context`).
        chunk: the largest batch; at least 2. Two evaluations with the same chunk give every image the same bits.
        eot_iter: passes that are averaged, for models with randomness of their own.
        pad: False evaluates batches as they come, for models whose answer depends on the batch anyway.
    """

    def __init__(self, model: Model, chunk: int, *, eot_iter: int = 1, pad: bool = True) -> None:
        self.model, self.chunk, self.eot_iter, self.pad = model, chunk, eot_iter, pad
        self._own_sizes: dict[Hashable, _Sizes] = {}
        # Multiples of a sixteenth of the chunk, or of 8, which is what vectors hold; and the powers of two.
        apart = max(8, chunk // 16)
        self._candidates = sorted({1 << k for k in range(chunk.bit_length())} | set(range(apart, chunk, apart)))

    def logits(self, images: Tensor) -> Tensor:
        """Return logits [n, classes] of any number of images, without gradient."""
        parts = [self._averaged(part, self._forward, gradient=False)[0] for part in self._parts(images)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def gradients(self, images: Tensor, losses: Losses) -> Seen:
        """Return what is seen at up to ``chunk`` images; ``losses`` takes exactly their logits."""

        def padded(logits: Tensor) -> Tensor:
            return losses(logits[: len(images)])

        def see(part: Tensor) -> tuple[Tensor, ...]:
            return differentiate(self.model, part, padded)

        logits, loss, grad = self._averaged(images, see, gradient=True)
        return Seen(logits, loss, grad)

    def jacobians(self, images: Tensor) -> Seen:
        """Return what is seen at up to ``chunk`` images, with the gradients of all logits."""
        logits, loss, grad = self._averaged(images, lambda part: jacobian(self.model, part), gradient=True)
        return Seen(logits, loss, grad)

    def size(self, images: Tensor, *, gradient: bool) -> int:
        """Return the size of the batch in which to evaluate so many images: the smallest known to give the same bits.

        That is `chunk` at first. Another size is tried, once for a model and an image shape, as soon as padding because
        it is not known has cost as much as the trial: on the images at hand, at both ends of the chunk. Where one
        differs anywhere, smaller ones are not tried: they rarely agree then.
        """
        key = (self.chunk, gradient, images.shape[1:], images.dtype, images.device, torch.get_num_threads())
        known, count = self._known_sizes().setdefault(key, _Sizes()), len(images)
        best = min((size for size in known.agreed if size >= count), default=self.chunk)
        wanted = next((size for size in self._candidates if max(count, known.refused + 1) <= size < best), best)
        if wanted == best:
            return best
        known.wasted[wanted] += best - wanted
        if known.wasted[wanted] < self.chunk + 2 * wanted:
            return best
        if not known.agreed and not known.refused and not self._agrees(images, self.chunk, gradient, turned=True):
            known.refused = self.chunk  # where the place in the batch matters, no size is worth a try
        elif self._agrees(images, wanted, gradient):
            known.agreed.add(wanted)
        else:
            known.refused = wanted
        return wanted if wanted in known.agreed else best

    def _known_sizes(self) -> dict[Hashable, _Sizes]:
        try:
            return _SIZES.setdefault(self.model, {})
        except TypeError:  # what cannot be referenced weakly
            return self._own_sizes

    def _agrees(self, images: Tensor, size: int, gradient: bool, *, turned: bool = False) -> bool:
        """Whether batches of a size give the bits of the chunk; ``turned``: with the rows the other way round."""
        rows = images[torch.arange(self.chunk, device=images.device) % len(images)]
        # Equal rows would hide a dependence on the position.
        ramp = torch.linspace(0, 0.5, self.chunk, device=rows.device, dtype=rows.dtype)
        rows = (rows + per_row(ramp, rows)) / 1.5

        def bits(part: Tensor) -> tuple[Tensor, ...]:
            if not gradient:
                return self._forward(part)
            return differentiate(self.model, part, lambda logits: torch.logsumexp(logits, 1) - logits[:, 0])

        whole = bits(rows)
        if turned:
            return all(torch.equal(a, b.flip(0)) for a, b in zip(bits(rows.flip(0)), whole, strict=True))
        ends = (slice(0, size), slice(self.chunk - size, self.chunk))
        return all(torch.equal(a, b[end]) for end in ends for a, b in zip(bits(rows[end]), whole, strict=True))

    def _forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (full_precision(check_logits(self.model(images), len(images))),)

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        return images.split(self.chunk) if self.pad else (images,)

    def _averaged(
        self, images: Tensor, see: Callable[[Tensor], tuple[Tensor, ...]], *, gradient: bool
    ) -> tuple[Tensor, ...]:
        count, shown = len(images), images
        if self.pad and 0 < count < self.chunk:
            size = self.size(images, gradient=gradient)
            shown = torch.cat([images, images[:1].expand(size - count, *images.shape[1:])])
        seen = see(shown)
        for _ in range(self.eot_iter - 1):
            seen = tuple(a + b for a, b in zip(seen, see(shown), strict=True))
        return tuple(value[:count] if self.eot_iter == 1 else value[:count] / self.eot_iter for value in seen)

"""Evaluations of a model whose result for an image does not depend on the batch the image is in.

A library's convolution may round differently at another batch size, and an attack of a hundred sign steps turns such a
difference into another verdict. So the model only ever sees batches of a few fixed sizes: the chunk, and those smaller
ones whose results were seen to have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sparse_robust.attacks.context import Model
from sparse_robust.attacks.inputs import NO_GRADIENT, check_logits
from sparse_robust.attacks.procedure import Seen, per_row
from sparse_robust.errors import UsageError

Losses = Callable[[Tensor], Tensor]
"""logits [n, classes] -> [n]."""

_SIZES: WeakKeyDictionary[Model, dict[Hashable, tuple[int, ...]]] = WeakKeyDictionary()


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
        self._own_sizes: dict[Hashable, tuple[int, ...]] = {}

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

    def sizes(self, images: Tensor, *, gradient: bool) -> tuple[int, ...]:
        """Return the canonical batch sizes, ascending: `chunk`, and the powers of two below it with the same bits.

        Each is tried once for a model and an image shape, on the images at hand, at both ends of the chunk. One that
        differs anywhere ends the search: smaller ones rarely agree then.
        """
        key = (self.chunk, gradient, images.shape[1:], images.dtype, images.device, torch.get_num_threads())
        known = self._known_sizes()
        if key not in known:
            known[key] = (*sorted(self._same_bits(images, gradient)), self.chunk)
        return known[key]

    def _known_sizes(self) -> dict[Hashable, tuple[int, ...]]:
        try:
            return _SIZES.setdefault(self.model, {})
        except TypeError:  # what cannot be referenced weakly
            return self._own_sizes

    def _same_bits(self, images: Tensor, gradient: bool) -> set[int]:
        rows = images[torch.arange(self.chunk, device=images.device) % len(images)]
        # Equal rows would hide a dependence on the position.
        ramp = torch.linspace(0, 0.5, self.chunk, device=rows.device, dtype=rows.dtype)
        rows = (rows + per_row(ramp, rows)) / 1.5

        def bits(part: Tensor) -> tuple[Tensor, ...]:
            if not gradient:
                return self._forward(part)
            return differentiate(self.model, part, lambda logits: torch.logsumexp(logits, 1) - logits[:, 0])

        whole, agreed, size = bits(rows), set[int](), self.chunk
        if not all(torch.equal(a, b.flip(0)) for a, b in zip(bits(rows.flip(0)), whole, strict=True)):
            return agreed  # where the place in the batch matters, another size is not even worth a try
        while size > 1:
            size = 1 << (size - 1).bit_length() - 1  # the next power of two below
            for where in (slice(0, size), slice(self.chunk - size, self.chunk)):
                if not all(torch.equal(a, b[where]) for a, b in zip(bits(rows[where]), whole, strict=True)):
                    return agreed
            agreed.add(size)
        return agreed

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
            size = next(size for size in self.sizes(images, gradient=gradient) if size >= count)
            shown = torch.cat([images, images[:1].expand(size - count, *images.shape[1:])])
        seen = see(shown)
        for _ in range(self.eot_iter - 1):
            seen = tuple(a + b for a, b in zip(seen, see(shown), strict=True))
        return tuple(value[:count] if self.eot_iter == 1 else value[:count] / self.eot_iter for value in seen)

"""Masks that change while a network trains: gradual magnitude pruning, SET, RigL, GraNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks import Masks, cut
from sparse_robust.pruning.schedules import Cosine, Cubic
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.rng import philox_uniform


@dataclass(frozen=True)
class Method:
    """A published way to change masks, with its published numbers as defaults.

    Attributes:
        name: how it is asked for.
        description: one sentence.
        source: where it was published.
        prunes: the number of kept weights falls to the final one (`Cubic`).
        grows: what connections come back by: ``gradient``, ``random``, or nothing does.
        start: share of weights that are kept at the beginning; None begins with the final number.
        drop: share of the kept weights of each layer that an update exchanges, at the beginning; it falls by a cosine.
        drop_last: the share at the end.
        window: from and until when weights are pruned, or else connections exchanged, in shares of the run.
        exchange_until: until when connections are exchanged; None is the end of the window.
        rounding: makes a number of connections of a share of them.
    """

    name: str
    description: str
    source: str
    prunes: bool = False
    grows: str | None = None
    start: float | None = None
    drop: float = 0.0
    drop_last: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    exchange_until: float | None = None
    rounding: Callable[[float], int] = math.floor


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "gradual",
            "Dense at first; the smallest magnitudes over all layers go, ever fewer an update, along a cubic.",
            "Zhu and Gupta, To prune, or not to prune (2017); window of Liu et al., Sparsity may cry (2023)",
            prunes=True,
            start=1.0,
            window=(0.1, 0.8),
        ),
        Method(
            "set",
            "Each layer exchanges its smallest magnitudes for random connections.",
            "Mocanu et al., Scalable training of artificial neural networks with adaptive sparse connectivity (2018), "
            "as in Evci et al. (2020)",
            grows="random",
            drop=0.3,
            window=(0.0, 0.75),
        ),
        Method(
            "rigl",
            "Each layer exchanges its smallest magnitudes for the connections with the largest gradients.",
            "Evci et al., Rigging the lottery: making all tickets winners (2020)",
            grows="gradient",
            drop=0.3,
            window=(0.0, 0.75),
        ),
        Method(
            "granet",
            "Half dense at first; gradual pruning, and after each cut each layer exchanges connections as in RigL.",
            "Liu et al., Sparse training via boosting pruning plasticity with neuroregeneration (2021)",
            prunes=True,
            grows="gradient",
            start=0.5,
            drop=0.5,
            drop_last=0.005,
            window=(0.0, 110 / 160),
            exchange_until=1.0,
            rounding=math.ceil,
        ),
    )
}
"""Every method, by name."""


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """A method with its numbers; `plan` makes it the schedule of one run.

    Attributes:
        method: a name in `METHODS`.
        every: updates of the weights between changes of the masks.
        drop: see `Method`; None is the published one.
        window: see `Method`; None is the published one.
        start: see `Method`; None is the published one.
    """

    method: str
    every: int = 100
    drop: float | None = None
    window: tuple[float, float] | None = None
    start: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("way to change masks", self.method, METHODS)
        if self.every < 1:
            raise UsageError(f"masks change every so many updates, at least 1; got {self.every}.")
        published = METHODS[self.method]
        if self.drop is not None and not published.grows:
            raise UsageError(f"{self.method} only prunes: drop, the share to exchange, is not for it.")
        if self.drop is not None and not 0 <= self.drop < 1:
            raise UsageError(f"drop, the share to exchange, must be in [0, 1), got {self.drop}.")
        if self.start is not None and not published.prunes:
            raise UsageError(
                f"{self.method} keeps its number of weights: start, the density it begins with, is not for it."
            )
        if self.start is not None and not 0 < self.start <= 1:
            raise UsageError(f"start, the density it begins with, must be in (0, 1], got {self.start}.")
        if self.window is not None:
            object.__setattr__(self, "window", tuple(self.window))
            if len(self.window) != 2 or not 0 <= self.window[0] < self.window[1] <= 1:
                raise UsageError(f"window is two ascending shares of the run, such as 0.1 and 0.8; got {self.window}.")

    def begins_with(self, count: int, total: int) -> int:
        """Return how many of ``total`` weights are kept at first in a run that ends with ``count``."""
        start = METHODS[self.method].start if self.start is None else self.start
        return count if start is None else max(count, round(start * total))

    def plan(self, *, start: int, stop: int, updates: int, seed: int) -> MaskSchedule:
        """Return the schedule of a run of so many updates, from ``start`` kept weights to ``stop``."""
        method = METHODS[self.method]
        begin, end = (math.floor(share * updates) for share in self.window or method.window)
        end = max(end, begin + 1)
        until = end if method.exchange_until is None else math.floor(method.exchange_until * updates)
        if not method.prunes and start != stop:
            raise UsageError(f"{self.method} keeps its number of weights, and cannot go from {start} to {stop}.")
        first = method.drop if self.drop is None else self.drop
        return MaskSchedule(
            every=self.every,
            begin=begin,
            cubic=Cubic(start, stop, begin, end) if method.prunes else None,
            exchange=Cosine(first, until, min(first, method.drop_last)),
            method=method,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True)
class MaskSchedule:
    """When the masks of a run change, and to what: a pure function of update, masks, weights, gradients and seed.

    Masks change at every ``every``-th update after ``begin``, and at the end of the pruning, so that the final number
    is reached exactly. A connection that is dropped and grown in one update stays as it was, as in RigL's code; one
    that is new has been at +0.0, with its optimizer state, until then.
    """

    every: int
    begin: int
    cubic: Cubic | None
    exchange: Cosine
    method: Method
    seed: int

    def due(self, update: int) -> bool:
        """Whether masks change at the end of update number ``update`` (1 is the first)."""
        ends = self.cubic.end if self.cubic is not None else 0
        within = self.begin < update <= max(ends, self.exchange.end)
        return within and (update % self.every == 0 or update == ends)

    def after(
        self, update: int, masks: Masks, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None]
    ) -> Masks:
        """Return the masks to hold from the end of update number ``update`` on.

        Ties are broken by (layer order, flat index), ascending: of equal magnitudes the first goes.

        Args:
            masks: what is held now.
            weights: by name, before the update.
            gradients: dense ones, where masks prune too, in any positive scale; None counts as zeros. What is not
                finite counts as 0: a scaled gradient that overflowed says nothing.
        """
        named = {name: weights[name].detach() for name in masks}
        if self.cubic is not None:
            masks = cut(named, max(0, masks.count() - self.cubic.count(update)), masks, magnitude=True)
        if not self.method.grows or update > self.exchange.end:
            return masks
        packed: dict[str, Tensor] = {}
        for name, _, kept, _ in masks.layers():
            exchanged = min(kept, self.method.rounding(self.exchange.share(update) * kept))
            held = cut({name: named[name]}, exchanged, masks.only([name]), magnitude=True)
            free = ~held  # what is dropped just now may come back at once
            merit = self._merit(update, name, named[name], gradients.get(name))
            packed |= (held | cut(merit, free.count() - exchanged, free)).tensors()
        return Masks.from_packed(packed, masks.shapes())

    def _merit(self, update: int, name: str, weight: Tensor, gradient: Tensor | None) -> dict[str, Tensor]:
        """Return by what a layer's connections are grown, the largest first."""
        if self.method.grows == "random":
            key = derive_seed("grown connections", self.seed, name)
            here = torch.zeros(1, dtype=torch.int64, device=weight.device)
            return {name: philox_uniform(here, weight.numel(), key=key, stream=update).view(weight.shape)}
        if gradient is None:
            return {name: torch.zeros_like(weight)}
        return {name: gradient.detach().abs().nan_to_num(nan=0.0, posinf=0.0)}

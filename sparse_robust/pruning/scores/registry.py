"""What a score is, what it may look at, and the list of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks import Masks

Batches = Sequence[tuple[Tensor, ...]]
"""Images in [0, 1], labels and, where there is a third one, int64 sample ids; on the model's device."""

Forward = Callable[[Tensor], Tensor]
"""Images -> logits: a model, or a function around one."""

Loss = Callable[[Forward, Tensor, Tensor], Tensor]
"""(forward, images, labels) -> a loss for each image [n], with its graph."""

Scores = dict[str, Tensor]
"""A floating-point score of each weight's shape, by name."""

NEEDS = ("nothing", "shape", "data")


class Attack(Protocol):
    """What turns images into adversarial ones, such as ``functools.partial(PGD(steps=3), eps=0.1)``."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor) -> Tensor:
        """Return adversarial images like ``x``; ``ids`` [n] key the noise."""
        ...


def cross_entropy(forward: Forward, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each image [n]."""
    return F.cross_entropy(forward(x), y, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a score may look at besides the weights.

    Attributes:
        keep: what is still kept of the weights.
        select: makes masks of scores (by absolute value), exactly as they will be made in the end.
        batches: empty unless the score needs data.
        attack: makes the batches adversarial; None leaves them clean.
        loss: what is differentiated.
        seed: of random scores.
    """

    keep: Masks
    select: Callable[[Mapping[str, Tensor]], Masks]
    batches: Batches = ()
    attack: Attack | None = None
    loss: Loss = cross_entropy
    seed: int = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.batches)

    def examples(self, model: nn.Module, size: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images and labels of one pass, attacked against ``model`` as it is when they are asked for.

        Noise is keyed by the sample ids, by default the place in the pass, so it does not depend on the batch size.
        ``size`` splits the batches, once they are attacked.
        """
        passed = 0
        for x, y, *given in self.batches:
            ids = given[0] if given else torch.arange(passed, passed + len(x), device=x.device)
            passed += len(x)
            if self.attack is not None:
                x = self.attack(model, x, y, ids=ids).detach()
            yield from zip(x.split(size or len(x)), y.split(size or len(x)), strict=True)

    def images(self) -> int:
        """Return the number of images of one pass."""
        return sum(len(batch[0]) for batch in self.batches)


ScoreFunction = Callable[..., Scores]
"""(model, weights by name, evidence, **options) -> `Scores`.

A score that needs more than the weights is given a copy of the model, under the present masks, in eval mode unless
asked otherwise, where only the weights require gradients: it may do with it what it likes. Others get the model itself.
"""


@dataclass(frozen=True)
class Score:
    """One entry of `SCORES`.

    Attributes:
        name: how it is asked for.
        description: one sentence.
        source: where it was published.
        needs: ``nothing`` but the weights, the ``shape`` of a batch, or the ``data`` in it.
        function: see `ScoreFunction`; its keyword-only arguments are the score's options.
        magnitude: whether the weights are ordered by the absolute value of what ``function`` returns.
        steps: in how many steps it prunes unless asked otherwise, with scores taken anew after each.
    """

    name: str
    description: str
    source: str
    needs: str
    function: ScoreFunction
    magnitude: bool = False
    steps: int = 1

    @property
    def options(self) -> dict[str, float]:
        """The options and their defaults."""
        parameters = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is inspect.Parameter.KEYWORD_ONLY}


SCORES: dict[str, Score] = {}
"""Every score, by name."""


def register_score(
    name: str, description: str, source: str, *, needs: str = "nothing", magnitude: bool = False, steps: int = 1
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a function as a score, for every pruning command at once."""
    if name in SCORES:
        raise UsageError(f"there is a score {name!r} already: {SCORES[name].description}")
    if needs not in NEEDS:
        raise unknown("need of a score", needs, NEEDS)

    def add(function: ScoreFunction) -> ScoreFunction:
        SCORES[name] = Score(name, description, source, needs, function, magnitude, steps)
        return function

    return add


def check_options(name: str, options: Mapping[str, float]) -> Score:
    """Return the score of this name.

    Raises:
        UsageError: for an unknown score, or an option that it does not have.
    """
    if name not in SCORES:
        raise unknown("score", name, SCORES)
    known = SCORES[name].options
    for option in options:
        if option not in known:
            if not known:
                raise UsageError(f"the score {name!r} takes no options, got {option!r}.")
            raise unknown(f"option of the score {name!r}", option, known)
    return SCORES[name]

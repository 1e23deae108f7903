"""How a finder scores weights: what is checked of its configuration, and what its score is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sparse_robust.attacks import PGD, Budget, parse_eps
from sparse_robust.data import DataSpec, eval_loader
from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks.patterns import Pattern
from sparse_robust.pruning import SCOPES, SCORES, check_options
from sparse_robust.pruning.scores import Attack, Batches
from sparse_robust.seeding import derive_seed

if TYPE_CHECKING:
    from sparse_robust.study.config import EvaluationConfig, FinderConfig
    from sparse_robust.study.context import Context

MULTI_STEP = ("adversarial", "rgd", "trades", "mart")
"""Regimes whose step size is that of one of several steps."""


@dataclass(frozen=True, kw_only=True)
class ScoreAttack:
    """The PGD that makes the batches of a score adversarial: from a random start, eval mode, last iterate."""

    eps: str | float = "8/255"
    """Radius, in pixel units of the [0, 1] range."""
    norm: str = "Linf"
    """Linf, L2 or L1."""
    steps: int = 10
    """PGD steps."""
    step_size: str | float | None = None
    """Size of a step; None means 2.5 eps / steps."""

    def __post_init__(self) -> None:
        Budget(self.norm, parse_eps(self.eps))
        self.build()

    def build(self) -> Attack:
        """Build the attack."""
        attack = PGD(norm=self.norm, steps=self.steps, step_size=self.step_size, keep="last")
        return partial(attack, eps=parse_eps(self.eps))


def check_finder(finder: FinderConfig) -> None:
    """Refuse a finder whose score, scope and pattern do not fit together.

    Raises:
        UsageError: naming the field, what was expected and what came.
    """
    Pattern.parse(finder.pattern)
    chosen = check_options(finder.score, finder.score_options)
    if finder.scope not in (*SCOPES, "custom"):
        raise unknown("find.scope", finder.scope, (*SCOPES, "custom"))
    if (finder.scope == "custom") != bool(finder.densities):
        raise UsageError("find.scope custom and find.densities (by layer, such as {layer1.*: 0.5}) go together.")
    if finder.score_on not in ("clean", "adversarial"):
        raise unknown("find.score_on", finder.score_on, ("clean", "adversarial"))
    if finder.score_on == "adversarial" and chosen.needs != "data":
        raise UsageError(f"the score {finder.score!r} looks at no data, so find.score_on adversarial has no meaning.")
    if finder.score_attack is not None and finder.score_on != "adversarial":
        raise UsageError("find.score_attack is for find.score_on adversarial, and the batches are to be clean.")
    if finder.method not in ("imp", "oneshot"):
        unused = ["score"] if finder.method == "random" else ["score", "scope", "pattern"]
        defaults = {"score": "magnitude", "scope": "global", "pattern": "unstructured"}
        for name in unused:
            if getattr(finder, name) != defaults[name]:
                raise UsageError(
                    f"find.{name} {getattr(finder, name)!r} has no part in method {finder.method}, which makes its "
                    "masks in its own way; use oneshot or imp."
                )
    if finder.like is not None:
        check_like(finder)
    for name in ("score_images", "score_batch"):
        if getattr(finder, name) < 1:
            raise UsageError(f"find.{name} must be at least 1, got {getattr(finder, name)}.")


def check_like(finder: FinderConfig) -> None:
    """Refuse to copy the counts of another finder's tickets where that has no meaning."""
    if finder.method not in ("oneshot", "random") or finder.scope != "global":
        raise UsageError(
            "like copies the count of every layer from another finder, for method oneshot or random, and takes the "
            f"place of find.scope. Got method {finder.method!r}, scope {finder.scope!r}."
        )


def with_attack(finder: FinderConfig, evaluation: EvaluationConfig) -> FinderConfig:
    """Return the finder with the attack that its adversarial batches are made by: the one it names, else that of its
    own recipe where this is adversarial, else the PGD of the evaluation."""
    if finder.score_on != "adversarial" or finder.score_attack is not None:
        return finder
    recipe = finder.recipe
    if recipe is None or recipe.regime == "standard":
        how = evaluation
        attack = ScoreAttack(eps=how.eps, norm=how.norm, steps=how.steps, step_size=how.step_size)
    else:
        step_size = recipe.step_size if recipe.regime in MULTI_STEP else None
        attack = ScoreAttack(eps=recipe.eps, norm=recipe.norm, steps=recipe.steps, step_size=step_size)
    return replace(finder, score_attack=attack)


def pruning_options(finder: FinderConfig, data: DataSpec, seed: int, context: Context) -> dict[str, Any]:
    """Return the keyword arguments of `prune` and `imp` that a finder stands for; images are read if it needs some."""
    score = "random" if finder.method == "random" else finder.score
    scope: str | Mapping[str, float] = finder.densities if finder.scope == "custom" else finder.scope
    options: dict[str, Any] = {
        "score": score, "scope": scope, "pattern": finder.pattern, "options": finder.score_options,
        "stem": finder.stem, "head": finder.head, "exclude": finder.exclude,
    }  # fmt: skip
    if SCORES[score].needs != "nothing":
        options["batches"] = _batches(finder, data, seed, context)
    if finder.score_attack is not None:
        options["on"] = finder.score_attack.build()
    return options


def _batches(finder: FinderConfig, spec: DataSpec, seed: int, context: Context) -> Batches:
    """Training images, evenly spaced over the file and then shuffled, without augmentation; the same on every rank."""
    split = context.data(spec).train
    loader = eval_loader(
        split, finder.score_batch, device=context.accelerator.device, workers=context.workers,
        limit=finder.score_images,
    )  # fmt: skip
    x, y, ids = (torch.cat(parts) for parts in zip(*loader, strict=True))
    generator = torch.Generator().manual_seed(derive_seed("score batches", seed))
    order = torch.randperm(len(x), generator=generator).to(x.device)
    return [(x[part], y[part], ids[part]) for part in order.split(finder.score_batch)]

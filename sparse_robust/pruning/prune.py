"""One-shot pruning: score every prunable weight, keep exactly so many. Score, budget and pattern are chosen freely."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.modules.conv import _ConvTransposeNd

from sparse_robust.attacks import PGD
from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks import Masks, prunable_weights, shard_of, unwrap
from sparse_robust.masks.patterns import UNSTRUCTURED, Pattern
from sparse_robust.masks.wrappers import find_parameters
from sparse_robust.pruning.budgets import Scope, budget
from sparse_robust.pruning.scores import Attack, Batches, Evidence, Loss, Score, check_options, uniform
from sparse_robust.pruning.scores.registry import cross_entropy
from sparse_robust.seeding import seeded


def survivors(n: int, rate: float, k: int) -> int:
    """Return how many of ``n`` weights are left after ``k`` rounds that each remove the share ``rate`` of what is left.

    Each round removes ``round_half_even(rate * alive)``, in exact arithmetic on the decimal that ``rate`` prints as:
    20 % is one fifth, not the binary number next to it.
    """
    share = _exact("rate", rate)
    for _ in range(k):
        n -= round(share * n)
    return n


def prune(
    model: nn.Module,
    sparsity: float | None = None,
    *,
    count: int | None = None,
    score: str = "magnitude",
    scope: Scope = "global",
    pattern: str = "unstructured",
    keep: Masks | None = None,
    batches: Iterable[tuple[Tensor, ...]] | None = None,
    on: str | Attack = "clean",
    loss: Loss = cross_entropy,
    options: Mapping[str, float] | None = None,
    steps: int | None = None,
    mode: str = "eval",
    seed: int = 0,
    stem: bool = True,
    head: bool = False,
    exclude: Sequence[str] = (),
) -> Masks:
    """Return the masks that keep the highest-scored weights of a model; the model is not changed.

    Scores with data are taken on a copy of the model, on the same batches by every process, so that all processes get
    the same masks. A score sees the network that ``keep`` leaves.

    Args:
        model: any module, wrapped or not.
        sparsity: share of the prunable weights to prune, in [0, 1). Of N weights ``survivors(N, sparsity, 1)`` stay.
        count: how many weights to keep instead, from 1 on. Give one of the two; none where the pattern or the scope
            says it (``2:4``, densities, a ticket).
        score: a name in `SCORES`.
        scope: a name in `SCOPES`; densities by layer, such as ``{"layer1.*": 0.5}``, the others sharing the rest; or
            masks whose count in each layer is copied. Ties are broken by (layer order, flat index).
        pattern: which weights go together, see `PATTERNS`: unstructured, 2:4, block:4x4, channel. Whole blocks and
            channels are kept to the nearest number, everything else exactly.
        keep: prune only among these; the sparsity still counts over all prunable weights.
        batches: images, labels and optionally sample ids, on the model's device, for scores that need them.
        on: whether such scores see the batches ``clean`` or ``adversarial`` (PGD-10, Linf, 8/255, step 2/255), or an
            attack of your own, called as ``on(network, x, y, ids=ids)``: ``functools.partial(PGD(steps=3), eps=0.1)``.
        loss: what such scores differentiate: (forward, images, labels) -> a loss for each image.
        options: of the score, see ``SCORES[score].options``.
        steps: prune in so many steps, counts falling exponentially, with new scores after each; None takes the score's
            own number (100 for SynFlow, otherwise 1).
        mode: ``eval`` (running statistics, no dropout: a sum over images does not depend on how they are batched) or
            ``train`` (batch statistics, as SNIP and GraSP were published for untrained networks).
        seed: for random scores, and what is random in the network.
        stem, head, exclude: what is prunable, see `prunable_weights`.

    Warns:
        UserWarning: if a layer loses its last weight; it then passes on only its bias.

    Raises:
        UsageError: if the arguments do not fit together; the message says how.
    """
    weights = prunable_weights(model, stem=stem, head=head, exclude=exclude)
    tiles = Pattern.parse(pattern)
    chosen = check_options(score, options or {})
    seen, attack = _batches(chosen, batches, on)
    if mode not in ("eval", "train"):
        raise unknown("mode", mode, ("eval", "train"))
    _check_layers(model, weights, tiles, chosen)
    everything = Masks.full(weights)
    before = everything if keep is None else keep
    if before.shapes() != everything.shapes():
        differing = sorted(before.shapes().items() ^ everything.shapes().items())
        raise UsageError(f"keep does not cover the prunable weights of this model; first difference: {differing[0]}.")
    plan = _plan(model, before, sparsity, count, scope, tiles)
    number = chosen.steps if steps is None else steps
    if number < 1:
        raise UsageError(f"steps must be at least 1, got {number}.")
    masks = before
    for step in range(1, number + 1):
        now = plan.at(step / number, masks)
        evidence = Evidence(
            keep=masks, select=partial(now.select, keep=masks, magnitude=True),
            batches=seen, attack=attack, loss=loss, seed=seed,
        )  # fmt: skip
        scores = _scores(chosen, model, weights, evidence, mode, options or {})
        masks = now.select(scores, keep=masks, magnitude=chosen.magnitude)
    _warn_emptied(masks, before)
    return masks


def random_like(masks: Masks, seed: int) -> Masks:
    """Return random masks with the same number of kept weights in every layer: the baseline with equal densities.

    With a model at hand it is ``prune(model, score="random", scope=masks)``.
    """
    scores = {name: uniform(name, shape, seed) for name, shape in masks.shapes().items()}
    quotas = {name: kept for name, _, kept, _ in masks.layers()}
    return _Plan(masks.count(), quotas, UNSTRUCTURED, Masks.full(scores)).select(
        scores, keep=Masks.full(scores), magnitude=False
    )


@dataclass(frozen=True)
class _Plan:
    """How many weights to keep: in total, in each layer (None: as the ranking over all comes out), in which pattern."""

    count: int
    quotas: Mapping[str, int] | None
    pattern: Pattern
    before: Masks

    def at(self, part: float, masks: Masks) -> _Plan:
        """Return the plan of a step on the way, where this part of the way (0 to 1) lies behind."""
        if part >= 1:
            return self
        room = self.pattern.capacity(masks)
        count = min(sum(room.values()), _between(self.before.count(), self.count, part))
        if self.quotas is None:
            return replace(self, count=count)
        start = {name: kept for name, _, kept, _ in self.before.layers()}
        quotas = {n: min(room[n], _between(start[n], kept, part)) for n, kept in self.quotas.items()}
        return replace(self, count=count, quotas=quotas)

    def select(self, scores: Mapping[str, Tensor], *, keep: Masks, magnitude: bool) -> Masks:
        """Keep the highest of these scores."""
        keep = self.pattern.thin(scores, keep, magnitude=magnitude)
        if self.quotas is None:
            return self.pattern.select(scores, self.count, keep, magnitude=magnitude)
        packed: dict[str, Tensor] = {}
        for name, kept in self.quotas.items():
            layer = self.pattern.select({name: scores[name]}, kept, keep.only([name]), magnitude=magnitude)
            packed |= layer.tensors()
        return Masks.from_packed(packed, keep.shapes())


def _plan(
    model: nn.Module, before: Masks, sparsity: float | None, count: int | None, scope: Scope, pattern: Pattern
) -> _Plan:
    capacity = pattern.capacity(before)
    if sparsity is not None and count is not None:
        raise UsageError("give either sparsity (the share to prune) or count (the number to keep).")
    if sparsity is not None:
        kept: int | None = survivors(before.numel(), sparsity, 1)
        given = f"sparsity {sparsity} of {before.numel()} weights"
    else:
        kept, given = count, f"count {count}"
    if kept is None and pattern.limit is not None and isinstance(scope, str):
        kept = sum(capacity.values())
    if kept is not None and not 1 <= kept <= before.count():
        raise UsageError(f"{given} would keep {kept} weights: expected from 1 to {before.count()}, what is there.")
    if kept is not None and kept > sum(capacity.values()):
        raise UsageError(
            f"{given} would keep {kept} weights, and {pattern.name} leaves {sum(capacity.values())} at most. Ask for a "
            "higher sparsity, or for none, which keeps as many as the pattern allows."
        )
    quotas = budget(model, scope, before, kept, capacity)
    if quotas is not None:
        kept = sum(quotas.values())
    if not kept:
        raise UsageError("this would keep no weight at all: expected from 1.")
    return _Plan(kept, quotas, pattern, before)


def _between(start: int, end: int, part: float) -> int:
    """From start to end in equal ratios, rounded."""
    return max(end, round(start * (end / start) ** part)) if start else 0


def _batches(
    chosen: Score, batches: Iterable[tuple[Tensor, ...]] | None, on: str | Attack
) -> tuple[Batches, Attack | None]:
    """Return what the score sees, checked."""
    if isinstance(on, str) and on not in ("clean", "adversarial"):
        raise unknown("kind of batches", on, ("clean", "adversarial"))
    if chosen.needs == "data" and batches is None:
        raise UsageError(f"the score {chosen.name!r} looks at data: give batches, pairs of images and labels.")
    if chosen.needs == "shape" and batches is None:
        raise UsageError(f"the score {chosen.name!r} takes the shape of its input from a batch: give batches.")
    if chosen.needs != "data" and on != "clean":
        raise UsageError(f"the score {chosen.name!r} looks at no data, so only on='clean' has a meaning, got {on!r}.")
    if chosen.needs == "nothing" or batches is None:
        return (), None
    seen = list(batches)
    if not any(len(batch[0]) for batch in seen):
        raise UsageError(f"the score {chosen.name!r} looks at data, and batches holds no image.")
    if on == "adversarial":
        return seen, partial(PGD(steps=10, step_size="2/255"), eps="8/255")
    return seen, None if isinstance(on, str) else on


def _check_layers(model: nn.Module, weights: Mapping[str, Tensor], pattern: Pattern, chosen: Score) -> None:
    """Refuse weights that a pattern or a score cannot read."""
    if pattern == UNSTRUCTURED and chosen.needs == "nothing":
        return
    for name, weight in weights.items():
        if shard_of(weight).group is not None:
            raise UsageError(
                f"{name} is sharded over processes: scores with data and patterns other than unstructured need whole "
                "weights. Prune before the model is sharded."
            )
        module = unwrap(model).get_submodule(name.rpartition(".")[0])
        if pattern != UNSTRUCTURED and isinstance(module, _ConvTransposeNd):
            raise UsageError(
                f"the pattern {pattern.name} groups the inputs of an output, and {name}, of a transposed convolution, "
                "has its dimensions in another order. Leave it out: exclude=[...]."
            )


def _scores(
    chosen: Score,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    evidence: Evidence,
    mode: str,
    options: Mapping[str, float],
) -> dict[str, Tensor]:
    """Compute the scores: on the model itself, or on a copy that the score may do with as it likes."""
    if chosen.needs == "nothing":
        return chosen.function(model, weights, evidence, **options)
    network = copy.deepcopy(unwrap(model))
    evidence.keep.apply_(network)
    network.train(mode == "train").requires_grad_(False)
    copies: dict[str, nn.Parameter] = find_parameters(network, evidence.keep.shapes())
    for weight in copies.values():
        weight.requires_grad_(True)
    # Some of cuDNN's backward passes add up in an order of their own, which processes would not share.
    exact = cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False)
    with seeded("score", evidence.seed), exact:
        return chosen.function(network, copies, evidence, **options)


def _exact(what: str, share: float) -> Fraction:
    if isinstance(share, str):
        raise UsageError(f"{what} must be a number, got the text {share!r}.")
    if not 0 <= share < 1:
        raise UsageError(f"{what} must be in [0, 1), got {share}. It is a share, not a percentage: 90 % is 0.9.")
    return Fraction(str(float(share) if isinstance(share, Tensor) else share))


def _warn_emptied(masks: Masks, before: Masks) -> None:
    had = {name: kept for name, _, kept, _ in before.layers()}
    empty = [name for name, _, kept, _ in masks.layers() if kept == 0 and had[name] > 0]
    if empty:
        warnings.warn(f"no weight is left in {', '.join(empty)}", stacklevel=3)

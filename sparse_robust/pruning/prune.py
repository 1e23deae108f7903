"""One-shot pruning: score every prunable weight, remove exactly so many."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial

from torch import Tensor, nn

from sparse_robust.attacks import PGD
from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks import Masks, cut, prunable_weights
from sparse_robust.pruning.scores import SCORES, Batches, Score, uniform

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> adversarial images."""

SCOPES = {
    "global": "All layers are compared together; their densities come out as they may.",
    "layerwise": "Every layer loses the same share, to within one weight; the total is the same as for global.",
}


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
    scope: str = "global",
    keep: Masks | None = None,
    batches: Batches | None = None,
    on: str | Attack = "clean",
    seed: int = 0,
    stem: bool = True,
    head: bool = False,
    exclude: Sequence[str] = (),
) -> Masks:
    """Return the masks that keep the highest-scored weights of a model; the model is not changed.

    Args:
        model: any module, wrapped or not.
        sparsity: share of the prunable weights to prune, in [0, 1). Of N weights ``survivors(N, sparsity, 1)`` stay.
        count: how many weights to keep instead, from 1 on. Give one of the two.
        score: a name in `SCORES`.
        scope: ``global`` or ``layerwise``, see `SCOPES`. Ties are broken by (layer order, flat index).
        keep: prune only among these; the sparsity still counts over all prunable weights.
        batches: pairs of images and labels on the model's device, for scores that need data.
        on: whether such scores see the batches ``clean`` or ``adversarial`` (PGD-10, Linf, 8/255, step 2/255), or an
            attack of your own, called with model, images and labels.
        seed: for random scores.
        stem, head, exclude: what is prunable, see `prunable_weights`.

    Warns:
        UserWarning: if a layer loses its last weight; it then passes on only its bias.

    Raises:
        UsageError: if the arguments do not fit together; the message says how.
    """
    weights = prunable_weights(model, stem=stem, head=head, exclude=exclude)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    before = Masks.full(weights) if keep is None else keep
    kept = _target(before, {name: tuple(weight.shape) for name, weight in weights.items()}, sparsity, count)
    chosen = _score(score, batches, on)
    seen = _batches(model, batches, on) if chosen.needs_data and batches is not None else ()
    scores = chosen.function(model, weights, seen, seed)
    if scope == "global":
        masks = cut(scores, before.count() - kept, before, magnitude=chosen.magnitude)
    else:
        alive = [kept_now for _, _, kept_now, _ in before.layers()]
        quota = dict(zip(before.names(), _apportion(alive, kept), strict=True))
        masks = _cut_layers(scores, quota, before, chosen.magnitude)
    _warn_emptied(masks, before)
    return masks


def random_like(masks: Masks, seed: int) -> Masks:
    """Return random masks with the same number of kept weights in every layer: the baseline with equal densities."""
    scores = {name: uniform(name, shape, seed) for name, shape in masks.shapes().items()}
    quota = {name: kept for name, _, kept, _ in masks.layers()}
    return _cut_layers(scores, quota, Masks.full(scores), magnitude=False)


def _target(before: Masks, shapes: dict[str, tuple[int, ...]], sparsity: float | None, count: int | None) -> int:
    """Return how many weights to keep."""
    if (sparsity is None) == (count is None):
        raise UsageError("give either sparsity (the share to prune) or count (the number to keep).")
    if before.shapes() != shapes:
        differing = sorted(before.shapes().items() ^ shapes.items())
        raise UsageError(f"keep does not cover the prunable weights of this model; first difference: {differing[0]}.")
    if sparsity is not None:
        kept = survivors(before.numel(), sparsity, 1)
        given = f"sparsity {sparsity} of {before.numel()} weights"
    else:
        kept = count or 0
        given = f"count {count}"
    if not 1 <= kept <= before.count():
        raise UsageError(f"{given} would keep {kept} weights: expected from 1 to {before.count()}, what is there.")
    return kept


def _score(name: str, batches: Batches | None, on: str | Attack) -> Score:
    if name not in SCORES:
        raise unknown("score", name, SCORES)
    chosen = SCORES[name]
    if isinstance(on, str) and on not in ("clean", "adversarial"):
        raise unknown("kind of batches", on, ("clean", "adversarial"))
    if chosen.needs_data and batches is None:
        raise UsageError(f"the score {name!r} looks at data: give batches, pairs of images and labels.")
    if not chosen.needs_data and on != "clean":
        raise UsageError(f"the score {name!r} looks at no data, so only on='clean' has a meaning, got {on!r}.")
    return chosen


def _batches(model: nn.Module, batches: Batches, on: str | Attack) -> Iterator[tuple[Tensor, Tensor]]:
    attack = partial(PGD(steps=10, step_size="2/255"), eps="8/255") if isinstance(on, str) else on
    for x, y, *_ in batches:
        yield (x if on == "clean" else attack(model, x, y)), y


def _cut_layers(scores: Mapping[str, Tensor], quota: Mapping[str, int], keep: Masks, magnitude: bool) -> Masks:
    """Keep ``quota[name]`` weights of each layer."""
    packed: dict[str, Tensor] = {}
    for name, kept in quota.items():
        layer = keep.only([name])
        packed |= cut({name: scores[name]}, layer.count() - kept, layer, magnitude=magnitude).tensors()
    return Masks.from_packed(packed, keep.shapes())


def _apportion(alive: Sequence[int], total: int) -> list[int]:
    """Share ``total`` in proportion to ``alive`` by largest remainders (Hamilton's method); of equals the first."""
    quotas = [Fraction(n * total, sum(alive)) for n in alive]
    shares = [int(quota) for quota in quotas]
    order = sorted(range(len(alive)), key=lambda i: (shares[i] - quotas[i], i))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _exact(what: str, share: float) -> Fraction:
    if not 0 <= share < 1:
        raise UsageError(f"{what} must be in [0, 1), got {share}. It is a share, not a percentage: 90 % is 0.9.")
    return Fraction(str(share))


def _warn_emptied(masks: Masks, before: Masks) -> None:
    had = {name: kept for name, _, kept, _ in before.layers()}
    empty = [name for name, _, kept, _ in masks.layers() if kept == 0 and had[name] > 0]
    if empty:
        warnings.warn(f"no weight is left in {', '.join(empty)}", stacklevel=3)

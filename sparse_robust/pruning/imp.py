"""Iterative magnitude pruning with rewinding to the weights it started from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks import Masks, prunable_weights, unwrap
from sparse_robust.masks.patterns import Pattern
from sparse_robust.pruning.prune import prune, survivors
from sparse_robust.pruning.scores import Attack, Batches

TrainRound = Callable[[nn.Module, Masks, int], None]
"""(model, masks of ticket k, k): train the model in place from ticket k, masks held, with an optimizer of its own."""


def rewind_(model: nn.Module, theta: Mapping[str, Tensor], masks: Masks) -> None:
    """Put a model back to ``masks x theta``: the whole state of theta, bit for bit, then +0.0 where it is pruned.

    Convolutions, norms with their running statistics and counters, and the head are all rewound; gradients are dropped.
    Start a new optimizer afterwards.

    Raises:
        UsageError: if theta is not a state of this model (every missing, unexpected and misshapen key is listed).
    """
    model = unwrap(model)
    state = {name: value if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in theta.items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UsageError(f"cannot rewind: theta is not a state of this model. {error}") from error
    masks.apply_(model)
    model.zero_grad(set_to_none=True)


def imp(
    model: nn.Module,
    theta: Mapping[str, Tensor],
    train_round: TrainRound,
    *,
    rounds: int,
    rate: float = 0.2,
    sparsities: Sequence[float] = (),
    score: str = "magnitude",
    scope: str | Mapping[str, float] = "global",
    pattern: str = "unstructured",
    batches: Batches | None = None,
    on: str | Attack = "clean",
    options: Mapping[str, float] | None = None,
    seed: int = 0,
    stem: bool = True,
    head: bool = False,
    exclude: Sequence[str] = (),
    rewind: Mapping[str, Tensor] | str = "theta",
    done: Sequence[Masks] = (),
) -> Iterator[tuple[int, Masks]]:
    """Yield the tickets ``(k, masks)`` of k = len(done) + 1 .. rounds, as each is found.

    Round k removes ``round_half_even(rate * alive)`` of the weights alive, globally by default, by the score of the
    weights *as trained* in the round before, and rewinds everything to theta. Ticket 1 is cut from theta itself and
    needs no training; ticket k needs k - 1 rounds. Masks are nested. When a ticket is yielded the model holds
    ``masks x theta``; it may be used and changed before the next one is asked for.

    Reference: Frankle & Carbin, The lottery ticket hypothesis, ICLR 2019; rewinding to pre-trained weights as in Chen
    et al., Data-efficient double-win lottery tickets from robust pre-training, ICML 2022.

    Args:
        model: a module whose state is replaced; wrapped or not.
        theta: the state dict to start from and rewind to. It is held as it is, except for tensors that the model
            itself uses, which are copied.
        train_round: called as ``train_round(model, masks, k)`` with the model at ticket k; trains it in place.
        rounds: number of the last ticket.
        rate: share of the weights alive that a round removes, in [0, 1).
        sparsities: share of all weights that is gone after each round, instead of ``rate``; ascending, in [0, 1).
        score, scope, pattern, batches, on, options, seed, stem, head, exclude: as for `prune`. While a pattern such as
            2:4 allows less than a round would keep, the round keeps what the pattern allows.
        rewind: what all is put back to after each cut: ``theta``; another state, such as that of the initial network
            or of an early update; or ``lr``: weights go on from where the round left them, and only the learning rate
            begins anew, with the round (Renda et al., Comparing rewinding and fine-tuning, 2020).
        done: tickets 1 .. n of the same run that exist already. They are checked and not yielded again. With rewind
            ``lr``, theta is then the state that the model had when the last of them was yielded.

    Raises:
        UsageError: at once, if theta is not a state of this model or ``done`` is not the beginning of this run.
    """
    if rounds < 0:
        raise UsageError(f"rounds must be 0 or more, got {rounds}.")
    everything = Masks.full(prunable_weights(model, stem=stem, head=head, exclude=exclude))
    tiles = Pattern.parse(pattern)
    room = sum(tiles.capacity(everything).values())
    if sparsities and len(sparsities) != rounds:
        raise UsageError(f"sparsities must name one share a round, {rounds} in all, got {len(sparsities)}.")
    if list(sparsities) != sorted(sparsities):
        raise UsageError(f"sparsities must ascend: a later ticket is cut from an earlier one. Got {list(sparsities)}.")
    n = everything.numel()
    kept = [survivors(n, share, 1) for share in sparsities] or [survivors(n, rate, k) for k in range(1, rounds + 1)]
    counts = [min(count, room) for count in (n, *kept)]
    _check_done(done, everything, counts, exact=not tiles.whole)
    if isinstance(rewind, str) and rewind not in ("theta", "lr"):
        raise unknown("rewind", rewind, ("theta", "lr"))
    start = _own(theta, model)
    back = start if rewind == "theta" else None if isinstance(rewind, str) else _own(rewind, model)
    if back is not None:
        rewind_(model, back, everything)  # refuses the state of another model at once
    rewind_(model, start, done[-1] if done else everything)

    def run() -> Iterator[tuple[int, Masks]]:
        masks = done[-1] if done else everything
        state = back if done and back is not None else start
        for k in range(len(done) + 1, rounds + 1):
            rewind_(model, state, masks)
            if k > 1:
                train_round(model, masks, k - 1)
            masks = prune(
                model,
                count=min(counts[k], masks.count()),
                score=score,
                scope=scope,
                pattern=pattern,
                keep=masks,
                batches=batches,
                on=on,
                options=options,
                seed=seed,
                stem=stem,
                head=head,
                exclude=exclude,
            )
            state = back if back is not None else copy.deepcopy(unwrap(model).state_dict())
            rewind_(model, state, masks)
            yield k, masks

    return run()


def _own(theta: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return theta by plain names, with copies of what shares memory with the model, which training would change."""
    state = unwrap(model).state_dict()
    if theta.keys() != state.keys() and theta.keys() == (wrapped := model.state_dict()).keys():
        theta = {name: theta[key] for name, key in zip(state, wrapped, strict=True)}
    live = {tensor.untyped_storage().data_ptr() for tensor in state.values() if isinstance(tensor, Tensor)}

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):  # what a module keeps as its extra state
            return copy.deepcopy(value)
        return value.detach().clone() if value.untyped_storage().data_ptr() in live else value.detach()

    return {name: own(value) for name, value in theta.items()}


def _check_done(done: Sequence[Masks], everything: Masks, counts: Sequence[int], *, exact: bool) -> None:
    if len(done) >= len(counts):
        raise UsageError(f"{len(done)} tickets are done already and only {len(counts) - 1} rounds are asked for.")
    before = everything
    for k, masks in enumerate(done, start=1):
        if masks.shapes() != everything.shapes():
            raise UsageError(f"ticket {k} of the finished ones is not a mask of this model's prunable weights.")
        if exact and masks.count() != counts[k]:
            raise UsageError(f"ticket {k} keeps {masks.count()} weights; {k} rounds at this rate leave {counts[k]}.")
        if not masks <= before:
            raise UsageError(f"ticket {k} is not nested in the one before it; it is of another run.")
        before = masks

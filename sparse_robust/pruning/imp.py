"""Iterative magnitude pruning with rewinding to the weights it started from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, prunable_weights, unwrap
from sparse_robust.pruning.prune import Attack, prune, survivors
from sparse_robust.pruning.scores import Batches

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
    try:
        model.load_state_dict(theta, strict=True)
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
    score: str = "magnitude",
    scope: str = "global",
    batches: Batches | None = None,
    on: str | Attack = "clean",
    seed: int = 0,
    stem: bool = True,
    head: bool = False,
    exclude: Sequence[str] = (),
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
        score, scope, batches, on, seed, stem, head, exclude: as for `prune`.
        done: tickets 1 .. n of the same run that exist already. They are checked and not yielded again.

    Raises:
        UsageError: at once, if theta is not a state of this model or ``done`` is not the beginning of this run.
    """
    if rounds < 0:
        raise UsageError(f"rounds must be 0 or more, got {rounds}.")
    weights = prunable_weights(model, stem=stem, head=head, exclude=exclude)
    counts = [survivors(sum(weight.numel() for weight in weights.values()), rate, k) for k in range(rounds + 1)]
    everything = Masks.full(weights)
    _check_done(done, everything, counts)
    start = _own(theta, model)
    rewind_(model, start, done[-1] if done else everything)

    def run() -> Iterator[tuple[int, Masks]]:
        masks = done[-1] if done else everything
        for k in range(len(done) + 1, rounds + 1):
            rewind_(model, start, masks)
            if k > 1:
                train_round(model, masks, k - 1)
            masks = prune(
                model,
                count=counts[k],
                score=score,
                scope=scope,
                keep=masks,
                batches=batches,
                on=on,
                seed=seed,
                stem=stem,
                head=head,
                exclude=exclude,
            )
            rewind_(model, start, masks)
            yield k, masks

    return run()


def _own(theta: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return theta with copies of the tensors that share memory with the model, which training would change."""
    live = {tensor.untyped_storage().data_ptr() for tensor in unwrap(model).state_dict().values()}
    return {
        name: tensor.detach().clone() if tensor.untyped_storage().data_ptr() in live else tensor.detach()
        for name, tensor in theta.items()
    }


def _check_done(done: Sequence[Masks], everything: Masks, counts: Sequence[int]) -> None:
    if len(done) >= len(counts):
        raise UsageError(f"{len(done)} tickets are done already and only {len(counts) - 1} rounds are asked for.")
    before = everything
    for k, masks in enumerate(done, start=1):
        if masks.shapes() != everything.shapes():
            raise UsageError(f"ticket {k} of the finished ones is not a mask of this model's prunable weights.")
        if masks.count() != counts[k]:
            raise UsageError(f"ticket {k} keeps {masks.count()} weights; {k} rounds at this rate leave {counts[k]}.")
        if not masks <= before:
            raise UsageError(f"ticket {k} is not nested in the one before it; it is of another run.")
        before = masks

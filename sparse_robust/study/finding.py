"""How finders train: what iterative pruning rewinds to, and tickets of masks that change while a network trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import atomic_write
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.pruning import Scope, prune
from sparse_robust.study.config import FinderConfig
from sparse_robust.training import Hook
from sparse_robust.training.dynamic import DynamicMasks
from sparse_robust.training.trainee import Trainee

State = Mapping[str, Tensor]
STATE = "state.safetensors"

Train = Callable[[nn.Module, Masks | None, int, Sequence[Hook]], None]
"""(model, masks, number of the round, hooks): train the model in place on the source task, resuming."""


OnMain = Callable[[Callable[[], None]], None]


class _Reached(Exception):
    """The update that was waited for is done."""


class _StopAfter(Hook):
    """Ends a run after some update, and holds the weights it had then."""

    def __init__(self, update: int) -> None:
        self.update, self.name = update, f"stop after {update}"
        self.state: State = {}

    def after_update(self, trainee: Trainee, update: int) -> None:
        """Look whether it is time."""
        if update == self.update:
            tensors = trainee.inner.state_dict().items()
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in tensors}
            raise _Reached


def rewind_target(
    config: FinderConfig, model: nn.Module, initial: Callable[[], State], train: Train, folder: Path, on_main: OnMain
) -> State | str:
    """Return what IMP rewinds to, for its argument ``rewind``.

    Args:
        model: at the pre-trained weights; for ``step:K`` it is trained from there, dense, until that update.
        initial: makes the state of the network before any training.
        folder: of the search; the state of update K is kept there until the search is over.
        on_main: runs an action on the main process.
    """
    if config.rewind == "initial":
        return initial()
    if config.rewind == "lr":
        return "lr"
    if config.rewind_step is None:
        return "theta"
    kept = folder / "round-00" / STATE
    if not kept.exists():
        stop = _StopAfter(config.rewind_step)
        try:
            train(model, None, 0, [stop])
        except _Reached:
            on_main(lambda: save_state(stop.state, kept))
            return stop.state
        raise UsageError(
            f"find.rewind is {config.rewind}, and the recipe makes fewer updates. Name an earlier one, or raise epochs."
        )
    return load_file(kept)


def save_state(state: State, path: Path) -> None:
    """Keep the weights that a search goes on from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    atomic_write(path, lambda part: save_file(tensors, part))


def resumed_state(folder: Path, finished: int) -> State:
    """Return the weights of the last of so many finished tickets, from which rewinding of the learning rate goes on."""
    path = folder / f"round-{finished:02d}" / STATE
    if not path.exists():
        raise FileError(
            f"{path} is missing: the weights that round {finished + 1} goes on from. Delete {folder} to search again."
        )
    return load_file(path)


def changed_masks(
    model: nn.Module,
    theta: State,
    config: FinderConfig,
    k: int,
    *,
    rules: Mapping[str, Any],
    seed: int,
    train: Train,
) -> Masks:
    """Return the masks of ticket k: those that training from ``theta`` ends with, when they change as it goes on.

    A run that begins dense has full masks at first; any other random ones, of Erdos-Renyi-Kernel densities unless the
    finder names a scope.
    """
    model.load_state_dict(theta)
    full = Masks.full(prunable_weights(model, **rules))
    dynamics, count = config.dynamics(), config.kept(full.count(), k)
    start, first = dynamics.begins_with(count, full.count()), full
    if start < full.count():
        scope: Scope = "erk" if config.scope == "global" else config.densities or config.scope
        first = prune(model, count=start, score="random", scope=scope, seed=seed, **rules)
    hook = DynamicMasks(dynamics, count=count, seed=seed)
    train(model, first, k, [hook])
    return hook.masks

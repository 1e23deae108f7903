"""Where other pieces take part in a run: hooks around each update, and objectives that do more than return a loss."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor, nn

from sparse_robust.objectives import Objective

if TYPE_CHECKING:
    from sparse_robust.training.trainee import Trainee

Remembered = dict[str, Tensor | Any]
"""A flat state: tensors, and values that JSON can say."""


class Hook:
    """Acts around every update of the weights; a base class that does nothing.

    What it does must be a function of the run's seed, the update and its own state, alike on every rank: then a resumed
    run repeats the uninterrupted one, and masks stay the same on all ranks.

    Attributes:
        name: its part of the checkpoint is kept under this name; two hooks of a run have different ones.
    """

    name: str = "hook"

    def start(self, trainee: Trainee) -> None:
        """Look at what is trained, once, before the first update of this start of the run."""

    def before_update(self, trainee: Trainee, update: int) -> None:
        """Look at the gradients of update number ``update``: reduced over ranks, neither masked nor clipped yet.

        In fp16 they still carry the scale of the loss.
        """

    def after_update(self, trainee: Trainee, update: int) -> None:
        """Act after update number ``update`` (1 is the first), before the moving average takes the weights in.

        Masks are replaced by ``trainee.set_masks(masks)``.
        """

    def state_dict(self) -> Remembered:
        """Return what a checkpoint must hold of it."""
        return {}

    def load_state_dict(self, state: Remembered) -> None:
        """Take over what `state_dict` gave, on the CPU; called after `start`."""


@runtime_checkable
class Stateful(Protocol):
    """An objective with a state of its own, which goes into the checkpoint."""

    def state_dict(self) -> Remembered:
        """Return what a checkpoint must hold of it."""

    def load_state_dict(self, state: Remembered) -> None:
        """Take over what `state_dict` gave, on the CPU."""


@runtime_checkable
class Replaying(Protocol):
    """An objective that trains on every batch several times, with one update each (such as Free-AT).

    Attributes:
        replays: how often, at least 1.
    """

    replays: int


@runtime_checkable
class Surrounding(Protocol):
    """An objective that has something to do around its forward and backward pass (such as AWP)."""

    def around(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context in which the loss is taken and differentiated; ``model`` is the module inside wrappers.

        On entry the weights are those of the last update; on exit, gradients are there and the weights must be put
        back: the update comes next.
        """


def replays_of(objective: Objective) -> int:
    """Return how many updates a batch makes."""
    return objective.replays if isinstance(objective, Replaying) else 1


def around(objective: Objective, model: nn.Module) -> AbstractContextManager[None]:
    """Return the context of an objective's forward and backward pass."""
    return objective.around(model) if isinstance(objective, Surrounding) else nullcontext()

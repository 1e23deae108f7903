"""What an attack is to the engine that runs it: an automaton for every image, advanced for a whole batch at once.

The rows of a batch are independent: one may be at the third step of its first restart while its neighbour is at the
ninetieth of its fourth. Everything an automaton remembers is therefore a tensor with one row an image, and nothing it
computes for a row may depend on another row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparse_robust.attacks.budget import Budget
from sparse_robust_kernels.rng import philox_uniform

Rows = dict[str, Tensor]
"""The state of a batch, [n, ...] each. ``shown`` is the image the model is shown next."""

Look = Callable[[Tensor], Tensor]
"""images [n, ...] -> logits [n, classes], a forward pass without gradient."""


class Task(NamedTuple):
    """The images of a batch, on one device, without graph.

    Attributes:
        x: clean images [n, ...], float32 or float64, in [0, 1].
        y: int64 [n], the labels; for a targeted attack the classes aimed at.
        ids: int64 [n], sample ids: the key of all randomness.
        logits: [n, classes], the model's answer to x.
    """

    x: Tensor
    y: Tensor
    ids: Tensor
    logits: Tensor

    def select(self, index: Tensor | slice) -> Task:
        """Return the rows at ``index``."""
        return Task(*(tensor[index] for tensor in self))


class Seen(NamedTuple):
    """What one evaluation of the model shows.

    Attributes:
        logits: [n, classes].
        loss: [n], one value an image.
        grad: [n, ...], of each image's loss with respect to that image.
    """

    logits: Tensor
    loss: Tensor
    grad: Tensor


class Procedure(Protocol):
    """An attack within a budget, on a model with a known number of classes.

    The engine calls ``start`` for the rows that begin a run, then in turn evaluates the model at ``rows["shown"]`` and
    calls ``advance``. It looks at every image that passes the model, there and in ``look``: one that is inside the
    budget and fools the model ends its row at once. A procedure therefore never checks for success itself. When
    ``advance`` declares a row's run over, the engine looks once more at the image then in ``shown`` (the last iterate,
    which needs no gradient), and starts the row's next run, if there is one.

    Attributes:
        budget: what counts as inside.
        runs: runs an image gets at most: restarts times targets.
        gradient: whether the model is differentiated at the shown images; if not, ``advance`` gets the ``Seen`` with
            the loss, but a gradient without elements.
        inside: whether every image shown is inside the budget by construction, which saves the check.

    Two more attributes are optional. ``jacobian`` (False): the gradient in ``Seen`` is that of every logit,
    [n, classes, ...], and the loss has no elements. ``still`` (False): there is no step, the start is the last image.
    """

    budget: Budget
    runs: int
    gradient: bool
    inside: bool

    def start(self, task: Task, run: Tensor) -> Rows:
        """Return the state of rows that begin run number ``run`` (int64 [n], 0..runs-1)."""

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        """Return what is climbed, [n]; logits are float32 or float64. It is differentiated if ``gradient`` is set."""

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        """Return the next state, with the same names, dtypes and shapes, and bool [n]: whether the run is over.

        It makes new tensors and leaves the old ones alone. Rows without an image hold stale values: what it returns for
        these is ignored.
        """


def noise(task: Task, numel: int, *, key: int | Tensor, stream: Tensor) -> Tensor:
    """Return uniform numbers in [0, 1), float32 [n, numel], a function of (key, stream, sample id, element) alone.

    Args:
        key: ``derive_seed(seed, name of the attack)``.
        stream: int64 [n], 0 to 2**32 - 1, tells the draws of an image apart: run, step.
    """
    return philox_uniform(task.ids, numel, key=key, stream=stream)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return [n] values in the shape that broadcasts over images [n, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def where_row(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Return ``chosen`` in the rows where ``condition`` (bool [n]) holds, ``other`` elsewhere."""
    return torch.where(per_row(condition, chosen), chosen, other)

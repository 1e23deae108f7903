"""What attacks of a fixed number of steps have in common: training takes the last iterates of a batch as it is."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_robust.attacks.base import EngineAttack
from sparse_robust.attacks.budget import Budget, parse_eps
from sparse_robust.attacks.context import MODES, Model, attack_context
from sparse_robust.attacks.inputs import check_labels, prepare, recording
from sparse_robust.attacks.normalized import climb_normalized
from sparse_robust.attacks.passes import differentiate, full_precision
from sparse_robust.attacks.procedure import Procedure, Task
from sparse_robust.attacks.replica import Replica
from sparse_robust.errors import UsageError, unknown
from sparse_robust_kernels.rng import signed


class Iteration(Procedure, Protocol):
    """The procedure of an attack of a fixed number of steps.

    Attributes:
        attack: its hyper-parameters.
        key: of its noise; an int64 tensor where a captured graph draws other numbers in every replay.
        step_size: of a step.
        along_signs: whether steps are ``step_size`` times the signs of the gradient, in Linf, and nothing else.
    """

    attack: Any
    key: int | Tensor
    step_size: Any
    along_signs: bool


class IteratedAttack(EngineAttack):
    """Base of attacks that take ``steps`` steps in each of ``n_restarts`` runs.

    Attributes:
        steps, n_restarts, random_start, seed: of the subclass, a frozen dataclass.
        loss: a key of `LOSSES`, or ``kl``.
    """

    steps: int
    n_restarts: int
    random_start: bool
    seed: int
    loss: str

    def prepare(self, budget: Budget, classes: int) -> Iteration:
        """Return the attack within a budget."""
        raise NotImplementedError

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, eps: str | float, ids: Tensor | None = None) -> Tensor:
        """Return the last iterates, like x, inside the budget, without graph: what training uses.

        With one restart this makes ``steps`` forward and backward passes (with loss ``kl`` one more forward pass), on
        the batch as it is, and never waits for a GPU; values of images and labels are therefore checked on the CPU
        only. On a replica that captures, all of it is one CUDA graph; see `make_replica`. With several restarts it is
        `run`, which takes the same arguments.

        Raises:
            UsageError: also for a replica in another batch-norm mode than this attack's.
        """
        replica = model if isinstance(model, Replica) and model.module is not None else None
        if replica is not None and replica.mode != self.mode:
            raise UsageError(
                f"the attack works in mode {self.mode!r}, but the replica is in {replica.mode!r}: make the replica "
                f"with mode={self.mode!r}, or attack the model itself."
            )
        if self.n_restarts > 1 or self.eot_iter > 1:
            return self.run(model, x, y, eps=eps, ids=ids).images
        budget = Budget(self.norm, parse_eps(eps))
        procedure = self.prepare(budget, 0)

        def craft(x: Tensor, y: Tensor, ids: Tensor, *key: Tensor) -> Tensor:
            if key:
                procedure.key = key[0]
            task = Task(x, y, ids, full_precision(model(x)) if self.loss == "kl" else x.new_empty(len(x), 0))
            return climb(procedure, model, task, check=x.device.type == "cpu" and not key)

        with recording(), torch.no_grad(), attack_context(model, self.mode):
            x, y, ids = prepare(x, y, ids, budget, wait=False)
            if not len(x):
                return x.clone()
            if replica is None or replica.graphs is None:
                return craft(x, y, ids)
            key = torch.full((), signed(int(procedure.key), 64), device=x.device)
            kind = (replace(self, seed=0), budget)  # type: ignore[type-var]
            return replica.graphs.run(kind, craft, (x, y, ids, key))


def climb(procedure: Iteration, model: Model, task: Task, *, check: bool) -> Tensor:
    """Return the last iterates of one run on a batch as it is, without ever waiting for a device.

    Args:
        check: read the labels' range back, once: not on a GPU.
    """
    rows = procedure.start(task, torch.zeros_like(task.y))

    def losses(logits: Tensor) -> Tensor:
        nonlocal check
        if check:
            check_labels(task.y, logits)
            check = False
        return procedure.losses(logits, task, rows)

    def look(images: Tensor) -> Tensor:
        return full_precision(model(images))

    if isinstance(model, Replica) and procedure.along_signs:
        normalization = model.normalization
        if normalization is not None and normalization.fits(task.x):
            return climb_normalized(procedure, model, normalization, task, rows["shown"], losses)
    for _ in range(procedure.attack.steps):
        rows, _ = procedure.advance(task, rows, differentiate(model, rows["shown"], losses), look)
    return rows["shown"]


def check_iterated(attack: IteratedAttack, **choices: Collection[str]) -> None:
    """Check what attacks that take ``steps`` steps have in common.

    Args:
        choices: known values of further fields.

    Raises:
        UsageError: naming the field, what is expected of it, and what came.
    """
    choices |= {"mode": MODES, "keep": ("first", "last")}
    for kind, known in choices.items():
        if getattr(attack, kind) not in known:
            raise unknown(f"attack {kind}", getattr(attack, kind), known)
    for name, least in (("steps", 0), ("n_restarts", 1), ("eot_iter", 1)):
        count = getattr(attack, name)
        if not isinstance(count, int) or isinstance(count, bool) or count < least:
            raise UsageError(f"{name} must be an integer of at least {least}, got {count!r}.")
    if attack.n_restarts > 1 and not attack.random_start:
        raise UsageError(f"{attack.n_restarts} restarts without a random start repeat one attack; set random_start.")


def take_alpha(attack: Any, alpha: str | float | None, *, unset: str | None) -> None:
    """Take ``alpha``, another name, as the step size of a frozen attack; ``unset`` is its value where none was given.

    Raises:
        UsageError: if both names were given, with different values.
    """
    if alpha is None:
        return
    if attack.step_size not in (unset, alpha):
        raise UsageError(f"alpha is another name for step_size, got both: {alpha!r} and {attack.step_size!r}.")
    object.__setattr__(attack, "step_size", alpha)

"""Projected gradient descent with restarts, and FGSM, which is one step of it."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from sparse_robust.attacks.budget import Budget, parse_eps
from sparse_robust.attacks.iterated import IteratedAttack, check_iterated, take_alpha
from sparse_robust.attacks.losses import LOSSES, kl
from sparse_robust.attacks.norms import NORMS
from sparse_robust.attacks.procedure import Look, Rows, Seen, Task, per_row
from sparse_robust.errors import UsageError
from sparse_robust.seeding import derive_seed


@dataclass(frozen=True, kw_only=True)
class PGD(IteratedAttack):
    """Projected gradient descent (Madry et al., Towards deep learning models resistant to adversarial attacks, 2018).

    From x, or a random point of the ball, ``steps`` steps up the loss, each projected back into ball and box. The noise
    of an image is a function of (seed, its id, restart, element) alone, so batch size, order and rank do not matter.

    Attributes:
        norm: ``Linf`` (steps along the gradient's sign), ``L2`` (along its direction) or ``L1`` (along the signs of its
            largest elements).
        steps: 0 or more.
        step_size: a number or text such as ``2/255``; None means 2.5 * eps / steps.
        alpha: another name for step_size.
        n_restarts: random starts.
        random_start: start at a random point of the ball instead of x.
        loss: ``ce`` (cross-entropy), ``cw`` (margin of Carlini and Wagner), ``dlr`` (difference of logits ratio), or
            ``kl`` (divergence from the prediction on x, as in TRADES).
        momentum: share of the past directions in the next one (Dong et al., Boosting adversarial attacks with momentum,
            2018); 0 is plain PGD.
        targeted: labels are the classes to reach, and the loss is descended.
        keep: in `run` and in evaluations: ``first``, an image is done as soon as one iterate fools the model, or
            ``last``, the last iterate of a restart counts, as in the published protocol.
        eot_iter: passes that each gradient averages (expectation over transformation), for stochastic models.
        seed: any integer; 0 is a seed like any other.
        mode: what batch norm does while crafting: ``eval``, ``train`` or ``train_frozen``; see `attack_context`.
    """

    norm: str = "Linf"
    steps: int = 20
    step_size: str | float | None = None
    n_restarts: int = 1
    random_start: bool = True
    loss: str = "ce"
    momentum: float = 0.0
    targeted: bool = False
    keep: str = "first"
    eot_iter: int = 1
    seed: int = 0
    mode: str = "eval"
    alpha: InitVar[str | float | None] = None

    def __post_init__(self, alpha: str | float | None) -> None:
        check_iterated(self, norm=NORMS, loss=(*LOSSES, "kl"))
        if not self.momentum >= 0:
            raise UsageError(f"momentum must be 0 or more, got {self.momentum!r}.")
        if self.loss == "kl" and (self.targeted or not self.random_start):
            raise UsageError(
                "loss 'kl' is the divergence from the prediction on the clean image: it has no target, and no gradient "
                "there, so it needs a random start."
            )
        take_alpha(self, alpha, unset=None)
        if self.step_size is not None:
            parse_eps(self.step_size)

    @property
    def name(self) -> str:
        """Name in tables and files: pgd-20, or pgd-20x10 with ten restarts."""
        return f"pgd-{self.steps}" + (f"x{self.n_restarts}" if self.n_restarts > 1 else "")

    @property
    def aimed(self) -> bool:
        """Whether the labels given are classes to reach, not to leave."""
        return self.targeted

    def passes(self, classes: int) -> float:
        """Return what an image that withstands the attack costs, in forward passes; a gradient counts as two more."""
        return self.n_restarts * (3 * self.steps + 1) * self.eot_iter

    def prepare(self, budget: Budget, classes: int) -> Ascent:
        """Return the attack within a budget."""
        return Ascent(self, budget)

    def resolve_step_size(self, eps: float) -> float:
        """Return the length of one step within radius eps."""
        return self._default_step_size(eps) if self.step_size is None else parse_eps(self.step_size)

    def _default_step_size(self, eps: float) -> float:
        return 2.5 * eps / max(1, self.steps)


class Ascent:
    """The procedure of PGD: start, go up along `direction`, `project`."""

    gradient = True
    inside = True
    key: int | Tensor

    def __init__(self, attack: PGD, budget: Budget) -> None:
        self.attack, self.budget, self.runs = attack, budget, attack.n_restarts
        self.still = attack.steps == 0
        self.step_size = attack.resolve_step_size(budget.eps)
        self.key = derive_seed(int(attack.seed), "pgd")
        self.along_signs = budget.norm == "Linf" and not attack.momentum

    def start(self, task: Task, run: Tensor) -> Rows:
        """Return x, or a random point of the ball, exactly inside."""
        shown = task.x.clone()
        if self.attack.random_start:
            shown = self.budget.random_start(task.x, task.ids, key=self.key, stream=run)
        rows = {"shown": shown, "step": torch.zeros_like(run)}
        if self.attack.momentum:
            rows["velocity"] = torch.zeros_like(shown)
        return rows

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        """Return the attack's loss; for a targeted attack its negative."""
        if self.attack.loss == "kl":
            return kl(logits, task.logits)
        values = LOSSES[self.attack.loss](logits, task.y)
        return -values if self.attack.targeted else values

    def direction(self, rows: Rows, seen: Seen) -> tuple[Tensor, Rows]:
        """Return where to go, and what has to be remembered of it."""
        if not self.attack.momentum:
            return seen.grad, {}
        length = seen.grad.abs().flatten(1).sum(1).clamp(min=torch.finfo(seen.grad.dtype).tiny)
        velocity = self.attack.momentum * rows["velocity"] + seen.grad / per_row(length, seen.grad)
        return velocity, {"velocity": velocity}

    def project(self, task: Task, shown: Tensor, direction: Tensor) -> Tensor:
        """Return the next iterate, exactly inside; only a step in L2 may leave it by a rounding."""
        stepped = self.budget.step(shown, direction, task.x, self.step_size)
        return self.budget.project(stepped, task.x) if self.budget.norm == "L2" else stepped

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        """Take one step."""
        upwards, remembered = self.direction(rows, seen)
        step = rows["step"] + 1
        return {"shown": self.project(task, rows["shown"], upwards), "step": step, **remembered}, (
            step >= self.attack.steps
        )


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """Fast gradient sign method: PGD with one step, of 1.25 eps unless it is given, from a random start.

    Sources: Goodfellow et al., Explaining and harnessing adversarial examples (2015); with the random start and step,
    Wong et al., Fast is better than free (2020), in the variant that clips the start to the box. With norm ``L2`` it is
    the fast gradient method.
    """

    steps: int = field(default=1, init=False)
    n_restarts: int = field(default=1, init=False)

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return "fgsm"

    def _default_step_size(self, eps: float) -> float:
        return 1.25 * eps

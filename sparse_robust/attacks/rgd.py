"""RGD: steps along the raw gradient of a hidden perturbation that is never clipped; and APGD that begins with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from sparse_robust.attacks.apgd import APGD
from sparse_robust.attacks.apgd_ascent import MOMENTUM, AdaptiveAscent
from sparse_robust.attacks.budget import Budget, parse_eps
from sparse_robust.attacks.context import Model, attack_context
from sparse_robust.attacks.iterated import IteratedAttack, check_iterated, take_alpha
from sparse_robust.attacks.losses import LOSSES, cross_entropy
from sparse_robust.attacks.passes import full_precision
from sparse_robust.attacks.procedure import Look, Rows, Seen, Task, per_row, where_row
from sparse_robust.errors import UsageError
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.pgd_step import rgd_step
from sparse_robust_kernels.pgd_step.reference import LARGEST_HIDDEN

DIRECTIONS = {"raw": "the gradient as it is", "sign": "its sign"}
RECURSIONS = {
    "hidden": "steps add up in a perturbation that is never clipped; the model sees it clipped",
    "clipped": "steps start where the last one was clipped to",
}

AUTO_STEP = 30.0
"""Mean length of the first raw step of ``step_size="auto"``, over all elements, in units of eps.

From 10 to 1000 robust accuracies moved by at most 0.4 points at the training radius and by 2 at 1.6 times it (three
adversarially trained networks and an ordinary one, 7 and 20 steps); 1 lost up to 4 points. Fixed step sizes of 10 and
23.4 lost up to 17 and 11 points at the larger radius.
"""

_LARGEST_STEP = 1e36  # far from where single precision overflows


@dataclass(frozen=True, kw_only=True)
class RGD(IteratedAttack):
    """Raw gradient descent (Yang et al., Rethinking PGD attack: is sign function necessary?, 2023), in Linf.

    A hidden perturbation h, zero at first, moves by step_size * gradient and is never clipped; the model is shown
    x + h, clipped into the budget. Other values of ``direction`` and ``recursion`` make it one of its relatives:

    | direction | recursion | the paper's name |
    |---|---|---|
    | raw | hidden | RGD |
    | raw | clipped | PGD(raw) |
    | sign | clipped | PGD |
    | sign | hidden | an ablation |

    Gradients are those of one image's loss, not of a batch's mean: a step size means the same for every batch size, and
    published ones for means are this times the batch size (3000 for batches of 128 is 23.4 here).

    Attributes:
        norm: ``Linf``; it is defined in no other.
        steps: 0 or more.
        step_size: 0 or more, or ``auto``. Of raw steps it multiplies the gradient: no number serves both robust and
            ordinary networks, whose gradients differ by orders of magnitude, so ``auto`` gives each image the one with
            which the elements of its first step have a mean size of 30 eps. See also `calibrate_rgd_step`. Of sign
            steps it is the length in pixel units, text such as ``2/255`` or a number; ``auto`` is 2.5 eps / steps.
        alpha: another name for step_size.
        direction: a key of `DIRECTIONS`.
        recursion: a key of `RECURSIONS`.
        random_start: start at a random point of the ball instead of x.
        n_restarts: random starts.
        loss: ``ce``, ``cw`` or ``dlr``.
        targeted: labels are the classes to reach, and the loss is descended.
        keep: in `run` and in evaluations: ``first``, an image is done as soon as one iterate fools the model, or
            ``last``, as published. Called on a batch it returns the last iterates.
        eot_iter: passes that each gradient averages, for stochastic models.
        seed: any integer, of the random starts; 0 is a seed like any other.
        mode: what batch norm does while crafting; see `attack_context`.
    """

    norm: str = "Linf"
    steps: int = 7
    step_size: str | float = "auto"
    direction: str = "raw"
    recursion: str = "hidden"
    random_start: bool = False
    n_restarts: int = 1
    loss: str = "ce"
    targeted: bool = False
    keep: str = "first"
    eot_iter: int = 1
    seed: int = 0
    mode: str = "eval"
    alpha: InitVar[str | float | None] = None

    def __post_init__(self, alpha: str | float | None) -> None:
        if self.norm != "Linf":
            raise UsageError(f"RGD is defined in norm Linf, got {self.norm!r}; use PGD or APGD in L2 and L1.")
        check_iterated(self, direction=DIRECTIONS, recursion=RECURSIONS, loss=LOSSES)
        take_alpha(self, alpha, unset="auto")
        _fixed(self.step_size)

    @property
    def name(self) -> str:
        """Name in tables and files: rgd-7, or rgd-7x10 with ten restarts; the variants add their switches."""
        variant = "".join(f"-{value}" for value in (self.direction, self.recursion) if value in ("sign", "clipped"))
        return f"rgd-{self.steps}" + (f"x{self.n_restarts}" if self.n_restarts > 1 else "") + variant

    @property
    def aimed(self) -> bool:
        """Whether the labels given are classes to reach."""
        return self.targeted

    def passes(self, classes: int) -> float:
        """Return what an image that withstands the attack costs, in forward passes; a gradient counts as two more."""
        return self.n_restarts * (3 * self.steps + 1) * self.eot_iter

    def prepare(self, budget: Budget, classes: int) -> HiddenAscent:
        """Return the attack within a budget."""
        return HiddenAscent(self, budget)


class HiddenAscent:
    """The procedure of `RGD`. Its rows hold ``hidden``, the perturbation before it is clipped."""

    gradient = True
    inside = True
    along_signs = False  # it remembers where it was before it was clipped
    key: int | Tensor

    def __init__(self, attack: RGD, budget: Budget) -> None:
        self.attack, self.budget, self.runs = attack, budget, attack.n_restarts
        self.still = attack.steps == 0
        self.step_size = _fixed(attack.step_size)
        if attack.direction == "sign" and self.step_size is None:
            self.step_size = 2.5 * budget.eps / max(1, attack.steps)
        self.key = derive_seed(int(attack.seed), "rgd")

    def start(self, task: Task, run: Tensor) -> Rows:
        """Return x and a hidden perturbation of zero, or a random point of the ball."""
        shown, step_size = task.x.clone(), task.x.new_full(run.shape, self.step_size or 0.0)
        if self.attack.random_start:
            shown = self.budget.random_start(task.x, task.ids, key=self.key, stream=run)
        return {"shown": shown, "hidden": shown - task.x, "step": torch.zeros_like(run), "step_size": step_size}

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        """Return the attack's loss; for a targeted attack its negative."""
        values = LOSSES[self.attack.loss](logits, task.y)
        return -values if self.attack.targeted else values

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        """Take one step, and clip what the model sees or what is remembered."""
        grad, step_size, step = _finite(seen.grad), rows["step_size"], rows["step"] + 1
        if self.step_size is None:
            step_size = _auto(step_size, grad, self.budget.eps)
        upwards = grad.sign() if self.attack.direction == "sign" else grad
        if self.attack.recursion == "hidden":
            budget = self.budget
            hidden, shown = rgd_step(
                rows["hidden"], task.x, upwards, step_size=step_size, eps=budget.eps, lo=budget.lo, hi=budget.hi
            )
        else:
            shown = self.budget.project(rows["shown"] + per_row(step_size, grad) * upwards, task.x)
            hidden = shown - task.x
        return {"shown": shown, "hidden": hidden, "step": step, "step_size": step_size}, step >= self.attack.steps


@dataclass(frozen=True, kw_only=True)
class RGDAPGD(APGD):
    """APGD in Linf whose first steps are those of RGD: a hidden point, raw gradients, and momentum.

    Source as for `RGD`, whose code calls it RGD-APGD where all steps are raw and RGD+AA where the first ones are. With
    the first sign step the hidden point is given up for the clipped one, and the step size is 2 eps, as in APGD. Raw
    steps keep their size: to halve it and go back to the best image means little while the hidden point stays.

    Attributes:
        raw_steps: how many; from ``steps`` on all of them.
        step_size: of the raw steps, as for `RGD`.
    """

    raw_steps: int = 2
    step_size: str | float = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm != "Linf":
            raise UsageError(f"raw steps are defined in norm Linf, got {self.norm!r}; use APGD in L2 and L1.")
        if not isinstance(self.raw_steps, int) or isinstance(self.raw_steps, bool) or self.raw_steps < 0:
            raise UsageError(f"raw_steps must be an integer of at least 0, got {self.raw_steps!r}.")
        _fixed(self.step_size)

    @property
    def name(self) -> str:
        """Name in tables and files: that of APGD after ``rgd-``."""
        return f"rgd-{super().name}"

    def prepare(self, budget: Budget, classes: int) -> RawFirst:
        """Return the attack within a budget, on a model with so many classes."""
        return RawFirst(self, budget, classes)


class RawFirst(AdaptiveAscent):
    """The procedure of `RGDAPGD`. While steps are raw, ``hidden`` and ``previous`` are images before clipping."""

    def __init__(self, attack: RGDAPGD, budget: Budget, classes: int) -> None:
        super().__init__(attack, budget, classes)
        self.raw_steps, self.raw_step_size = attack.raw_steps, _fixed(attack.step_size)

    def start(self, task: Task, run: Tensor) -> Rows:
        """Begin where APGD does."""
        rows = super().start(task, run)
        raw = torch.full_like(rows["step_size"], self.raw_step_size or 0.0)
        return {**rows, "hidden": rows["shown"], "step_size": raw if self.raw_steps else rows["step_size"]}

    def _adapts(self, rows: Rows) -> Tensor:
        return rows["step"] > self.raw_steps

    def _move(self, task: Task, rows: Rows, grad: Tensor) -> Rows:
        raw, first_sign = rows["step"] < self.raw_steps, rows["step"] == self.raw_steps
        step_size = torch.where(first_sign, 2 * self.budget.eps, rows["step_size"])
        grad = _finite(grad)
        if self.raw_step_size is None:
            step_size = torch.where(raw, _auto(step_size, grad, self.budget.eps), step_size)
        previous = where_row(raw, rows["previous"], self.budget.project(rows["previous"], task.x))
        rows = {**rows, "step_size": step_size, "previous": previous}
        plain = super()._move(task, rows, grad)

        here, share = rows["hidden"], per_row(torch.where(rows["step"] > 0, MOMENTUM, 1.0).to(grad.dtype), grad)
        hidden = here + share * (per_row(step_size, grad) * grad) + (1 - share) * (here - previous)
        hidden = where_row(raw, hidden.clamp(-LARGEST_HIDDEN, LARGEST_HIDDEN), plain["shown"])
        return {
            "hidden": hidden,
            "shown": self.budget.project(hidden, task.x),
            "previous": where_row(raw, here, plain["previous"]),
            "step_size": step_size,
        }


def calibrate_rgd_step(
    model: Model,
    x: Tensor,
    y: Tensor,
    eps: str | float,
    candidates: Sequence[float] = (1, 10, 100, 1e3, 1e4),
    *,
    steps: int = 7,
) -> float:
    """Return the step size with which RGD reaches the highest mean cross-entropy on a few images.

    A number for `RGD.step_size`, found once and then the same for all images, so that no verdict depends on a batch.

    Args:
        model, x, y, eps: as for an attack; some hundred images are enough.
        candidates: step sizes of one image's gradient; the first of the best wins.
        steps: of the attack it is meant for.

    Raises:
        UsageError: if there are no candidates or no images.
    """
    if not len(candidates) or not len(x):
        raise UsageError(f"calibration needs candidates and images, got {len(candidates)} and {len(x)}.")
    reached = []
    for step_size in candidates:
        images = RGD(steps=steps, step_size=step_size, keep="last")(model, x, y, eps=eps)
        with attack_context(model), torch.no_grad():
            reached.append(cross_entropy(full_precision(model(images)), y).mean())
    return float(candidates[int(torch.stack(reached).argmax())])


def boundary_ratio(x_adv: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return the share of elements of each image that are changed by more than eps - 1e-5, [n]."""
    return ((x_adv - x).abs() > eps - 1e-5).flatten(1).to(x.dtype).mean(1)


def hidden_overshoot(hidden: Tensor, eps: float) -> Tensor:
    """Return the mean of |hidden| / eps over the elements of each perturbation, [n]; eps must not be 0."""
    return (hidden.abs() / eps).flatten(1).mean(1)


def _fixed(step_size: str | float) -> float | None:
    """Return a step size as a number, None where it is to be found for each image."""
    return None if step_size == "auto" else parse_eps(step_size)


def _finite(grad: Tensor) -> Tensor:
    return grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _auto(step_size: Tensor, grad: Tensor, eps: float) -> Tensor:
    """Return the step sizes, set where they are still 0 and the gradient is not."""
    mean = grad.abs().flatten(1).mean(1)
    found = torch.where(mean > 0, (AUTO_STEP * eps / mean).clamp(max=_LARGEST_STEP), 0.0)
    return torch.where(step_size > 0, step_size, found)

"""Projected gradient descent with restarts, and FGSM, which is one step of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_robust.attacks.budget import Budget, parse_eps
from sparse_robust.attacks.context import MODES, Model, attack_context
from sparse_robust.attacks.inputs import Inputs, prepare, recording
from sparse_robust.attacks.loop import GradientOracle, Seen, ascend, is_fooled
from sparse_robust.attacks.losses import LOSSES
from sparse_robust.attacks.norms import NORMS
from sparse_robust.attacks.result import AttackResult, Counts
from sparse_robust.errors import UsageError, unknown
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.rng import philox_uniform


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Projected gradient descent (Madry et al., Towards deep learning models resistant to adversarial attacks, 2018).

    Untargeted: from x, or a random point of the ball, ``steps`` steps up the loss, each projected back into ball and
    box; the last iterate counts. The noise of an image is a function of (seed, its id, restart, element) alone, so
    batch size, order and rank do not matter.

    Attributes:
        norm: ``Linf`` (steps along the gradient's sign) or ``L2`` (along its direction).
        steps: 0 or more.
        step_size: a number or text such as ``2/255``; None means 2.5 * eps / steps.
        n_restarts: random starts; for each image the first that fools the model counts, else the last.
        random_start: start at a uniform point of the ball instead of x.
        loss: ``ce`` (cross-entropy) or ``cw`` (margin of Carlini and Wagner).
        seed: any integer; 0 is a seed like any other.
        mode: what batch norm does while crafting: ``eval``, ``train`` or ``train_frozen``; see `attack_context`.
    """

    norm: str = "Linf"
    steps: int = 20
    step_size: str | float | None = None
    n_restarts: int = 1
    random_start: bool = True
    loss: str = "ce"
    seed: int = 0
    mode: str = "eval"

    def __post_init__(self) -> None:
        for kind, value, known in (("norm", self.norm, NORMS), ("loss", self.loss, LOSSES), ("mode", self.mode, MODES)):
            if value not in known:
                raise unknown(f"attack {kind}", value, known)
        for name, least in (("steps", 0), ("n_restarts", 1)):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < least:
                raise UsageError(f"{name} must be an integer of at least {least}, got {count!r}.")
        if self.n_restarts > 1 and not self.random_start:
            raise UsageError(f"{self.n_restarts} restarts without a random start repeat one attack; set random_start.")
        if self.step_size is not None:
            parse_eps(self.step_size)

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, eps: str | float, ids: Tensor | None = None) -> Tensor:
        """Return adversarial images, like x, inside the budget, without graph.

        With one restart this makes ``steps`` forward and backward passes, no other, and never waits for a GPU (values
        of images and labels are therefore checked on the CPU only; `run` always checks them).

        Args:
            model: maps images to logits [n, classes]; an nn.Module or any function. Its parameters, their gradients,
                its flags and, in the modes ``eval`` and ``train_frozen``, its buffers are left as they are.
            x: float32 images [n, ...] in [0, 1].
            y: int64 labels [n].
            eps: radius in pixel units, a number or text such as ``8/255``.
            ids: int64 sample ids [n] that key the noise; None means 0..n-1.

        Raises:
            UsageError: for arguments of another kind.
        """
        if self.n_restarts > 1:
            return self.run(model, x, y, eps=eps, ids=ids).images
        budget = Budget(self.norm, parse_eps(eps))
        with recording():
            inputs = prepare(x, y, ids, budget, wait=False)
            return self._craft(model, inputs, budget, restart=0, check=inputs.x.device.type == "cpu")

    def run(self, model: Model, x: Tensor, y: Tensor, *, eps: str | float, ids: Tensor | None = None) -> AttackResult:
        """Return adversarial images with verdicts, norms and costs; arguments as for the call.

        Success is measured on the returned images, in one forward pass a restart, in eval mode. An image that is fooled
        leaves the batch before the next restart.
        """
        budget = Budget(self.norm, parse_eps(eps))
        with recording(), torch.no_grad():
            inputs = prepare(x, y, ids, budget, wait=True)
            images = inputs.x.clone()
            fooled = torch.zeros(len(images), dtype=torch.bool, device=images.device)
            restarts = torch.zeros(len(images), dtype=torch.int64, device=images.device)
            alive = torch.arange(len(images), device=images.device)
            for restart in range(self.n_restarts):
                if not len(alive):
                    break
                images[alive] = self._craft(model, inputs.select(alive), budget, restart=restart, check=restart == 0)
                fooled[alive] = is_fooled(model, images[alive], inputs.y[alive])
                restarts[alive] += 1
                alive = (~fooled).nonzero().flatten()
            counts = Counts(forward=restarts * (self.steps + 1), backward=restarts * self.steps, queries=restarts)
            return AttackResult(images, fooled, budget.measure(images, inputs.x), counts)

    def resolve_step_size(self, eps: float) -> float:
        """Return the length of one step within radius eps."""
        return self._default_step_size(eps) if self.step_size is None else parse_eps(self.step_size)

    def _default_step_size(self, eps: float) -> float:
        return 2.5 * eps / max(1, self.steps)

    def _craft(self, model: Model, inputs: Inputs, budget: Budget, *, restart: int, check: bool) -> Tensor:
        """Return the last iterate of one restart; ``check`` reads the labels' range back."""
        x, y, ids = inputs
        if not len(x):
            return x.clone()
        step_size = self.resolve_step_size(budget.eps)

        def start() -> Tensor:
            if not self.random_start:
                return x.clone()
            key = derive_seed(int(self.seed), "pgd")
            return budget.start(x, philox_uniform(ids, budget.noise_size(x), key=key, stream=restart))

        def direction(seen: Seen, step: int) -> Tensor:
            return seen.grad

        def project(x_adv: Tensor, upwards: Tensor, step: int) -> Tensor:
            return budget.step(x_adv, upwards, x, step_size)

        oracle = GradientOracle(model, LOSSES[self.loss], y, check=check)
        with attack_context(model, self.mode), torch.no_grad():
            x_adv = ascend(oracle, steps=self.steps, start=start, direction=direction, project=project)
            return budget.project(x_adv, x)


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """Fast gradient sign method: PGD with one step, of 1.25 eps unless it is given, from a random start.

    Sources: Goodfellow et al., Explaining and harnessing adversarial examples (2015); with the random start and step,
    Wong et al., Fast is better than free (2020), in the variant that clips the start to the box. With norm ``L2`` it is
    the fast gradient method.
    """

    steps: int = field(default=1, init=False)
    n_restarts: int = field(default=1, init=False)

    def _default_step_size(self, eps: float) -> float:
        return 1.25 * eps

"""What all attacks share: how they are called, and what is checked before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_robust.attacks.budget import Budget, parse_eps
from sparse_robust.attacks.context import Model
from sparse_robust.attacks.engine import Engine, default_chunk
from sparse_robust.attacks.inputs import Inputs, check_device, check_labels, check_no_nan, prepare, recording
from sparse_robust.attacks.procedure import Procedure, Task
from sparse_robust.attacks.result import AttackResult, Counts
from sparse_robust.errors import UsageError

# The diameter of the box in each norm, for images of d elements: no perturbation is larger.
_WIDEST: dict[str, Callable[[int], float]] = {
    "Linf": lambda d: 1.0,
    "L2": lambda d: float(d) ** 0.5,
    "L1": lambda d: float(d),
}


class EngineAttack:
    """Base of the attacks. A subclass is a frozen dataclass of hyper-parameters with ``norm`` and ``prepare``.

    Attributes:
        norm: a key of `NORMS`.
        keep: which images count, a key of `KEEP`.
        eot_iter: passes averaged at every evaluation of the model, for models with randomness of their own.
        mode: what batch norm does while crafting.
    """

    norm: str
    keep: str = "first"
    eot_iter: int = 1
    mode: str = "eval"

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return type(self).__name__.lower()

    @property
    def aimed(self) -> bool:
        """Whether the labels given are classes to reach, not to leave."""
        return False

    def prepare(self, budget: Budget, classes: int) -> Procedure:
        """Return the attack within a budget on a model with so many classes."""
        raise NotImplementedError

    def passes(self, classes: int) -> float:
        """Return what an image that withstands the attack costs, in forward passes; a gradient counts as two more."""
        raise NotImplementedError

    def __call__(self, model: Model, x: Tensor, y: Tensor, *, eps: str | float, ids: Tensor | None = None) -> Tensor:
        """Return adversarial images, like x, inside the budget, without graph; see `run`."""
        return self.run(model, x, y, eps=eps, ids=ids).images

    def run(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        *,
        eps: str | float,
        ids: Tensor | None = None,
        chunk: int | None = None,
    ) -> AttackResult:
        """Return adversarial images with verdicts, norms and costs.

        Every verdict is the model's answer to the returned image, in eval mode. It does not depend on the batch, its
        order or its size: the model is only shown batches of canonical sizes.

        Args:
            model: maps images to logits [n, classes]; an nn.Module or any function. Its parameters, their gradients,
                its flags and, in the modes ``eval`` and ``train_frozen``, its buffers are left as they are.
            x: float32 images [n, ...] in [0, 1].
            y: int64 labels [n]; for a targeted attack the classes to reach.
            eps: radius in pixel units, a number or text such as ``8/255``.
            ids: int64 sample ids [n] that key the noise; None means 0..n-1.
            chunk: images evaluated at a time; None chooses by device. It is the one thing about batches that may change
                the last bit of a result.

        Raises:
            UsageError: for arguments of another kind.
        """
        return self._run(model, x, y, Budget(self.norm, parse_eps(eps)), ids, chunk, self.keep)

    def minimize(
        self, model: Model, x: Tensor, y: Tensor, *, ids: Tensor | None = None, chunk: int | None = None
    ) -> AttackResult:
        """Return the smallest perturbations this attack finds that fool the model, without a limit on their norm.

        Arguments as for `run`. Where nothing fools the model, the image is x.

        Raises:
            UsageError: also for an attack that does not look for small perturbations.
        """
        widest = Budget(self.norm, _WIDEST[self.norm](max(1, x.flatten(1).shape[1]) if isinstance(x, Tensor) else 1))
        return self._run(model, x, y, widest, ids, chunk, "smallest")

    def _run(
        self, model: Model, x: Tensor, y: Tensor, budget: Budget, ids: Tensor | None, chunk: int | None, keep: str
    ) -> AttackResult:
        if chunk is not None and chunk < 2:
            raise UsageError(f"chunk must be at least 2 images, got {chunk}.")
        with recording(), torch.no_grad():
            inputs = prepare(x, y, ids, budget, wait=True)
            check_device(model, inputs.x)
            if not len(inputs.x):
                return AttackResult.empty(inputs.x)
            engine = Engine(model, chunk or default_chunk(inputs.x), mode=self.mode, eot_iter=self.eot_iter)
            logits = engine.logits(inputs.x)
            check_labels(inputs.y, logits)
            check_no_nan(logits, inputs.ids)
            return self._attack(engine, inputs, logits, budget, keep)

    def _attack(self, engine: Engine, inputs: Inputs, logits: Tensor, budget: Budget, keep: str) -> AttackResult:
        """Attack what is not fooled without an attack; with ``keep="last"``, the published protocol, all images."""
        x, y, _ = inputs
        fooled = (logits.argmax(1) == y) == self.aimed
        if keep == "last":
            fooled = torch.zeros_like(fooled)
        ones = torch.full_like(y, self.eot_iter)
        result = AttackResult(
            x.clone(), fooled, torch.zeros(len(x), dtype=x.dtype, device=x.device),
            Counts(ones, torch.zeros_like(ones), ones.clone()), torch.where(fooled, 0, -1),
        )  # fmt: skip
        todo = (~fooled).nonzero().flatten()
        if not len(todo):
            return result
        procedure = self.prepare(budget, logits.shape[1])
        outcome = engine.run(procedure, Task(*inputs, logits).select(todo), targeted=self.aimed, keep=keep)
        result.images[todo] = outcome.images
        result.success[todo] = outcome.fooled
        result.step[todo] = outcome.step
        result.norms[todo] = budget.measure(outcome.images, x[todo])
        for name in ("forward", "backward", "queries"):
            getattr(result.counts, name)[todo] += getattr(outcome, name)
        return result

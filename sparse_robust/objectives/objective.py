"""What a training step minimises: images are crafted, the weights perhaps perturbed, and a loss is taken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_robust.attacks import Model
from sparse_robust.attacks.iterated import IteratedAttack
from sparse_robust.masks import unwrap
from sparse_robust.objectives.losses import Loss, cross_entropy
from sparse_robust.objectives.mixing import Mixing
from sparse_robust.objectives.weights import WeightPerturbation
from sparse_robust.seeding import derive_seed


@dataclass(kw_only=True)
class Objective:
    """The loss of a regime on a batch. Made by `build_objective`.

    Attributes:
        loss: what is taken of the network's answers.
        attack: crafts the images to train on; None trains on the clean ones.
        eps: radius of the training attack, in pixel units of the [0, 1] range.
        mixing: mixes clean images and their labels; None leaves them alone.
        perturbation: takes the loss at perturbed weights; None takes it where they are.
    """

    loss: Loss = cross_entropy
    attack: IteratedAttack | None = None
    eps: float = 0.0
    mixing: Mixing | None = None
    perturbation: WeightPerturbation | None = None

    def __call__(
        self, model: nn.Module, target: Model, x: Tensor, y: Tensor, ids: Tensor, *, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the scalar loss with its graph, and the logits [n, classes] it is mostly about.

        Call it within `around`, and take the gradients there.

        Args:
            model: what is trained, in training mode (possibly a distributed wrapper: its forward is called once).
            target: what is attacked: the same network, or a copy, without the wrapper, so that no collective is issued.
            seed: varies the attack's random start; with the sample ids it determines the noise.
        """
        shown, labels = self.craft(target, x, y, ids, seed)
        if self.perturbation is not None:
            inner, fixed = unwrap(model), shown.detach()
            self.perturbation.perturb_(inner, lambda: self.loss(inner, x, fixed, labels)[0], len(x))
        return self.loss(_Passes(model), x, shown, labels)

    def craft(self, target: Model, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return the images to train on and their labels, int64 [n] or probabilities [n, classes]."""
        if self.mixing is not None:
            return self.mixing(x, y, ids, seed)
        if self.attack is not None:
            attack = replace(self.attack, seed=seed)  # type: ignore[type-var]
            return attack(target, x, y, eps=self.eps, ids=ids), y
        return x, y

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Return the context of the forward and backward pass: when it ends, perturbed weights are put back."""
        try:
            yield
        finally:
            if self.perturbation is not None:
                self.perturbation.restore_()

    def epoch_seed(self, seed: int, epoch: int) -> int:
        """Return the attack seed of an epoch: the same image gets new noise in each."""
        return derive_seed("training-attack", seed, epoch)


class _Passes:
    """The forward passes of a step: the first through the wrapper, which announces the step to the other ranks.

    DistributedDataParallel shares the buffers at each forward, in place. A second one would change running statistics
    that the graph of the first holds; the module inside gets the same gradients without.
    """

    def __init__(self, model: nn.Module) -> None:
        self.next = model

    def __call__(self, images: Tensor) -> Tensor:
        model = self.next
        self.next = model.module if isinstance(model, DistributedDataParallel) else model
        logits: Tensor = model(images)
        return logits

"""Adversarial weight perturbation: the loss is taken where the weights are a little worse."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparse_robust.errors import UsageError


class WeightPerturbation:
    """Moves the weights of a network up the loss, each layer by gamma times its own norm, and puts them back.

    For every parameter of two or more dimensions, w becomes w + gamma * |w| * g / |g|, with g the gradient of the loss
    at w, on batch statistics, and Euclidean norms. What is exactly 0 stays 0 and has no part in the norms: weights
    under a mask are not perturbed. `restore_` puts back the very bits. (The authors' code subtracts the perturbation
    again, after the optimizer's step, so that weight decay acts on the perturbed weights; here it acts on the weights.)

    Under DistributedDataParallel the gradient is that of the batches of all ranks, so that all move alike.

    Args:
        gamma: relative size of the perturbation; published are 0.01 for adversarial training and 0.005 for TRADES.

    Source: Wu, Xia, Wang, Adversarial weight perturbation helps robust generalization (2020), equations 8 to 10.
    """

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self._saved: list[tuple[nn.Parameter, Tensor]] = []

    def perturb_(self, model: nn.Module, loss: Callable[[], Tensor], images: int) -> None:
        """Move the weights; `restore_` has to follow.

        Args:
            model: the module inside wrappers. Its buffers, such as running statistics, keep their values.
            loss: returns this rank's mean loss, with graph.
            images: how many images it is the mean of.
        """
        self.restore_()
        weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        if any(hasattr(weight, "device_mesh") or hasattr(weight, "ds_tensor") for weight in weights):
            raise UsageError(
                "awp needs whole weights, and these are sharded (FSDP2, ZeRO-3): train with DDP, or set awp 0."
            )
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        # A sum, not a mean: sums over ranks add up to the whole batch, whatever share of it each has.
        gradients = torch.autograd.grad(loss() * images, weights, allow_unused=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
            for weight, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    self._saved.append((weight, weight.detach().clone()))
                    weight.add_(self._step(weight, _over_ranks(gradient)))
        torch.clear_autocast_cache()  # it may hold the weights as they were

    def restore_(self) -> None:
        """Put the weights back, bit for bit; without effect where they are in place."""
        with torch.no_grad():
            for weight, value in self._saved:
                weight.copy_(value)
        if self._saved:
            torch.clear_autocast_cache()
        self._saved.clear()

    def _step(self, weight: Tensor, gradient: Tensor) -> Tensor:
        gradient = gradient.where(weight != 0, 0.0)
        length = torch.linalg.vector_norm(gradient)
        # No gradient, or one that overflowed, gives no direction.
        direction = (gradient / length).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return self.gamma * torch.linalg.vector_norm(weight) * direction


def _over_ranks(gradient: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
    return gradient

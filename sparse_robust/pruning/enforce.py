"""Keeping pruned weights at zero through any optimizer: one tensor a weight, nothing in the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_robust.errors import SparseRobustError, UsageError
from sparse_robust.masks import Masks, unwrap
from sparse_robust.masks.wrappers import find_parameters
from sparse_robust_kernels.masks import zero_

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskViolation(SparseRobustError, RuntimeError):
    """A pruned weight, its gradient or its optimizer state is not +0.0."""


def enforce(optimizer: Optimizer, model: nn.Module, masks: Masks) -> Enforcement:
    """Hold the pruned weights of a model at +0.0, with their gradients and optimizer state, from now on.

    It masks all three at once, gradients before every ``optimizer.step()`` and everything after it. The surviving
    weights take exactly the steps that they would take under a reparametrised mask (weight x mask in the forward pass),
    while weight decay and momentum have no hidden values to act on.

    Works with any ``torch.optim.Optimizer``, fused and foreach ones too, with closures, under torch.amp.GradScaler, and
    through Accelerate's and timm's wrappers. Where gradients are clipped by their norm, call
    `Enforcement.mask_gradients_` before, so that pruned weights have no part in the norm.

    Args:
        optimizer: holds every masked parameter that requires a gradient.
        model: the module, wrapped or not; parameters are taken by the names in ``masks``.
        masks: what to keep.

    Raises:
        UsageError: if names or shapes do not fit, a parameter is not in the optimizer, or the optimizer calls no hooks.
    """
    return Enforcement(optimizer, model, masks)


class Enforcement:
    """The hooks that `enforce` placed. To enforce other masks, `remove` these first."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, masks: Masks) -> None:
        self.masks = masks
        self._optimizer = _innermost(optimizer)
        self._model = model
        self._parameters = find_parameters(model, masks.shapes())
        self._keep: dict[str, Tensor] = {}
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        absent = [n for n, p in self._parameters.items() if p.requires_grad and id(p) not in held]
        if absent:
            raise UsageError(
                f"the optimizer does not hold {len(absent)} of {len(masks)} masked parameters, first {absent[:5]}. "
                "Make it from this model's parameters, after the model is final (new head, device, wrapper)."
            )
        if not getattr(type(self._optimizer).step, "hooked", False):
            raise UsageError(f"{type(self._optimizer).__name__} calls no step hooks; its __init__ must call super's.")
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self.mask_()

    def remove(self) -> None:
        """Stop enforcing; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def mask_gradients_(self) -> None:
        """Set the gradients of pruned weights to +0.0 now."""
        self._zero((name, p.grad) for name, p in self._parameters.items())

    def mask_(self) -> None:
        """Set pruned weights, their gradients and their optimizer state to +0.0 now."""
        self._zero((name, tensor) for name, _, tensor in self._everything())

    def verify(self) -> None:
        """Check every pruned weight, gradient and slot for +0.0, bit for bit.

        Raises:
            MaskViolation: naming the first tensor that fails, or a parameter that is no longer the model's.
        """
        current = dict(unwrap(self._model).named_parameters(remove_duplicate=False))
        for name, parameter in self._parameters.items():
            if current.get(name) is not parameter:
                raise MaskViolation(f"{name} was replaced after enforce(); remove this enforcement and enforce again.")
        for name, what, tensor in self._everything():
            bits = tensor.detach().view(_BITS[tensor.element_size()])
            wrong = int(((bits != 0) & ~self._kept(name, tensor)).sum())
            if wrong:
                raise MaskViolation(f"the {what} of {name} is not +0.0 at {wrong} of its pruned places.")

    def _everything(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield (name, what it is, tensor) of every weight, gradient and slot of the weight's shape."""
        for name, parameter in self._parameters.items():
            yield name, "weight", parameter
            if parameter.grad is not None:
                yield name, "gradient", parameter.grad
            for slot, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    yield name, f"optimizer state {slot!r}", value

    @torch.no_grad()
    def _zero(self, named: Iterable[tuple[str, Tensor | None]]) -> None:
        """Zero what is pruned in each tensor, with one call a device."""
        devices: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for name, tensor in named:
            if tensor is not None:
                tensors, keep = devices.setdefault(tensor.device, ([], []))
                tensors.append(tensor)
                keep.append(self._kept(name, tensor))
        for tensors, keep in devices.values():
            zero_(tensors, keep)

    def _kept(self, name: str, like: Tensor) -> Tensor:
        """The bool mask on the tensor's device, laid out as the tensor, so that both are read in order."""
        keep = self._keep.get(name)
        if keep is None or keep.device != like.device:
            keep = torch.empty_like(like, dtype=torch.bool, requires_grad=False)
            self._keep[name] = keep.copy_(self.masks.on(name, like.device))
        return keep

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.mask_gradients_()
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            return None

        def masked() -> Any:
            loss = closure()
            self.mask_gradients_()
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": masked}
        return (args[0], masked, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask_()


def _innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that takes the steps, inside Accelerate's wrapper (optimizer) or timm's (_base_optimizer)."""
    while True:
        for attribute in ("optimizer", "_base_optimizer"):
            inner = getattr(optimizer, attribute, None)
            if isinstance(inner, Optimizer):
                optimizer = inner
                break
        else:
            return optimizer

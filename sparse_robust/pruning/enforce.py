"""Keeping pruned weights at zero through any optimizer: one tensor a weight, nothing in the forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_robust.errors import SparseRobustError, UsageError
from sparse_robust.masks import Masks, unwrap
from sparse_robust.masks.wrappers import find_parameters
from sparse_robust_kernels.masks import MaskTable, zero_

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
    """The hooks that `enforce` placed. To enforce other masks, `remove` these first.

    What a step costs: SGD, Adam and AdamW take zeros to zeros, so weights and gradients are masked before the step and
    nothing is after it, unless something else wrote to the gradients or to the optimizer's state in between (tensors
    count their in-place changes). After a step of any other optimizer all of it is masked.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, masks: Masks) -> None:
        self.masks = masks
        self._optimizer = _innermost(optimizer)
        self._model = model
        self._parameters = find_parameters(model, masks.shapes())
        self._places: list[tuple[torch.device, tuple[int, ...]]] = []
        self._tables: list[tuple[list[int], MaskTable]] = []
        self._clean_slots: list[Seen] = []
        self._clean_gradients: list[Seen] = []
        self._slots_are_clean = False
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
        self._zero(self._gradients())

    def mask_(self) -> None:
        """Set pruned weights, their gradients and their optimizer state to +0.0 now."""
        self._zero(list(self._parameters.values()))
        self.mask_gradients_()
        slots = [dict(self._slots(parameter)) for parameter in self._parameters.values()]
        for slot in dict.fromkeys(key for held in slots for key in held):
            self._zero([held.get(slot) for held in slots])
        self._clean_slots = _seen(self._all_slots())

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
            wrong = int(((bits != 0) & ~self.masks.on(name, tensor.device)).sum())
            if wrong:
                raise MaskViolation(f"the {what} of {name} is not +0.0 at {wrong} of its pruned places.")

    def _everything(self) -> Iterable[tuple[str, str, Tensor]]:
        """Yield (name, what it is, tensor) of every weight, gradient and slot of the weight's shape."""
        for name, parameter in self._parameters.items():
            yield name, "weight", parameter
            if parameter.grad is not None:
                yield name, "gradient", parameter.grad
            for slot, value in self._slots(parameter):
                yield name, f"optimizer state {slot!r}", value

    def _gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self._parameters.values()]

    def _slots(self, parameter: nn.Parameter) -> Iterable[tuple[str, Tensor]]:
        for slot, value in self._optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                yield slot, value

    def _all_slots(self) -> list[Tensor | None]:
        return [value for parameter in self._parameters.values() for _, value in self._slots(parameter)]

    @torch.no_grad()
    def _zero(self, tensors: Sequence[Tensor | None]) -> None:
        """Zero what is pruned in one tensor a parameter (None: it has none), with one call a device."""
        places = [(parameter.device, parameter.stride()) for parameter in self._parameters.values()]
        if places != self._places:  # the first time, or the model was moved
            self._places, self._tables = places, self._make_tables()
        for indices, table in self._tables:
            here = [tensors[index] for index in indices]
            for place, (index, tensor) in enumerate(zip(indices, here, strict=True)):
                if tensor is not None and tensor.device != table.device:  # such as state that was sent to the CPU
                    zero_([tensor], [self.masks.on(self.masks.names()[index], tensor.device)])
                    here[place] = None
            zero_(here, table)

    def _make_tables(self) -> list[tuple[list[int], MaskTable]]:
        """Return, for each device, which parameters are there and their masks."""
        parameters = list(self._parameters.items())
        there: dict[torch.device, list[int]] = {}
        for index, (_, parameter) in enumerate(parameters):
            there.setdefault(parameter.device, []).append(index)
        tables = []
        for device, indices in there.items():
            keep = [self.masks.on(parameters[index][0], device) for index in indices]
            tables.append((indices, MaskTable(keep, [parameters[index][1] for index in indices])))
        return tables

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.mask_gradients_()
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._slots_are_clean = not callable(closure) and _unchanged(self._clean_slots, self._all_slots())
        if self._slots_are_clean and _takes_zeros_to_zeros(self._optimizer):
            self._zero(list(self._parameters.values()))
            self._clean_gradients = _seen(self._gradients())
        else:
            self._slots_are_clean = False
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
        if self._slots_are_clean and _unchanged(self._clean_gradients, self._gradients()):
            self._clean_slots = _seen(self._all_slots())
        else:
            self.mask_()


Seen = tuple[weakref.ref[Tensor] | None, int]
"""A tensor, or None, and how often it had been changed in place."""


def _seen(tensors: Sequence[Tensor | None]) -> list[Seen]:
    return [(None, 0) if tensor is None else (weakref.ref(tensor), tensor._version) for tensor in tensors]


def _unchanged(before: list[Seen], now: Sequence[Tensor | None]) -> bool:
    """Whether these are the tensors that were there before, with no change in place."""
    return len(before) == len(now) and all(
        tensor is None
        if reference is None
        else tensor is not None and tensor is reference() and tensor._version == seen
        for (reference, seen), tensor in zip(before, now, strict=True)
    )


def _takes_zeros_to_zeros(optimizer: Optimizer) -> bool:
    """Whether a step takes weights, gradients and slots that are +0.0 to +0.0, whatever all others are.

    It does not where gradients are negated (-0.0), a decay is so strong that it turns signs, or 0 / 0 can occur.
    """
    if type(optimizer) not in (SGD, Adam, AdamW):
        return False
    for group in optimizer.param_groups:
        if group.get("maximize") or group.get("eps", 1.0) <= 0:
            return False
        if type(optimizer) is not SGD and (torch.is_tensor(group["lr"]) or group["lr"] * group["weight_decay"] >= 1):
            return False
    return True


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

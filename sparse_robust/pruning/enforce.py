"""Keeping pruned weights at zero through any optimizer: one tensor a weight, nothing in the forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_robust.errors import SparseRobustError, UsageError
from sparse_robust.masks import Masks, Shard, shard_of, unwrap
from sparse_robust.masks.shards import plain
from sparse_robust.masks.wrappers import find_parameters, held_parts, reshard
from sparse_robust.masks.zero import Run, is_zero, zero_partitions
from sparse_robust_kernels.masks import MaskTable, same_layout, zero_

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

    Of a model that FSDP2 (`fully_shard`) has sharded every process masks its own parts. Under DeepSpeed's ZeRO-1, 2 and
    3 it is the flat fp32 partitions that are stepped and masked, with their gradients and state; the weights of the
    model, which are copied from them, follow. DeepSpeed clips by itself, so there gradients are masked as backward
    computes them, for 1 byte more a weight.

    Args:
        optimizer: holds every masked parameter that requires a gradient; of DeepSpeed what ``deepspeed.initialize``
            returned, or the torch optimizer that it was given.
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
        self._weights = find_parameters(model, masks.shapes())
        self._stepped = _stepped(self._weights, self._optimizer)
        self._places: list[tuple[torch.device, tuple[int, ...]]] = []
        self._tables: list[tuple[list[int], MaskTable]] = []
        self._clean_slots: list[Seen] = []
        self._clean_gradients: list[Seen] = []
        self._slots_are_clean = False
        held = {id(parameter) for parameter in _parameters_of(self._optimizer)}
        absent = [n for n, p in self._weights.items() if p.requires_grad and not is_zero(p) and id(p) not in held]
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
            *(p.register_hook(partial(self._masked, name)) for name, p in self._weights.items() if is_zero(p)),
        ]
        self._pruned: dict[str, Tensor] = {}  # for those hooks
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
        self._zero(self._values())
        if any(is_zero(parameter) for parameter in self._weights.values()):
            self.masks.apply_(self._model)
        self.mask_gradients_()
        slots = [dict(self._slots(stepped.parameter)) for stepped in self._stepped]
        for slot in dict.fromkeys(key for held in slots for key in held):
            self._zero([held.get(slot) for held in slots])
        self._clean_slots = _seen(self._all_slots())

    def verify(self) -> None:
        """Check every pruned weight, gradient and slot for +0.0, bit for bit.

        Raises:
            MaskViolation: naming the first tensor that fails, or a parameter that is no longer the model's.
        """
        current = dict(reshard(unwrap(self._model)).named_parameters(remove_duplicate=False))
        for name, parameter in self._weights.items():
            if current.get(name) is not parameter:
                raise MaskViolation(f"{name} was replaced after enforce(); remove this enforcement and enforce again.")
        for name, what, part in self._everything():
            bits = part.tensor.detach().view(_BITS[part.tensor.element_size()])
            wrong = int(((bits != 0) & ~self.masks.on_shard(name, part)).sum())
            if wrong:
                raise MaskViolation(f"the {what} of {name} is not +0.0 at {wrong} of its pruned places.")

    def _everything(self) -> Iterable[tuple[str, str, Shard]]:
        """Yield (name, what it is, the part of it that is here) of every weight, gradient and slot."""
        for name, weight in self._weights.items():
            yield from ((name, "weight", part) for part in held_parts(weight))
        for parameter, runs in self._stepped:
            tensors = [("stepped weight", plain(parameter)), *self._slots(parameter, "optimizer state {!r}")]
            if parameter.grad is not None:
                tensors.append(("gradient", plain(parameter.grad)))
            for run in runs:
                for what, tensor in tensors:
                    part = tensor.detach().reshape(-1)[run.at : run.at + run.length]
                    yield run.name, what, Shard(part, run.start, self.masks.shapes()[run.name])

    def _values(self) -> list[Tensor]:
        return [plain(stepped.parameter) for stepped in self._stepped]

    def _gradients(self) -> list[Tensor | None]:
        gradients = [stepped.parameter.grad for stepped in self._stepped]
        return [None if gradient is None else plain(gradient) for gradient in gradients]

    def _slots(self, parameter: Tensor, name: str = "{}") -> Iterable[tuple[str, Tensor]]:
        for slot, value in self._optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                yield name.format(slot), plain(value)

    @torch.no_grad()
    def _lay_out(self) -> None:
        """Give gradients and slots the memory order of their weights, where a model was laid out anew since: torch's
        fused steps go through the memory of all three side by side."""
        for parameter, _ in self._stepped:
            if type(parameter.data) is not Tensor:  # a part of a sharded weight
                continue
            gradient = parameter.grad
            if gradient is not None and not gradient.is_sparse and not same_layout(gradient, parameter):
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            state = self._optimizer.state.get(parameter, {})
            for slot, value in self._slots(parameter):
                if not same_layout(value, parameter):
                    state[slot] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)

    def _all_slots(self) -> list[Tensor | None]:
        return [value for stepped in self._stepped for _, value in self._slots(stepped.parameter)]

    def _masked(self, name: str, gradient: Tensor) -> Tensor:
        """Return the gradient of a whole weight with +0.0 where it is pruned."""
        if name not in self._pruned:
            self._pruned[name] = ~self.masks.on(name, gradient.device)
        return gradient.masked_fill(self._pruned[name], 0.0)

    @torch.no_grad()
    def _zero(self, tensors: Sequence[Tensor | None]) -> None:
        """Zero what is pruned in one tensor a parameter (None: it has none), with one call a device."""
        places = [(value.device, value.stride()) for value in self._values()]
        if places != self._places:  # the first time, or the model was moved
            self._places, self._tables = places, self._make_tables()
        for indices, table in self._tables:
            here = [tensors[index] for index in indices]
            for place, (index, tensor) in enumerate(zip(indices, here, strict=True)):
                if tensor is not None and tensor.device != table.device:  # such as state that was sent to the CPU
                    zero_([tensor], [self._keep(index, tensor.device)])
                    here[place] = None
            zero_(here, table)

    def _make_tables(self) -> list[tuple[list[int], MaskTable]]:
        """Return, for each device, which parameters are there and their masks."""
        values = self._values()
        there: dict[torch.device, list[int]] = {}
        for index, value in enumerate(values):
            there.setdefault(value.device, []).append(index)
        tables = []
        for device, indices in there.items():
            keep = [self._keep(index, device) for index in indices]
            tables.append((indices, MaskTable(keep, [values[index] for index in indices])))
        return tables

    def _keep(self, index: int, device: torch.device) -> Tensor:
        """Return the mask of what is here of a stepped parameter, in its shape."""
        parameter, runs = self._stepped[index]
        value = plain(parameter)
        keep = torch.ones(value.numel(), dtype=torch.bool, device=device)  # a partition holds unmasked weights, too
        for name, start, at, length in runs:
            here = keep[at : at + length]
            here.copy_(self.masks.on_shard(name, Shard(here, start, self.masks.shapes()[name])))
        return keep.view(value.shape)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._lay_out()
        self.mask_gradients_()
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        self._slots_are_clean = not callable(closure) and _unchanged(self._clean_slots, self._all_slots())
        if self._slots_are_clean and _takes_zeros_to_zeros(self._optimizer):
            self._zero(self._values())
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


class _Stepped(NamedTuple):
    """A parameter that the optimizer steps, and which parts of masked weights are in what is here of it."""

    parameter: Tensor
    runs: tuple[Run, ...]


def _stepped(weights: Mapping[str, nn.Parameter], optimizer: Optimizer) -> list[_Stepped]:
    copied = {name: weight for name, weight in weights.items() if is_zero(weight)}
    stepped = [_Stepped(*found) for found in zero_partitions(copied, optimizer)]
    for name, weight in weights.items():
        if name not in copied:
            shard = shard_of(weight)
            stepped.append(_Stepped(weight, (Run(name, shard.start, 0, shard.tensor.numel()),)))
    return stepped


def _parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
    """The torch optimizer that takes the steps, inside Accelerate's wrapper or a ZeRO optimizer (optimizer) or timm's
    (_base_optimizer)."""
    while True:
        for attribute in ("optimizer", "_base_optimizer"):
            inner: Any = getattr(optimizer, attribute, None)
            if hasattr(inner, "param_groups"):
                optimizer = inner
                break
        else:
            return optimizer

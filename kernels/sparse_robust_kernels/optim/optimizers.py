"""``torch.optim.SGD`` and ``AdamW`` that hold pruned weights, their gradients and slots at +0.0 in their own pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from sparse_robust_kernels._dispatch import require_known
from sparse_robust_kernels.masks import MaskTable, same_layout, unpack_bits, zero_
from sparse_robust_kernels.optim.operations import (
    adamw_,
    is_copy_of,
    sgd_,
)
from sparse_robust_kernels.optim.reference import INTEGER

_WRAPPERS = re.compile(r"^(?:(?:module|_orig_mod)\.)+")  # names as DistributedDataParallel and torch.compile have them

Closure = Callable[[], Any]


class HasTensors(Protocol):
    """What `sparse_robust.Masks` is: packed masks by the name of the weight."""

    def tensors(self) -> Mapping[str, Tensor]: ...


MasksT = HasTensors | Mapping[str, Tensor] | Mapping[Tensor, Tensor]
"""Packed masks (`masks.pack_bits`, logical order) by parameter, or by its name. Names need named parameters."""

CopiesT = Mapping[str, Tensor] | Mapping[Tensor, Tensor]
"""bf16 tensors of the shape and memory format of the parameter, by parameter or by its name."""


class _Masked(Optimizer):
    """What the masked optimizers have in common. Masks and copies are settings, not a part of the state dict."""

    _masks: dict[Tensor, Tensor]  # packed, in logical order
    _laid: _Laid | None  # the masks as the weights lie in memory; None before they are needed
    _copies: dict[Tensor, Tensor]
    _mask_gradients: bool
    _backend: str

    def _prepare(self, masks: MasksT | None, copies: CopiesT | None, mask_gradients: bool, backend: str) -> None:
        require_known(backend)
        self._mask_gradients, self._backend = mask_gradients, backend
        self._masks, self._copies, self._laid = {}, {}, None
        self.set_masks(masks)
        self.set_copies(copies)

    @torch.no_grad()
    def set_masks(self, masks: MasksT | None) -> None:
        """Hold these weights at +0.0 from now on, and set them, their gradients, slots and copies so at once.

        Raises:
            ValueError: if a name or a parameter is not this optimizer's, or a mask is not one of its size; what was set
                before still holds then.
        """
        found: Any = {} if masks is None else masks.tensors() if hasattr(masks, "tensors") else masks
        by_parameter = self._by_parameter(found, "mask")
        laid = _Laid(by_parameter, self._backend)
        self._masks, self._laid = by_parameter, laid
        self._clear()

    @torch.no_grad()
    def set_copies(self, copies: CopiesT | None) -> None:
        """Write the weights to these bf16 tensors at once, and after every step from now on.

        Raises:
            ValueError: if a name or a parameter is not this optimizer's, or a copy has another type, shape or format.
        """
        found = self._by_parameter(copies or {}, "copy")
        for parameter, copy in found.items():
            if not is_copy_of(copy, parameter):
                raise ValueError(
                    f"a copy must be bf16 and like its weight, {tuple(parameter.shape)} with strides "
                    f"{parameter.stride()} on {parameter.device}; got {copy.dtype} {tuple(copy.shape)} with strides "
                    f"{copy.stride()} on {copy.device}"
                )
        self._copies = found
        for parameter, copy in found.items():
            copy.copy_(parameter)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of this class or of the torch optimizer that it is, +0.0 where pruned.

        Raises:
            ValueError: if it asks for what this optimizer does not do; nothing is loaded then.
        """
        for group in state_dict["param_groups"]:
            _refuse({name: group.get(name, False) for name in ("amsgrad", "differentiable")})
        super().load_state_dict(state_dict)
        self._clear()

    def _by_parameter(self, given: Mapping[Any, Tensor], what: str) -> dict[Tensor, Tensor]:
        names: dict[str, Tensor] = {}
        for group in self.param_groups:
            names.update(zip(group.get("param_names", ()), group["params"], strict=False))
        for name in list(names):
            names.setdefault(_WRAPPERS.sub("", name), names[name])
        held = {parameter for group in self.param_groups for parameter in group["params"]}
        found: dict[Tensor, Tensor] = {}
        for key, tensor in given.items():
            parameter: Any = names.get(key) if isinstance(key, str) else key
            if parameter is None and not names:
                raise ValueError(f"a {what} is given by the name {key!r}: pass model.named_parameters() as parameters")
            shown = repr(key) if isinstance(key, str) else f"a tensor of shape {tuple(key.shape)}"
            if parameter not in held:
                raise ValueError(f"the {what} of {shown} belongs to no parameter of this optimizer")
            if what == "mask":
                _check_mask(tensor, parameter, shown)
            found[parameter] = tensor
        return found

    def _begin(self, closure: Closure | None) -> Any:
        """Evaluate the closure, and clear what is pruned of weights that have no gradient and are not stepped."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(parameter.grad is None for parameter in self._masks):
            self._zero({parameter: parameter for parameter in self._masks if parameter.grad is None})
        return loss

    def _clear(self) -> None:
        """Set all that is pruned to +0.0."""
        masked = list(self._masks)
        self._zero({parameter: parameter for parameter in masked})
        self._zero({parameter: parameter.grad for parameter in masked})
        for name in {name for parameter in masked for name in self.state.get(parameter, {})}:
            self._zero({parameter: self.state.get(parameter, {}).get(name) for parameter in masked})
        for parameter in masked:
            if parameter in self._copies:
                self._copies[parameter].copy_(parameter)

    def _zero(self, tensors: Mapping[Tensor, Any]) -> None:
        """Zero what is pruned in one tensor a parameter: one launch a device. Others than slots of its shape are left
        alone."""
        for parameters, table in self._layout().tables:
            given = [tensors.get(parameter) for parameter in parameters]
            fits = [
                isinstance(tensor, Tensor) and tensor.shape == parameter.shape and tensor.device == parameter.device
                for parameter, tensor in zip(parameters, given, strict=True)
            ]
            zero_([tensor if fit else None for tensor, fit in zip(given, fits, strict=True)], table)

    def _layout(self) -> _Laid:
        """The masks in the order of the weights' memory, laid out again when those were moved or converted."""
        if self._laid is None or self._laid.places != _places(self._masks):
            self._laid = _Laid(self._masks, self._backend)
        return self._laid

    def _slot(self, parameter: Tensor, name: str) -> Tensor:
        """A slot in the memory format of its weight: made with zeros, or as a state dict brought it."""
        state = self.state[parameter]
        slot: Tensor | None = state.get(name)
        if slot is None:
            slot = state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        elif not same_layout(slot, parameter):
            slot = state[name] = torch.empty_like(parameter, requires_grad=False).copy_(slot)
        return slot

    def _run(
        self, operation: Callable[..., None], parameters: Sequence[Tensor], *slots: Sequence[Tensor], **options: Any
    ) -> None:
        """Run an operation on parameters that share their settings: one launch for each device."""
        bits = self._layout().bits
        devices = {parameter.device for parameter in parameters}
        for device in devices:
            chosen = [index for index, parameter in enumerate(parameters) if parameter.device == device]
            mine = [parameters[index] for index in chosen]
            operation(
                mine,
                [_gradient(parameter) for parameter in mine],
                *([slot[index] for index in chosen] for slot in slots),
                [bits.get(parameter) for parameter in mine],
                [self._copies.get(parameter) for parameter in mine],
                mask_gradients=self._mask_gradients,
                backend=self._backend,
                **options,
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("_masks", "_copies", "_mask_gradients", "_backend")}
        return {**super().__getstate__(), **own, "_laid": None}


class _Laid:
    """The masks of an optimizer in the order in which its weights lie in memory.

    Attributes:
        places: where the weights were, how they lay and of what type they were then.
        tables: parameters of one device, with the table of their masks.
        bits: what the operations read, by parameter: bits for a kernel; a CPU has no instruction that spreads those
            over floats, so there it is integers of the weights' width.
    """

    def __init__(self, masks: Mapping[Tensor, Tensor], backend: str) -> None:
        self.places = _places(masks)
        self.tables: list[tuple[list[Tensor], MaskTable]] = []
        self.bits: dict[Tensor, Tensor] = {}
        there: dict[torch.device, list[Tensor]] = {}
        for parameter in masks:
            there.setdefault(parameter.device, []).append(parameter)
        for device, parameters in there.items():
            keep = [unpack_bits(masks[p].to(device), p.numel()).view(p.shape) for p in parameters]
            table = MaskTable(keep, [parameter.detach() for parameter in parameters])
            self.tables.append((parameters, table))
            packed = device.type == "cuda" or backend == "triton"
            for index, parameter in enumerate(parameters):
                self.bits[parameter] = (
                    table.bits(index) if packed else table.wide(index, INTEGER[parameter.element_size()])
                )


def _places(masks: Mapping[Tensor, Tensor]) -> list[tuple[torch.device, torch.dtype, tuple[int, ...]]]:
    return [(parameter.device, parameter.dtype, parameter.stride()) for parameter in masks]


def _check_mask(packed: Tensor, parameter: Tensor, name: str) -> None:
    size = (-(-parameter.numel() // 8),)
    if packed.dtype != torch.uint8 or packed.shape != size:
        raise ValueError(
            f"the mask of {name}, {tuple(parameter.shape)}: expected packed bits, uint8 {size} as masks.pack_bits "
            f"makes them, got {packed.dtype} {tuple(packed.shape)}"
        )


def _refuse(asked: Mapping[str, Any]) -> None:
    for name, value in asked.items():
        if value:
            raise ValueError(f"masked optimizers have no {name}; use a torch optimizer with sparse_robust.enforce")


class MaskedSGD(_Masked, SGD):
    """``torch.optim.SGD`` whose pruned weights, gradients and momentum are +0.0 after every step.

    The surviving weights take the very steps of ``torch.optim.SGD`` on masked gradients. State dicts are exchanged with
    it both ways.

    Args:
        params: as for every optimizer; named parameters (``model.named_parameters()``) if masks or copies go by name.
        masks: `sparse_robust.Masks`, or packed masks by parameter or name. Parameters without one are not masked.
        copies: bf16 tensors that receive the weights after every step, by parameter or name.
        mask_gradients: also clear the gradients where pruned. Without it a step moves 4 bytes a masked weight less.
        backend: as for every operation of this package.
        foreach, fused: taken for the sake of code that sets them; a step is one pass whatever they say.

    Raises:
        ValueError: if a mask or a copy fits no parameter, for an unknown backend, or for ``differentiable``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        masks: MasksT | None = None,
        copies: CopiesT | None = None,
        mask_gradients: bool = True,
        backend: str = "auto",
    ) -> None:
        _refuse({"differentiable": differentiable})
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._prepare(masks, copies, mask_gradients, backend)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; ``closure`` evaluates the model again and returns the loss."""
        loss = self._begin(closure)
        for group in self.param_groups:
            names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
            options = {name: group[name] for name in names} | {"lr": float(group["lr"])}
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if options["momentum"] == 0:
                self._run(sgd_, parameters, [parameter.grad for parameter in parameters], **options)
                continue
            started = [self.state[parameter].get("momentum_buffer") is not None for parameter in parameters]
            for first in (False, True):
                chosen = [p for p, has in zip(parameters, started, strict=True) if has is not first]
                buffers = [self._slot(parameter, "momentum_buffer") for parameter in chosen]
                self._run(sgd_, chosen, buffers, first=first, **options)
        return loss


class MaskedAdamW(_Masked, AdamW):
    """``torch.optim.AdamW`` whose pruned weights, gradients and running means are +0.0 after every step.

    State dicts are exchanged with ``torch.optim.AdamW`` both ways. The arguments are those of `MaskedSGD` and of
    ``torch.optim.AdamW``.

    Raises:
        ValueError: as `MaskedSGD`, and for ``amsgrad`` and ``capturable``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        masks: MasksT | None = None,
        copies: CopiesT | None = None,
        mask_gradients: bool = True,
        backend: str = "auto",
    ) -> None:
        _refuse({"amsgrad": amsgrad, "capturable": capturable, "differentiable": differentiable})
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
        self._prepare(masks, copies, mask_gradients, backend)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; ``closure`` evaluates the model again and returns the loss."""
        loss = self._begin(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            options = {name: group[name] for name in ("eps", "weight_decay", "maximize")}
            options |= {"lr": float(group["lr"]), "beta1": float(beta1), "beta2": float(beta2)}
            by_step: dict[float, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_step.setdefault(self._advance(parameter), []).append(parameter)
            for step, chosen in by_step.items():
                slots = [[self._slot(p, name) for p in chosen] for name in ("exp_avg", "exp_avg_sq")]
                self._run(adamw_, chosen, *slots, step=step, **options)
        return loss

    def _advance(self, parameter: Tensor) -> float:
        """Count a step of a parameter. The count is kept on the CPU, where a fused optimizer's may come from a GPU."""
        state = self.state[parameter]
        count = state.get("step")
        count = torch.tensor(0.0) if count is None else count if count.device.type == "cpu" else count.cpu()
        state["step"] = count.add_(1)
        return float(count)


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient in the memory format of its weight; autograd nearly always makes it so."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise ValueError(f"masked optimizers take dense gradients; that of shape {tuple(parameter.shape)} is sparse")
    if not same_layout(gradient, parameter):
        gradient = parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
    return gradient

"""``torch.optim.SGD`` and ``AdamW`` that hold pruned weights, their gradients and slots at +0.0 in their own pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import ParamsT

from sparse_robust_kernels.masks import unpack_bits, zero_
from sparse_robust_kernels.optim.operations import (
    adamw_,
    is_copy_of,
    same_layout,
    sgd_,
    storage_bits,
    storage_integers,
)

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

    _keep: dict[Tensor, Tensor]
    _copies: dict[Tensor, Tensor]
    _mask_gradients: bool
    _backend: str

    def _prepare(self, masks: MasksT | None, copies: CopiesT | None, mask_gradients: bool, backend: str) -> None:
        self._mask_gradients, self._backend = mask_gradients, backend
        self._keep, self._copies = {}, {}
        self.set_masks(masks)
        self.set_copies(copies)

    @torch.no_grad()
    def set_masks(self, masks: MasksT | None) -> None:
        """Hold these weights at +0.0 from now on, and set them, their gradients and slots so at once.

        Raises:
            ValueError: if a name or a parameter is not this optimizer's, or a mask has another size.
        """
        found: Any = {} if masks is None else masks.tensors() if hasattr(masks, "tensors") else masks
        by_parameter = self._by_parameter(found, "mask")
        # A kernel reads bits. A CPU has no instruction that spreads them over floats, so that is done once, here.
        bits = [storage_bits if p.is_cuda or self._backend == "triton" else storage_integers for p in by_parameter]
        self._keep = {p: lay(packed, p) for lay, (p, packed) in zip(bits, by_parameter.items(), strict=True)}
        for parameter, packed in by_parameter.items():
            keep = unpack_bits(packed.to(parameter.device), parameter.numel()).view(parameter.shape)
            slots = [slot for slot in self.state.get(parameter, {}).values() if isinstance(slot, Tensor)]
            tensors = [parameter, *slots] if parameter.grad is None else [parameter, parameter.grad, *slots]
            for tensor in tensors:
                if tensor.shape == parameter.shape:
                    zero_([tensor], [keep])

    @torch.no_grad()
    def set_copies(self, copies: CopiesT | None) -> None:
        """Write the weights to these bf16 tensors at once, and after every step from now on.

        Raises:
            ValueError: if a name or a parameter is not this optimizer's, or a copy has another type, shape or format.
        """
        self._copies = self._by_parameter(copies or {}, "copy")
        for parameter, copy in self._copies.items():
            if not is_copy_of(copy, parameter):
                raise ValueError(
                    f"a copy must be bf16 and like its weight, {tuple(parameter.shape)} with strides "
                    f"{parameter.stride()} on {parameter.device}; got {copy.dtype} {tuple(copy.shape)} with strides "
                    f"{copy.stride()} on {copy.device}"
                )
            copy.copy_(parameter)

    def _by_parameter(self, given: Mapping[Any, Tensor], what: str) -> dict[Tensor, Tensor]:
        names: dict[str, Tensor] = {}
        for group in self.param_groups:
            names.update(zip(group.get("param_names", ()), group["params"], strict=False))
        held = {parameter for group in self.param_groups for parameter in group["params"]}
        found: dict[Tensor, Tensor] = {}
        for key, tensor in given.items():
            parameter: Any = names.get(key) if isinstance(key, str) else key
            if parameter is None and not names:
                raise ValueError(f"a {what} is given by the name {key!r}: pass model.named_parameters() as parameters")
            if parameter not in held:
                shown = repr(key) if isinstance(key, str) else f"a tensor of shape {tuple(key.shape)}"
                raise ValueError(f"the {what} of {shown} belongs to no parameter of this optimizer")
            found[parameter] = tensor
        return found

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
        devices = {parameter.device for parameter in parameters}
        for device in devices:
            chosen = [index for index, parameter in enumerate(parameters) if parameter.device == device]
            mine = [parameters[index] for index in chosen]
            operation(
                mine,
                [_gradient(parameter) for parameter in mine],
                *([slot[index] for index in chosen] for slot in slots),
                [self._keep.get(parameter) for parameter in mine],
                [self._copies.get(parameter) for parameter in mine],
                mask_gradients=self._mask_gradients,
                backend=self._backend,
                **options,
            )

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("_keep", "_copies", "_mask_gradients", "_backend")}
        return {**super().__getstate__(), **own}


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
        masks: MasksT | None = None,
        copies: CopiesT | None = None,
        mask_gradients: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize)
        self._prepare(masks, copies, mask_gradients, backend)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; ``closure`` evaluates the model again and returns the loss."""
        loss = _evaluate(closure)
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
    ``torch.optim.AdamW``; amsgrad is not offered.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        masks: MasksT | None = None,
        copies: CopiesT | None = None,
        mask_gradients: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, maximize=maximize)
        self._prepare(masks, copies, mask_gradients, backend)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one step; ``closure`` evaluates the model again and returns the loss.

        Raises:
            ValueError: if a state dict of an optimizer with amsgrad was loaded.
        """
        loss = _evaluate(closure)
        for group in self.param_groups:
            if group["amsgrad"]:
                raise ValueError("MaskedAdamW has no amsgrad, but the loaded state dict asks for it")
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


def _evaluate(closure: Closure | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient in the memory format of its weight; autograd nearly always makes it so."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        raise ValueError(f"masked optimizers take dense gradients; that of shape {tuple(parameter.shape)} is sparse")
    if not same_layout(gradient, parameter):
        gradient = parameter.grad = torch.empty_like(parameter, requires_grad=False).copy_(gradient)
    return gradient

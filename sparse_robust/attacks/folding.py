"""Batch norms folded into the layers before them: which ones can be, seen in one pass, and the arithmetic of it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# How far twice the weights may be from giving twice the output, as a share of the largest output: rounding alone.
HOMOGENEOUS = 1e-3


class Pair(NamedTuple):
    """Names of a convolution or linear layer, and of the batch norm that alone reads its output."""

    layer: str
    norm: str


def find_pairs(module: nn.Module, example: Tensor) -> tuple[Pair, ...]:
    """Return the batch norms that can be folded, seen in one pass: no tracing, which some networks do not survive."""
    uses, calls = _Uses(), Counter[str]()
    written: dict[int, tuple[str, Tensor]] = {}  # outputs of layers by id; held, so that no id is given twice
    found: list[tuple[Pair, int]] = []

    def note_layer(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] += 1
        # One dimension less or more is a layer applied along another dimension than a batch norm's.
        if not isinstance(output, Tensor) or output.dim() != layer.weight.dim():
            return
        with uses.pause():
            homogeneous = _is_homogeneous(layer, args, kwargs, output)
        if homogeneous:
            written[id(output)] = (name, output)
            uses.of[id(output)] = 0  # what had this id before is gone

    def note_norm(name: str, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls[name] += 1
        read = next(iter((*args, *kwargs.values())), None)
        layer, tensor = written.get(id(read), (None, None))
        if layer is not None and tensor is not None and tensor.shape[1] == norm.num_features:
            found.append((Pair(layer, name), id(tensor)))

    def is_alone(pair: Pair, tensor: int) -> bool:
        """Whether a pass calls both once, and reads what lies between them and what they hold nowhere else."""
        layer, norm = module.get_submodule(pair.layer), module.get_submodule(pair.norm)
        held = [id(value) for part in (layer, norm) for value in part.parameters(recurse=False)]
        return calls[pair.layer] == calls[pair.norm] == 1 and all(uses.of[key] == 1 for key in (tensor, *held))

    handles = []
    for name, part in module.named_modules():
        if part._forward_hooks or part._forward_pre_hooks:
            continue  # these may change what goes in or comes out
        note = note_layer if isinstance(part, LAYERS) else note_norm if _after(part) is not None else None
        if note is not None:
            handles.append(part.register_forward_hook(partial(note, name), with_kwargs=True))
    with _uncompiled(), uses:
        module(example)
    for handle in handles:
        handle.remove()
    return tuple(pair for pair, tensor in found if is_alone(pair, tensor))


def fold_away(module: nn.Module, pairs: Sequence[Pair]) -> None:
    """Fold batch norms of a frozen module, and put what they do besides in their place, wherever the module has it."""
    layers: list[Any] = [module.get_submodule(pair.layer) for pair in pairs]
    norms = [module.get_submodule(pair.norm) for pair in pairs]
    for layer, scale, bias in zip(layers, *folded(layers, norms), strict=True):
        layer.weight, layer.bias = (
            nn.Parameter(tensor, requires_grad=False)
            for tensor in (layer.weight * as_column(scale, layer.weight), bias)
        )
    for norm in norms:
        after = _after(norm)
        for part in list(module.modules()):
            for name, child in part._modules.items():
                if child is norm:
                    part._modules[name] = after
    module.eval()


def folded(layers: Sequence[Any], norms: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Return how layers do what each and its batch norm do: numbers by which to multiply the rows of their weights,
    [out] each, and biases, [out] each. Of all layers together, a few launches on a GPU."""
    if not layers:
        return [], []
    means = [norm.running_mean for norm in norms]
    deviations = torch._foreach_add([norm.running_var for norm in norms], [norm.eps for norm in norms])
    weights = [_or(norm.weight, torch.ones_like, mean) for norm, mean in zip(norms, means, strict=True)]
    scales = torch._foreach_mul(torch._foreach_rsqrt(deviations), weights)
    biases = [_or(layer.bias, torch.zeros_like, mean) for layer, mean in zip(layers, means, strict=True)]
    centred = torch._foreach_mul(torch._foreach_sub(biases, means), scales)
    shifts = [_or(norm.bias, torch.zeros_like, mean) for norm, mean in zip(norms, means, strict=True)]
    return list(scales), list(torch._foreach_add(centred, shifts))


def as_column(scale: Tensor, weight: Tensor) -> Tensor:
    """Return numbers [out] in a shape that multiplies the rows of a weight [out, ...]."""
    return scale.view(-1, *[1] * (weight.dim() - 1))


def _or(tensor: Tensor | None, make: Any, like: Tensor) -> Tensor:
    return make(like) if tensor is None else tensor


class _Uses(TorchDispatchMode):
    """Counts how often each tensor is the operand of an operation, by its Python id."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[int] = Counter()
        self._paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count nothing for the length of a block."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to have the compiler skip this mode, torch would import it: more than a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._paused:
            self.of.update(id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        return func(*args, **(kwargs or {}))


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled parts of a network as they were written, or the compiler would look into what counts."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _is_homogeneous(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> bool:
    """Whether twice the weights give twice the output; not so where a layer standardises or recomputes its weights."""
    parameters = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    for parameter in parameters:
        parameter.mul_(2)
    doubled = layer.forward(*args, **kwargs)
    for parameter in parameters:
        parameter.mul_(0.5)
    return bool((doubled - 2 * output).abs().max() <= HOMOGENEOUS * output.abs().max())


class _DropAct(nn.Module):
    """What timm's norms with an activation do after normalising; under the names they have there."""

    def __init__(self, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.drop, self.act = drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


def _after(norm: Any) -> nn.Module | None:
    """Return what a module does after it normalised with running statistics; None if it is no such batch norm."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return None
    if type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return nn.Identity()
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    return _DropAct(drop, act) if isinstance(drop, nn.Module) and isinstance(act, nn.Module) else None

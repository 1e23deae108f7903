"""The copy of a model that attacks craft images on: frozen, batch norms folded away, channels-last, bf16 where asked.

It computes the model's function, with other rounding, in less time. Verdicts are the model's own.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_robust.attacks.capture import Graphs
from sparse_robust.attacks.context import Model, attack_context
from sparse_robust.attacks.folding import LAYERS, Pair, find_pairs, fold_away
from sparse_robust.attacks.inputs import check_logits, recording
from sparse_robust.attacks.normalized import find_normalization
from sparse_robust.attacks.refresh import Refresh
from sparse_robust.attacks.stem import quicken
from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks import unwrap

PRECISIONS: dict[str, str] = {
    "fp32": "as the model computes; whether products may use TF32 is left as it is set",
    "bf16": "autocast to bfloat16; logits come back in float32",
}

# The largest difference between the logits of model and copy, as a share of the spread (largest minus smallest) of the
# model's. Rounding alone makes about 1e-6 of it in fp32; a batch norm folded wrongly 1e-2 and more.
TOLERANCE = 1e-3

# How many images of the example a copy is checked on.
CHECKED = 8


class _ChannelsLast(torch.autograd.Function):
    """Lays out images with channels last, and gradients as usual: mixed layouts slow down an attack's own steps."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


class Replica:
    """A function from images to logits that follows a model. Made by `make_replica`.

    Attributes:
        model: the original.
        module: the copy that computes; None where the original does it itself.
        folded: the batch norms that are folded away, with their layers.
        reason: why there is no copy, or why nothing in it is folded or laid out with channels last although that was
            wanted; None if all went well.
        precision: a key of `PRECISIONS`.
        channels_last: whether images [n, C, H, W] are laid out with channels last.
        mode: what batch norm does: ``eval`` or ``train_frozen``, see `MODES`.
        graphs: the attacks captured on it; None where it does not capture.
        normalization: what the copy does to images first, where sign steps can do it on the way; see `normalized`.
    """

    def __init__(
        self,
        model: Model,
        module: nn.Module | None,
        *,
        folded: tuple[Pair, ...] = (),
        reason: str | None = None,
        precision: str = "fp32",
        channels_last: bool = False,
        mode: str = "eval",
        capture: bool = False,
    ) -> None:
        self.mode, self.graphs = mode, Graphs() if capture else None
        self.model, self.module, self.folded, self.reason = model, module, folded, reason
        self.precision, self.channels_last = precision, channels_last
        self._compute = model if module is None else module
        self._refresh: Refresh | None = None
        self.normalization = find_normalization(module) if module is not None and channels_last else None

    def __call__(self, images: Tensor) -> Tensor:
        """Return logits [n, classes] of images [n, ...]; differentiable with respect to the images."""
        if self.channels_last and images.dim() == 4:
            images = _ChannelsLast.apply(images)
        return self._in_precision(self._compute, images)

    def feed(self, images: Tensor) -> Tensor:
        """Return what `compute` takes: images [n, C, H, W] after `normalization`, in the precision of the copy."""
        assert self.normalization is not None
        mean, std = (values.view(-1, 1, 1) for values in self.normalization)
        dtype = images.dtype if self.precision == "fp32" else torch.bfloat16
        return ((images - mean) / std).to(dtype, memory_format=torch.channels_last)

    def compute(self, fed: Tensor) -> Tensor:
        """Return logits of what `feed` returned, differentiable with respect to it."""
        assert self.module is not None
        return self._in_precision(self.module.forward, fed)

    def _in_precision(self, function: Model, images: Tensor) -> Tensor:
        if self.precision == "fp32":
            return function(images)
        # Nothing to cache: weights are cast already. In a captured graph a cache would outlive its memory.
        with torch.autocast(images.device.type, dtype=torch.bfloat16, cache_enabled=False):
            logits = function(images)
        return logits.float()

    @property
    def target(self) -> Model:
        """What to give to attacks: the replica, or where there is no copy the model itself, in the attack's mode."""
        return self.model if self.module is None else self

    @property
    def capture(self) -> bool:
        """Whether attacks on it are captured as CUDA graphs."""
        return self.graphs is not None and not self.graphs.failure

    def refresh(self) -> None:
        """Take over the original's present weights and buffers, in place. Its layers must still be those of then."""
        if self.module is None or not isinstance(self.model, nn.Module):
            return
        if self._refresh is None:
            self._refresh = Refresh(unwrap(self.model), self.module, self.folded)
        self._refresh()


def make_replica(
    model: Model,
    example: Tensor,
    *,
    precision: str = "fp32",
    fold: bool = True,
    channels_last: bool = True,
    mode: str = "eval",
    capture: bool = True,
) -> Replica:
    """Return a copy of a model for attacks, checked against it.

    A batch norm is folded into the convolution or linear layer before it where a pass over the example shows that it is
    the only reader of that layer's output; other norms stay. If the copy's logits are not the model's, to `TOLERANCE`,
    it is given up: first the folding, then the copy. The model itself is left as it is.

    Args:
        model: maps images to logits [n, classes] in eval mode. A module that cannot be copied, and what is no module,
            serves itself: attacks on it are only slower. `Replica.reason` says why.
        example: images [n, ...] that the model takes, on its device; some of them are looked at.
        precision: a key of `PRECISIONS`.
        fold: fold batch norms.
        channels_last: lay out 4-d weights and images with channels last.
        mode: ``eval``, or ``train_frozen``: batch statistics, nothing folded, and no running statistics touched.
        capture: on a GPU, make PGD and FGSM one CUDA graph, from start to last step, at the first call of a kind, and
            replay it then, also after `refresh`. Elsewhere it changes nothing.

    Raises:
        UsageError: for an unknown precision or mode, or a model whose output is no logits.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if mode not in ("eval", "train_frozen"):
        raise UsageError(
            f"a replica computes in mode 'eval' or 'train_frozen', got {mode!r}"
            + (": such an attack updates the statistics of the model itself; attack that." if mode == "train" else ".")
        )
    if not isinstance(model, nn.Module):
        return Replica(model, None, reason="it is no torch module", precision=precision)
    original, example = unwrap(model), example[:CHECKED]
    # TF32, which convolutions use unless told otherwise, rounds so much that a wrong fold could hide in it.
    exact = torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False)
    # And so does autocast, within which a training may ask.
    plain = torch.autocast(example.device.type, enabled=False)
    with recording(), torch.no_grad(), exact, plain, attack_context(original):
        logits = check_logits(original(example), len(example))
        try:
            module, folded, reason = _copy(original, example, logits, fold and mode == "eval")
        except Exception as error:  # whatever keeps a foreign module from being copied, attacks can do without
            return Replica(model, None, reason=_describe(error), precision=precision)
        if channels_last:
            refusal = _lay_out(module, example, logits)
            channels_last, reason = refusal is None, reason or refusal
        if precision == "bf16":
            _cast_weights(module)
        else:
            quicken(module)
    if mode == "train_frozen":
        _use_batch_statistics(original, module)
    return Replica(
        model, module, folded=folded, reason=reason, precision=precision, channels_last=channels_last, mode=mode,
        capture=capture and example.device.type == "cuda",
    )  # fmt: skip


def _use_batch_statistics(original: nn.Module, module: nn.Module) -> None:
    """Put a copy in the mode that `attack_context` puts the original in: layers its owner froze stay frozen."""
    for source, part in zip(original.modules(), module.modules(), strict=True):
        part.training = source.training or not original.training
        if isinstance(part, _BatchNorm):
            part.track_running_stats = False


def _copy(
    original: nn.Module, example: Tensor, logits: Tensor, fold: bool
) -> tuple[nn.Module, tuple[Pair, ...], str | None]:
    """Return a frozen copy, what is folded in it, and why nothing is."""
    module = _deepcopy(original)
    _check(module(example), logits, "its copy")
    if not fold:
        return module, (), None
    try:
        trial = _deepcopy(original)
        _unsettle(trial)
        expected = trial(example)
        pairs = find_pairs(trial, example)
        fold_away(trial, pairs)
        _check(trial(example), expected, "its copy with folded batch norms")
        fold_away(module, pairs)
        _check(module(example), logits, "its copy with folded batch norms")
    except Exception as error:
        return _deepcopy(original), (), _describe(error)
    return module, pairs, None


def _unsettle(module: nn.Module) -> None:
    """Change what batch norms hold: those of a new network do nothing yet, whether they are folded rightly or not."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
            step = torch.linspace(0.1, 0.3, norm.num_features).to(norm.running_mean)
            norm.running_mean.add_(norm.running_var.sqrt() * step)
            norm.running_var.mul_(1 + step)
            if norm.affine:
                norm.weight.add_(step)
                norm.bias.sub_(step)


def _lay_out(module: nn.Module, example: Tensor, logits: Tensor) -> str | None:
    """Lay out a copy with channels last; if it does not compute the same so, put it back and return why."""
    module.to(memory_format=torch.channels_last)
    try:
        _check(module(_last(example)), logits, "its copy with channels last")
    except Exception as error:
        module.to(memory_format=torch.contiguous_format)
        return _describe(error)
    return None


def _last(images: Tensor) -> Tensor:
    # A clone: images of one channel count as channels-last already, and networks look at the strides.
    return images.clone(memory_format=torch.channels_last) if images.dim() == 4 else images


def _deepcopy(original: nn.Module) -> nn.Module:
    return copy.deepcopy(original).eval().requires_grad_(False)


def _check(logits: Tensor, expected: Tensor, what: str) -> None:
    difference, spread = (logits - expected).abs().max(), expected.max() - expected.min()
    if not bool(difference <= TOLERANCE * spread):
        raise ValueError(f"{what} gives other logits: they differ by {float(difference / spread):.2g} of their spread")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _cast_weights(module: nn.Module) -> None:
    """Cast what autocast would cast in every pass: it only keeps the casts of parameters that get gradients."""
    for part in module.modules():
        if isinstance(part, LAYERS):
            for name, parameter in part._parameters.items():
                if parameter is not None and parameter.dtype == torch.float32:
                    part._parameters[name] = nn.Parameter(parameter.bfloat16(), requires_grad=False)

"""Watching one forward pass: which normalisations it goes through, and whether it computes gradients of its own."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from sparse_robust.attacks.context import Model
from sparse_robust.masks import unwrap
from sparse_robust.models.normalization import get_normalization

# What public code calls the two constants of its normalisation layers: torchvision, kornia, torchattacks and
# RobustBench the first pair, robustness and randomised smoothing the next two.
_CONSTANTS = (("mean", "std"), ("new_mean", "new_std"), ("means", "sds"), ("mu", "std"), ("_mean", "_std"))

# One normalisation of [0, 1] images divides by their standard deviation, 0.1 to 0.5 in the data sets in use.
_SMALLEST_STD = 0.1


class GradientCalls:
    """Counts the calls of `torch.autograd.grad` and ``backward`` in a block, however they were imported."""

    def __init__(self) -> None:
        self.count = 0
        self._codes = {torch.autograd.grad.__code__, torch.autograd.backward.__code__}

    def __enter__(self) -> GradientCalls:
        self._before = sys.getprofile()
        # cProfile holds the hook itself and could not be put back: under it nothing is counted.
        self._holds = self._before is None or callable(self._before)
        if self._holds:
            sys.setprofile(self._look)
        return self

    def __exit__(self, *error: object) -> None:
        if self._holds:
            sys.setprofile(self._before)

    def _look(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code in self._codes:
            self.count += 1


class Normalisations:
    """Records, in a block with one forward pass, what normalisation layers and the first weight layer are given.

    Only layers before the first convolution or linear layer count; what comes later normalises features.
    """

    def __init__(self, model: Model) -> None:
        self._model = unwrap(model) if isinstance(model, nn.Module) else None
        self._handles: list[RemovableHandle] = []
        self._least: list[float] = []  # smallest value that each normalisation was given
        self._first: Tensor | None = None

    def __enter__(self) -> Normalisations:
        for module in self._model.modules() if self._model is not None else ():
            if _normalises(module):  # in front of our own normalisation, which is a hook of this kind itself
                self._handles.append(module.register_forward_pre_hook(self._see_normalisation, prepend=True))
            if isinstance(module, (_ConvNd, nn.Linear)):
                self._handles.append(module.register_forward_pre_hook(self._see_weights))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see_normalisation(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._first is None and args and isinstance(args[0], Tensor):
            self._least.append(float(args[0].detach().min()))

    def _see_weights(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._first is None and args and isinstance(args[0], Tensor):
            self._first = args[0].detach()

    def normalised_again(self) -> float | None:
        """Return the smallest value that a later normalisation was given, if it was given normalised images."""
        later = self._least[1:]
        return min(later) if later and min(later) < -0.01 else None

    def reached_first_layer(self) -> tuple[float, float] | None:
        """Return mean and standard deviation of what the first convolution or linear layer was given."""
        if self._first is None:
            return None
        return float(self._first.mean()), float(self._first.std(correction=0))

    def steeper_than_one(self, x: Tensor) -> float | None:
        """Return the standard deviation that was divided by, where it is smaller than that of any one normalisation.

        The first layer's input is compared with the images [n, C, H, W]: it has to be a straight line of them in every
        channel, as a normalisation in whatever form makes it, and to be spread far wider than 1.
        """
        seen = self._first
        if seen is None or seen.shape != x.shape or x.dim() != 4:
            return None
        a, b = (tensor.double().transpose(0, 1).flatten(1) for tensor in (x, seen))
        spread = a.var(1, correction=0)
        if float(spread.min()) < 1e-4:
            return None
        slope = ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).mean(1) / spread
        line = slope[:, None] * (a - a.mean(1, keepdim=True)) + b.mean(1, keepdim=True)
        straight = float((line - b).abs().max()) < 1e-3 * float(b.abs().max())
        divided_by = 1 / float(slope.min()) if float(slope.min()) > 0 else float("inf")
        return divided_by if straight and divided_by < _SMALLEST_STD and float(b.std()) > 2.5 else None


def has_normalisation(model: Model) -> bool:
    """Return whether a module normalises its input, by our hook or by a layer of a usual form."""
    return isinstance(model, nn.Module) and any(_normalises(module) for module in unwrap(model).modules())


def _normalises(module: nn.Module) -> bool:
    if get_normalization(module) is not None:
        return True
    for names in _CONSTANTS:
        values = [getattr(module, name, None) for name in names]
        if all(isinstance(value, (Tensor, list, tuple, float)) for value in values):
            mean, std = (torch.as_tensor(value, dtype=torch.float32).detach().cpu().flatten() for value in values)
            plain = bool((mean == 0).all()) and bool((std == 1).all())
            return 1 <= len(mean) == len(std) <= 64 and not plain
    return False

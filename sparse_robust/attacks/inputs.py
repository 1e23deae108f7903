"""Checks of what users pass in. Shapes and types always; values only where reading them back costs no wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_robust.attacks.budget import Budget
from sparse_robust.errors import UsageError

NO_GRADIENT = (
    "the model's output has no gradient with respect to its input: does it detach, round-trip through NumPy or compute "
    "under torch.no_grad()? A gradient attack on it would only return noise."
)


class Inputs(NamedTuple):
    """Images [n, ...] in float32 or float64, labels int64 [n], sample ids int64 [n]; on one device, without graph."""

    x: Tensor
    y: Tensor
    ids: Tensor

    def select(self, index: Tensor | slice) -> Inputs:
        """Return the samples at ``index``."""
        return Inputs(self.x[index], self.y[index], self.ids[index])


@contextmanager
def recording() -> Iterator[None]:
    """Allow gradients inside a caller's inference mode; elsewhere it changes nothing."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def prepare(x: Tensor, y: Tensor, ids: Tensor | None, budget: Budget, *, wait: bool) -> Inputs:
    """Check a batch and return it in the form the attacks work on.

    Args:
        ids: None means 0..n-1.
        wait: check the images' range on any device; otherwise on the CPU only, where reading it waits for nothing.

    Raises:
        UsageError: for a wrong type, shape, device or range.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.dim() < 2:
        raise UsageError(
            f"images are a float32 tensor [n, ...] in [{budget.lo:g}, {budget.hi:g}], got {_describe(x)}. "
            "Divide uint8 pixels by 255; for a half-precision model keep float32 images and use autocast."
        )
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != (len(x),):
        raise UsageError(f"labels are class numbers, int64 [{len(x)}] for these images, got {_describe(y)}.")
    if ids is None:
        ids = torch.arange(len(x), device=x.device)
    elif not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != (len(x),):
        raise UsageError(f"sample ids are int64 [{len(x)}] for these images, got {_describe(ids)}.")
    if y.device != x.device:
        raise UsageError(f"images are on {x.device}, but labels on {y.device}; move them to one device.")
    x, y = (tensor.clone() if tensor.is_inference() else tensor.detach() for tensor in (x, y))
    if (wait or x.device.type == "cpu") and len(x):
        least, most = float(x.min()), float(x.max())
        if not budget.lo <= least <= most <= budget.hi:
            raise UsageError(
                f"images must lie in [{budget.lo:g}, {budget.hi:g}], got values from {least:g} to {most:g}. Attacks "
                "work on pixels: normalise inside the model, and divide uint8 pixels by 255."
            )
    return Inputs(x, y, ids.to(x.device))


def check_logits(logits: Tensor, count: int, *, needs_grad: bool = False) -> Tensor:
    """Return the model's output if it is logits [count, 2 or more classes], and has a graph where that is needed."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != count or logits.shape[1] < 2:
        raise UsageError(
            f"a model returns logits [n, classes] with 2 classes or more, here n = {count}; got {_describe(logits)}."
        )
    if needs_grad and not logits.requires_grad:
        raise UsageError(NO_GRADIENT)
    return logits


def check_labels(y: Tensor, logits: Tensor) -> None:
    """Raise UsageError unless all labels are in 0..classes-1. Reads values back: not for the hot path of a GPU."""
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise UsageError(
            f"labels must be in 0..{logits.shape[1] - 1} for a model with {logits.shape[1]} outputs, got values from "
            f"{int(y.min())} to {int(y.max())}."
        )


def check_device(model: object, x: Tensor) -> None:
    """Raise UsageError if a module's parameters are on another device than the images."""
    if not isinstance(model, nn.Module):
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != x.device:
            raise UsageError(f"the model is on {tensor.device}, but the images on {x.device}; move one of them.")
        return


def check_no_nan(logits: Tensor, ids: Tensor) -> None:
    """Raise UsageError if the answer to any unattacked image is NaN. Reads values back."""
    broken = logits.isnan().any(1)
    if bool(broken.any()):
        raise UsageError(
            f"the model returns NaN for {int(broken.sum())} of {len(ids)} unattacked images (sample ids "
            f"{list(map(int, ids[broken][:5]))}): a verdict on it would mean nothing. Look for an overflow, a division "
            "by zero or untrained statistics in it."
        )


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__

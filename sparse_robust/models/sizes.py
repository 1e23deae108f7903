"""Which image sizes a network takes, found by trying: forwards that compute shapes and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import unwrap
from sparse_robust.models.spec import spec_of


def min_input_size(model: nn.Module) -> tuple[int, int]:
    """Return the smallest image (height, width) that ``model`` takes: a square, or a fixed-size network's one size.

    Sizes are tried from 1 pixel up on torch's ``meta`` device, where a forward costs milliseconds whatever the
    network's width, and neither the weights nor any random state are touched. The answer says that the network runs
    there, not that it is of use there: a ResNet takes a single pixel.

    Raises:
        UsageError: if the model was not built by this package.
    """
    return _smallest(_shapes_only(model), nominal_size(model), spec_of(model).in_chans)


def check_input_size(model: nn.Module, height: int, width: int) -> None:
    """Check that ``model`` takes images of ``height`` x ``width`` pixels.

    Raises:
        UsageError: if it does not; the message holds the network's reason, the size it takes, and what can be done.
    """
    spec, twin, nominal = spec_of(model), _shapes_only(model), nominal_size(model)
    reason = _refusal(twin, spec.in_chans, height, width)
    if reason is None:
        return
    smallest = _smallest(twin, nominal, spec.in_chans)
    fixed = smallest == nominal and _refusal(twin, spec.in_chans, nominal[0] + 1, nominal[1] + 1) is not None
    takes = f"it is built for {_by(*nominal)}" if fixed else f"the smallest it takes are {_by(*smallest)}"
    larger = (side for side in range(max(height, width), max(nominal)) if not _refusal(twin, spec.in_chans, side, side))
    ways = [f"resize the images (resize={next(larger, max(nominal))})"] if nominal[0] == nominal[1] else []
    ways += [f"build the model for them (img_size={height} and a patch_size that divides it)"] if fixed else []
    ways += ["choose a network for small images, such as resnet18 with stem='small'"]
    raise UsageError(
        f"{spec.name} does not take {_by(height, width)} images: {takes} ({reason}). "
        f"What can be done: {', or '.join(ways)}."
    )


def check_classifier(model: nn.Module) -> None:
    """Check that ``model`` turns images of its nominal size into one row of ``num_classes`` logits an image.

    Raises:
        UsageError: if it does not: it is no classifier, or it cannot be built for that many channels.
    """
    spec, (height, width) = spec_of(model), nominal_size(model)
    reason = _refusal(_shapes_only(model), spec.in_chans, height, width, spec.num_classes)
    if reason is not None:
        raise UsageError(
            f"{spec.name} does not classify {spec.in_chans}-channel {_by(height, width)} images into "
            f"{spec.num_classes} classes ({reason}). Choose another timm classifier, in_chans or timm arguments."
        )


def nominal_size(model: nn.Module) -> tuple[int, int]:
    """Return the (height, width) that the network was built for: ``img_size`` if given, else what timm records."""
    record = getattr(unwrap(model), "pretrained_cfg", None) or {}
    size = spec_of(model).kwargs.get("img_size") or record.get("input_size")
    if isinstance(size, int):
        return size, size
    return (int(size[-2]), int(size[-1])) if isinstance(size, Sequence) else (224, 224)


def _shapes_only(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` in evaluation mode whose tensors have shapes but no values and take no memory."""
    model = unwrap(model)
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo).eval()


def _refusal(twin: nn.Module, in_chans: int, height: int, width: int, num_classes: int | None = None) -> str | None:
    """Return why the network does not take such images, or None if it does or if only real data could tell."""
    like = next(twin.parameters())
    try:
        with torch.no_grad():
            logits = twin(torch.empty(1, in_chans, height, width, device="meta", dtype=like.dtype))
    except NotImplementedError:  # an operation without a shape rule
        return None
    except (RuntimeError, AssertionError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if num_classes is not None and not (torch.is_tensor(logits) and logits.shape == (1, num_classes)):
        got = f"shape {list(logits.shape)}" if torch.is_tensor(logits) else type(logits).__name__
        return f"expected logits of shape [1, {num_classes}], got {got}"
    return None


def _smallest(twin: nn.Module, nominal: tuple[int, int], in_chans: int) -> tuple[int, int]:
    for side in range(1, min(nominal)):
        if _refusal(twin, in_chans, side, side) is None:
            return side, side
    return nominal


def _by(height: int, width: int) -> str:
    return f"{height}x{width}"

"""Checks of the images and labels that an evaluation is given, with a guess at what went wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparse_robust.attacks.context import Model
from sparse_robust.evaluation.findings import Finding, describe, ids_of, name_samples
from sparse_robust.evaluation.watch import has_normalisation


def check_images(model: Model, x: Tensor, lo: float, hi: float, ids: Tensor | None) -> Iterator[Finding]:
    """Find images of a wrong type or outside the box [lo, hi], and say what they look like."""
    if not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float64) or x.dim() < 2:
        got, remedy = describe(x), "Convert them with torch.as_tensor(images, dtype=torch.float32)."
        if got.startswith("uint8"):
            remedy = "Divide the pixels by 255."
        elif got.startswith(("float16", "bfloat16")):
            remedy = "Keep the images in float32 and use autocast for a half-precision model."
        yield Finding("image-type", "error", f"images are a float32 tensor [n, ...], got {got}. {remedy}")
        return
    if not x.numel():
        yield Finding("empty", "error", f"there are no images: the first batch has shape {list(x.shape)}.")
        return
    bad = ~x.detach().flatten(1).isfinite().all(1)
    if bad.any():
        which = name_samples(ids_of(ids, len(x)), bad)
        yield Finding("image-range", "error", f"{int(bad.sum())} of {len(x)} images hold NaN or infinity: {which}.")
        return
    least, most = float(x.min()), float(x.max())
    if least < lo or most > hi:
        guess = _guess_range(model, x, least, most, lo, hi)
        values = f"images lie in [{lo:g}, {hi:g}], got values from {least:.4g} to {most:.4g}"
        yield Finding("image-range", "error", f"{values}: {guess}")
    elif 0 < most <= 1.01 * hi / 255:
        sentence = f"the brightest of {len(x)} images is {most:.2g}: it seems that they were divided by 255 twice."
        yield Finding("image-range", "warning", sentence)


def _guess_range(model: Model, x: Tensor, least: float, most: float, lo: float, hi: float) -> str:
    width = hi - lo
    if least >= lo - 0.01 and hi + 0.5 * width < most <= 256:
        return "they look like pixels from 0 to 255. Divide them by 255."
    if least >= lo - 0.1 * width and most <= hi + 0.1 * width:
        return "that is a little outside, as resizing leaves it. Clamp them: x.clamp(0, 1)."
    twice = " The model normalises as well, so they would be normalised twice." if has_normalisation(model) else ""
    if least >= -1.001 and most <= 1.001:
        return f"they look scaled to [-1, 1].{twice} Undo it with (x + 1) / 2, and scale inside the model."
    about = f"mean {float(x.mean()):.2g}, standard deviation {float(x.std(correction=0)):.2g}"
    return (
        f"they look normalised already ({about}).{twice} Attacks work on pixels: undo it, and normalise inside the "
        "model (sparse_robust.models.set_normalization)."
    )


def check_label_type(x: Tensor, y: Tensor) -> Iterator[Finding]:
    """Find labels that are not int64 [n]."""
    if not isinstance(x, Tensor):
        return
    if isinstance(y, Tensor) and y.dtype == torch.int64 and y.shape == (len(x),):
        return
    remedy = "Convert them with torch.as_tensor(labels).long()."
    if isinstance(y, Tensor) and y.dim() == 2 and len(y) == len(x):
        remedy = "For one-hot labels take y.argmax(1)." if y.shape[1] > 1 else "Flatten them: y.flatten().long()."
    elif isinstance(y, Tensor) and y.dim() == 1 and len(y) != len(x):
        remedy = f"There are {len(x)} images and {len(y)} labels."
    sentence = f"labels are class numbers, int64 [{len(x)}] for these images, got {describe(y)}. {remedy}"
    yield Finding("label-type", "error", sentence)


def check_devices(model: Model, x: Tensor, y: Tensor) -> Iterator[Finding]:
    """Find a model or labels on another device than the images."""
    if not isinstance(x, Tensor):
        return
    if isinstance(y, Tensor) and y.device != x.device:
        sentence = f"images are on {x.device} and labels on {y.device}. Move both to one device: y.to(x.device)."
        yield Finding("device", "error", sentence)
    tensors = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    devices = [str(tensor.device) for tensor in tensors]  # several for a model that is spread out
    if devices and str(x.device) not in devices:
        sentence = f"the model is on {devices[0]} and the images on {x.device}. Move one: x.to({devices[0]!r})."
        yield Finding("device", "error", sentence)

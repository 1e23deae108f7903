"""Pixels: from pictures to uint8 tensors, to the network's size, to another number of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sparse_robust.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}
# A range of integers or floats instead of bytes: Pillow would clip it without a word.
WIDE_MODES = ("I", "F")


def to_tensor(image: Image, channels: int) -> Tensor:
    """Turn a Pillow image into uint8 [channels,H,W]: 1 is grey (ITU-R 601), 3 is RGB; palettes and alpha are resolved.

    Raises:
        UsageError: for images of more than 8 bits a channel.
    """
    if image.mode.startswith(WIDE_MODES):
        raise UsageError(f"expected 8 bits a channel, got an image of mode {image.mode!r}: convert it to 8 bits.")
    pixels = torch.from_numpy(np.array(image.convert(MODES[channels])))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1).contiguous()


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a small tensor to a device; a GPU gets it in its turn, without the host waiting for what runs there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_channels(images: Tensor, channels: int) -> Tensor:
    """Turn uint8 [N,C,H,W] with C of 1 or 3 into ``channels`` channels; grey as Pillow computes it."""
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1).contiguous()
    red, green, blue = images.to(torch.int32).unbind(1)
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return grey.to(torch.uint8).unsqueeze(1)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [N,C,h,w], bilinear with antialias, to uint8 [N,C,height,width]."""
    if tuple(images.shape[-2:]) == (height, width):
        return images
    if images.device.type == "cpu":
        return _interpolate(images, height, width)
    return _interpolate(images.float(), height, width).round_().clamp_(0, 255).to(torch.uint8)


def fit(images: Tensor, size: tuple[int, int], crop: float) -> Tensor:
    """Resize so that the centre ``crop`` of the shorter side covers ``size``, and cut the centre out.

    With size 224 and crop 0.875: shorter side 256, centre 224, the usual evaluation of ImageNet networks.

    Args:
        images: uint8 [N,C,h,w].
        size: (height, width) of the result.
        crop: share of the resized image that is kept, in (0, 1].
    """
    height, width = images.shape[-2:]
    if crop == 1 and (height, width) == size:
        return images
    if size[0] * width >= size[1] * height:
        tall = int(size[0] / crop + 1e-6)
        wide = max(size[1], int(tall * width / height))
    else:
        wide = int(size[1] / crop + 1e-6)
        tall = max(size[0], int(wide * height / width))
    resized = resize(images, tall, wide)
    top, left = (round((have - want) / 2) for have, want in zip(resized.shape[-2:], size, strict=True))
    return resized[..., top : top + size[0], left : left + size[1]].contiguous()


def to_unit(images: Tensor) -> Tensor:
    """uint8 to float32 in [0,1]."""
    return images.to(torch.float32).div_(255)


def _interpolate(images: Tensor, height: int, width: int) -> Tensor:
    return functional.interpolate(images, (height, width), mode="bilinear", antialias=True)

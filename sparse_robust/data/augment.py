"""Augmentation as a function of (seed, epoch, sample id): the same image whatever the batch, the rank or the start."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparse_robust.data.data import Data
from sparse_robust.data.images import send
from sparse_robust.data.spec import AUGMENTS
from sparse_robust.data.split import MemorySplit
from sparse_robust.errors import UsageError, unknown
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.rng import philox_uniform

# RandomResizedCrop: tries before it falls back to the centre, each a draw of area and ratio.
TRIES = 10
# Draws of one image: mirror, two of the position, then the tries.
MIRROR, POSITION, AREAS = 0, slice(1, 3), 3
DRAWS = AREAS + 2 * TRIES


@dataclass(frozen=True)
class Augment:
    """What is done to a training image.

    Attributes:
        pad: zero border in pixels, of which a random crop of the original size is taken; 0 is none.
        flip: mirror left and right with probability 1/2.
        area: bounds of the share of the image that a random resized crop covers; None is no such crop.
        ratio: bounds of its width over its height.
    """

    pad: int = 0
    flip: bool = False
    area: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.pad < 0:
            raise UsageError(f"augmentation pad must be at least 0, got {self.pad}.")
        if self.area is not None and not 0 < self.area[0] <= self.area[1] <= 1:
            raise UsageError(f"augmentation area must be two ascending numbers in (0, 1], got {self.area}.")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UsageError(f"augmentation ratio must be two ascending positive numbers, got {self.ratio}.")


def make_augment(augment: str | Augment, data: Data) -> Augment:
    """Return the augmentation of a name, in the pixels of the data set.

    ``none``; ``shift``: crop of a small zero border (2 pixels at 28), no mirror; ``crop-flip``: crop of a border (2
    pixels at 28, 4 at 32, side/8 above) and mirror; ``rrc``: random resized crop of 8 to 100 % and mirror; ``auto``:
    what the data set's spec asks for, else by source: ``rrc`` for images on disk, ``crop-flip`` for those in memory,
    ``shift`` where mirroring changes the class (digits, letters, signs).

    Raises:
        UsageError: for an unknown name.
    """
    if isinstance(augment, Augment):
        return augment
    name = data.augment if augment == "auto" else augment
    if name == "auto":
        large = not isinstance(data.train, MemorySplit)
        name = "shift" if not data.flips else "rrc" if large else "crop-flip"
    side = min(data.size)
    small = max(1, side // 14)
    if name not in AUGMENTS:
        raise unknown("augmentation", name, AUGMENTS)
    return {
        "none": Augment(),
        "shift": Augment(pad=small),
        "crop-flip": Augment(pad=side // 8 if side >= 32 else small, flip=True),
        "rrc": Augment(area=(0.08, 1.0), flip=True),
    }[name]


def draws(ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Return the random numbers of each image in one epoch: float32 [n, DRAWS] in [0,1), on the CPU."""
    return philox_uniform(ids.cpu(), DRAWS, key=derive_seed("augment", seed, epoch), stream=0)


def shift_and_mirror(images: Tensor, drawn: Tensor, augment: Augment) -> Tensor:
    """Crop each image at random out of its zero-padded self and mirror half of them, in one gather.

    Args:
        images: [n,C,H,W], any dtype and device.
        drawn: float32 [n, DRAWS] from `draws`.
        augment: its pad and flip are used.
    """
    if not augment.pad and not augment.flip:
        return images
    count, _, height, width = images.shape
    pad, device = augment.pad, images.device
    offsets = send((drawn[:, POSITION] * (2 * pad + 1)).to(torch.int64), device)
    rows = torch.arange(height, device=device) + offsets[:, :1]
    columns = torch.arange(width, device=device).expand(count, -1)
    if augment.flip:
        mirrored = send(drawn[:, MIRROR] < 0.5, device)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    columns = columns + offsets[:, 1:]
    padded = functional.pad(images, (pad, pad, pad, pad)) if pad else images
    image = torch.arange(count, device=device)[:, None, None]
    # Indexing around the channels puts them last; flattened, a single channel has the usual strides, too.
    return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).flatten().view_as(images)


def crop_boxes(drawn: Tensor, heights: Tensor, widths: Tensor, augment: Augment) -> Tensor:
    """Return the boxes of a random resized crop: int64 [n,4] of top, left, height, width.

    The rule of torchvision's RandomResizedCrop: ten tries of an area and a log-uniform ratio, the first that fits, else
    the largest centre crop within the ratios.

    Args:
        drawn: float32 [n, DRAWS] from `draws`.
        heights, widths: int64 [n], sizes of the images.
        augment: its area and ratio are used.
    """
    assert augment.area is not None
    numbers = drawn[:, AREAS:].double().reshape(-1, TRIES, 2)
    full_height, full_width = heights[:, None].double(), widths[:, None].double()
    low, high = augment.area
    area = full_height * full_width * (low + (high - low) * numbers[..., 0])
    log_low, log_high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    ratio = torch.exp(log_low + (log_high - log_low) * numbers[..., 1])
    tried_width, tried_height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (tried_width > 0) & (tried_width <= full_width) & (tried_height > 0) & (tried_height <= full_height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    found = fits.any(1)
    height, width = tried_height.gather(1, first)[:, 0], tried_width.gather(1, first)[:, 0]
    position = drawn[:, POSITION].double()
    top = (position[:, 0] * (full_height[:, 0] - height + 1)).floor()
    left = (position[:, 1] * (full_width[:, 0] - width + 1)).floor()
    whole_height = torch.minimum(full_height[:, 0], (full_width[:, 0] / augment.ratio[0]).round())
    whole_width = torch.minimum(full_width[:, 0], (full_height[:, 0] * augment.ratio[1]).round())
    centre_top, centre_left = (
        ((full_height[:, 0] - whole_height) / 2).floor(),
        ((full_width[:, 0] - whole_width) / 2).floor(),
    )
    random_box = torch.stack([top, left, height, width], 1)
    centre_box = torch.stack([centre_top, centre_left, whole_height, whole_width], 1)
    return torch.where(found[:, None], random_box, centre_box).to(torch.int64)


def crop_and_resize(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a box out of each image and resize it bilinearly, all at once: uint8 [n,C,*size].

    Equal to cropping and resizing image by image when boxes are enlarged; a box that shrinks is sampled without
    antialias.

    Args:
        images: uint8 [n,C,H,W].
        boxes: int64 [n,4] from `crop_boxes`.
        size: (height, width) of the result.
    """
    height, width = images.shape[-2:]
    boxes = boxes.to(images.device, torch.float32)
    rows = _sample_points(boxes[:, 0], boxes[:, 2], size[0], height)
    columns = _sample_points(boxes[:, 1], boxes[:, 3], size[1], width)
    grid = torch.stack(torch.broadcast_tensors(columns[:, None, :], rows[:, :, None]), dim=-1)
    sampled = functional.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=True)
    return sampled.round_().clamp_(0, 255).to(torch.uint8)


def _sample_points(start: Tensor, length: Tensor, count: int, full: int) -> Tensor:
    """Centres of ``count`` pixels over [start, start + length), kept inside the box, scaled to [-1, 1]: [n, count]."""
    centres = (torch.arange(count, device=start.device) + 0.5) / count
    points = start[:, None] + (centres * length[:, None] - 0.5).clamp_min(0)
    points = torch.minimum(points, (start + length - 1)[:, None])
    return points * 2 / max(full - 1, 1) - 1

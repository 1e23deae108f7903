"""Augmentation against the slow way, and its independence of batch, rank and start."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torchvision.transforms.v2 import functional as reference

from sparse_robust.data import Augment, Data, load_data
from sparse_robust.data.augment import (
    AREAS,
    DRAWS,
    TRIES,
    crop_and_resize,
    crop_boxes,
    draws,
    make_augment,
    shift_and_mirror,
)
from sparse_robust.errors import UsageError


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_draws_are_a_function_of_seed_epoch_and_id() -> None:
    ids = torch.tensor([5, 0, 1 << 40, 77])
    drawn = draws(ids, 3, 2)
    assert drawn.shape == (4, DRAWS) and float(drawn.min()) >= 0 and float(drawn.max()) < 1
    assert torch.equal(drawn[[2, 0]], draws(ids[[2, 0]], 3, 2))
    assert not torch.equal(drawn, draws(ids, 3, 1)) and not torch.equal(drawn, draws(ids, 2, 2))


@pytest.mark.parametrize(("pad", "flip"), [(0, True), (2, False), (3, True), (1, True)])
def test_shift_and_mirror_equals_one_image_at_a_time(pad: int, flip: bool) -> None:
    images, drawn = noise(40, 2, 5, 7), draws(torch.arange(40), 0, 0)
    got = shift_and_mirror(images, drawn, Augment(pad=pad, flip=flip))
    for image, numbers, result in zip(images, drawn.tolist(), got, strict=True):
        top, left = (math.floor(u * (2 * pad + 1)) for u in numbers[1:3])
        expected = torch.nn.functional.pad(image, (pad,) * 4)[:, top : top + 5, left : left + 7]
        if flip and numbers[0] < 0.5:
            expected = expected.flip(2)
        assert torch.equal(result, expected)


def test_every_offset_and_both_mirrors_occur() -> None:
    drawn = draws(torch.arange(3000), 0, 0)
    offsets = (drawn[:, 1:3] * 5).long()
    counts = torch.bincount(offsets[:, 0] * 5 + offsets[:, 1], minlength=25)
    assert int(counts.min()) > 80 and int(counts.max()) < 165  # 120 expected, six deviations
    assert 0.44 < float((drawn[:, 0] < 0.5).float().mean()) < 0.56


def slow_box(numbers: list[float], height: int, width: int, augment: Augment) -> tuple[int, int, int, int]:
    """The loop of torchvision's RandomResizedCrop.get_params, fed with our numbers."""
    assert augment.area is not None
    (low, high), ratio = augment.area, augment.ratio
    for attempt in range(TRIES):
        u, v = numbers[AREAS + 2 * attempt : AREAS + 2 * attempt + 2]
        area = height * width * (low + (high - low) * u)
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * v)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(numbers[1] * (height - h + 1)), math.floor(numbers[2] * (width - w + 1)), h, w
    if width / height < min(ratio):
        w, h = width, round(width / min(ratio))
    elif width / height > max(ratio):
        h, w = height, round(height * max(ratio))
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", [(32, 32), (40, 20), (7, 90), (90, 7)])
def test_boxes_follow_the_rule_of_torchvision(size: tuple[int, int]) -> None:
    augment = Augment(area=(0.08, 1.0))
    drawn = draws(torch.arange(200), 0, 0)
    heights, widths = (torch.full((200,), n) for n in size)
    boxes = crop_boxes(drawn, heights, widths, augment)
    expected = [slow_box(numbers, *size, augment) for numbers in drawn.tolist()]
    assert boxes.tolist() == [list(box) for box in expected]
    assert bool((boxes[:, 0] + boxes[:, 2] <= size[0]).all() and (boxes[:, 1] + boxes[:, 3] <= size[1]).all())
    assert int(boxes[:, 2:].min()) >= 1 and int(boxes[:, :2].min()) >= 0


def test_crop_and_resize_equals_torchvision_when_it_enlarges() -> None:
    images, augment = noise(30, 3, 32, 32), Augment(area=(0.08, 1.0))
    full = torch.full((30,), 32)
    boxes = crop_boxes(draws(torch.arange(30), 0, 0), full, full, augment)
    got = crop_and_resize(images, boxes, (64, 64))
    for image, box, result in zip(images, boxes.tolist(), got, strict=True):
        expected = reference.resized_crop(image, *box, size=[64, 64], antialias=True)
        # torchvision computes bytes in fixed point
        assert (result.float() - expected.float()).abs().max() <= 1


def test_names(small_data: Callable[..., Data]) -> None:
    at = {size: small_data(size=size) for size in (8, 28, 32, 64)}
    assert make_augment("none", at[28]) == Augment()
    assert make_augment("shift", at[28]) == Augment(pad=2)
    assert make_augment("crop-flip", at[28]) == Augment(pad=2, flip=True)
    assert make_augment("crop-flip", at[32]) == Augment(pad=4, flip=True)
    assert make_augment("crop-flip", at[64]) == Augment(pad=8, flip=True)
    assert make_augment("shift", at[8]) == Augment(pad=1)
    assert make_augment("rrc", at[28]) == Augment(area=(0.08, 1.0), flip=True)
    assert make_augment(Augment(pad=7), at[8]) == Augment(pad=7)
    assert make_augment("auto", at[32]) == Augment(pad=4, flip=True)
    assert make_augment("auto", small_data(augment="none")) == Augment(), "the data set's own wish"
    assert make_augment("auto", load_data("digits")) == Augment(pad=1), "digits are not mirrored"
    with pytest.raises(UsageError, match=r"unknown augmentation 'crop_flip'. Did you mean 'crop-flip'"):
        make_augment("crop_flip", at[28])
    with pytest.raises(UsageError, match=r"area must be two ascending numbers"):
        Augment(area=(0.5, 0.1))
    with pytest.raises(UsageError, match=r"pad must be at least 0"):
        Augment(pad=-1)

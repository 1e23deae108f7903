"""Pixels: decoding, channels and sizes agree with Pillow and torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from sparse_robust.data.images import fit, resize, to_channels, to_tensor, to_unit
from sparse_robust.errors import UsageError
from tests.data.pictures import picture


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_8_bit_mode_is_decoded_as_pillow_does(mode: str, channels: int) -> None:
    image = picture(0, (5, 7)).convert(mode)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    got = to_tensor(image, channels)
    assert got.shape == (channels, 5, 7) and got.dtype == torch.uint8
    assert np.array_equal(got.permute(1, 2, 0).numpy().squeeze(), expected)


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_wider_pixels_are_refused(mode: str) -> None:
    with pytest.raises(UsageError, match=f"8 bits a channel, got an image of mode '{mode}'"):
        to_tensor(Image.new(mode, (4, 4)), 1)


def test_channels_are_converted_as_pillow_does() -> None:
    colour = noise(9, 3, 5, 4)
    for image, grey in zip(colour, to_channels(colour, 1), strict=True):
        assert np.array_equal(np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")), grey[0].numpy())
    grey = noise(2, 1, 3, 3)
    assert torch.equal(to_channels(grey, 3), grey.repeat(1, 3, 1, 1))
    assert to_channels(grey, 1) is grey


@pytest.mark.parametrize("size", [(8, 8, 28), (32, 32, 224), (300, 200, 224), (20, 31, 16)])
@pytest.mark.parametrize("crop", [1.0, 0.875])
def test_fit_is_resize_and_centre_crop(size: tuple[int, int, int], crop: float) -> None:
    height, width, side = size
    images = noise(2, 3, height, width)
    resized = reference.resize(images, [int(side / crop + 1e-6)], antialias=True)
    expected = reference.center_crop(resized, [side, side])
    got = fit(images, (side, side), crop)
    assert got.shape == (2, 3, side, side)
    assert torch.equal(got, expected)


def test_the_path_of_other_devices_differs_by_at_most_one_level() -> None:
    images = noise(2, 3, 9, 9)
    wide = torch.nn.functional.interpolate(images.float(), (20, 20), mode="bilinear", antialias=True)
    assert (resize(images, 20, 20).float() - wide.round().clamp(0, 255)).abs().max() <= 1


def test_unit_range_is_exact() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(levels)
    assert unit.dtype == torch.float32 and float(unit.min()) == 0 and float(unit.max()) == 1
    assert torch.equal((unit * 255).round().to(torch.uint8), levels)
    assert torch.equal(unit, torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(255)))

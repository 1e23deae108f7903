"""Corruptions by processing."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.evaluation.corruptions.basics import Draws, gaussian_blur, image_by_image, reflect

# The least area that the affine map of an elastic transform may leave of a unit square: it is inverted.
LEAST_AREA = 0.05


def brightness(x: Tensor, level: float, draws: Draws) -> Tensor:
    """The largest channel of each pixel raised by ``level``, up to 1, with hue and saturation as they were."""
    value = x.amax(1, keepdim=True)
    raised = (value + level).clamp(max=1)
    return torch.where(value > 0, x / value.clamp(min=torch.finfo(x.dtype).tiny), 1) * raised


def contrast(x: Tensor, level: float, draws: Draws) -> Tensor:
    """Each channel drawn towards its mean over the image."""
    means = image_by_image(lambda image: image.mean((1, 2), keepdim=True), x)
    return (x - means) * level + means


def elastic_transform(x: Tensor, level: tuple[float, float, float], draws: Draws) -> Tensor:
    """An affine map that moves three points at random, then a smooth random displacement of every pixel."""
    strength, smoothness, reach = (share * min(x.shape[-2:]) for share in level)
    x = _affine(x, (2 * draws.uniform(3, 2) - 1) * reach)
    shifts = 2 * draws.uniform(2, *x.shape[-2:]) - 1
    if smoothness:
        shifts = gaussian_blur(shifts, smoothness, truncate=3, border=reflect)
    return _sample(x, *(_grid(x) + strength * shifts).unbind(1), mirrored_at_edge_pixel=False)


def _grid(x: Tensor) -> Tensor:
    """Return the position of every pixel, right and down, [2, H, W]."""
    height, width = (torch.arange(size, dtype=x.dtype, device=x.device) for size in x.shape[-2:])
    return torch.stack(torch.meshgrid(height, width, indexing="ij")[::-1])


def _affine(x: Tensor, moves: Tensor) -> Tensor:
    """Return images moved so that three corners of a central square go along ``moves`` [n, 3, 2] (right, down)."""
    height, width = x.shape[-2:]
    half = max(1, min(height, width) // 3)
    centre = torch.tensor([width // 2, height // 2], dtype=x.dtype, device=x.device)
    corners = torch.tensor([[half, half], [half, -half], [-half, -half]], dtype=x.dtype, device=x.device) + moves
    # Where one pixel to the right, and one down, goes to.
    right, down = (corners[:, 1] - corners[:, 2]) / (2 * half), (corners[:, 0] - corners[:, 1]) / (2 * half)
    area = right[:, 0] * down[:, 1] - right[:, 1] * down[:, 0]
    area = torch.where(area < 0, area.clamp(max=-LEAST_AREA), area.clamp(min=LEAST_AREA)).view(-1, 1, 1)
    origin = centre + (corners[:, 0] + corners[:, 2]) / 2
    offset = [_grid(x)[axis] - origin[:, axis].view(-1, 1, 1) for axis in (0, 1)]
    (rx, ry), (dx, dy) = ([axis.view(-1, 1, 1) for axis in vector.unbind(1)] for vector in (right, down))
    columns = (dy * offset[0] - dx * offset[1]) / area + centre[0]
    rows = (rx * offset[1] - ry * offset[0]) / area + centre[1]
    return _sample(x, columns, rows, mirrored_at_edge_pixel=True)


def _sample(x: Tensor, columns: Tensor, rows: Tensor, *, mirrored_at_edge_pixel: bool) -> Tensor:
    """Return images read at positions in pixels, [n, H, W] each, interpolated bilinearly and mirrored at the border."""
    height, width = x.shape[-2:]
    if mirrored_at_edge_pixel:
        scaled = [2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1]
    else:
        scaled = [(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1]
    grid = torch.stack(scaled, 3)
    return F.grid_sample(x, grid, "bilinear", "reflection", align_corners=mirrored_at_edge_pixel)


def pixelate(x: Tensor, level: float, draws: Draws) -> Tensor:
    """Large pixels: box means at ``level`` times the size, enlarged again without smoothing."""
    from PIL import Image

    height, width = x.shape[-2:]
    small = (max(1, int(width * level)), max(1, int(height * level)))
    read = [
        np.asarray(
            Image.fromarray(plane).resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX)
        )
        for plane in x.flatten(0, 1).float().cpu().numpy()
    ]
    return torch.from_numpy(np.stack(read)).view(x.shape).to(x)


def jpeg_compression(x: Tensor, level: int, draws: Draws) -> Tensor:
    """Written as JPEG with the quality ``level`` and read again, in 8 bits; colour is stored at half the resolution.

    Images with other than one or three channels are written channel by channel.
    """
    if x.shape[1] not in (1, 3):
        return jpeg_compression(x.flatten(0, 1)[:, None], level, draws).view_as(x)
    pixels = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    read = np.stack([_jpeg(image, level) for image in pixels])
    return torch.from_numpy(read).permute(0, 3, 1, 2).to(x) / 255


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Return an image uint8 [H, W, 1 or 3] after one write and read."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream)).reshape(image.shape)

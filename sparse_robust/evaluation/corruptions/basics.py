"""What corruptions are made of: draws by sample id, borders, kernels. Nothing here mixes the images of a batch.

Sums over pixels go image by image where a library chooses their order by the size of the batch, so that an image comes
out with the same bits in every batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_robust_kernels.rng import philox_uniform


class Draws:
    """Random numbers for one corruption at one severity, a function of (key, severity, sample id, how many before).

    Args:
        ids: int64 [n].
        key: 64 bits.
        severity: 1 to 5.
        dtype: of what is returned.
    """

    def __init__(self, ids: Tensor, *, key: int, severity: int, dtype: torch.dtype) -> None:
        self.ids, self.key, self.stream, self.dtype = ids, key, severity << 16, dtype

    def uniform(self, *shape: int) -> Tensor:
        """Return numbers in [0, 1), [n, *shape]."""
        numel = torch.Size(shape).numel()
        drawn = philox_uniform(self.ids, numel, key=self.key, stream=self.stream).to(self.dtype)
        self.stream += 1
        return drawn.view(len(self.ids), *shape)

    def normal(self, *shape: int) -> Tensor:
        """Return numbers with mean 0 and standard deviation 1, [n, *shape]."""
        return torch.erfinv((2 * self.uniform(*shape) - 1) + 2**-24) * 2**0.5

    def between(self, low: float, high: float) -> Tensor:
        """Return a number in [low, high) for each image, [n]."""
        return low + (high - low) * self.uniform(1)[:, 0]


def image_by_image(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the function of each image [C, H, W], stacked. Each image lies in memory of its own."""
    return torch.stack([function(image.clone()) for image in x])


# --- borders: which pixel stands for one that lies outside, by position


def replicate(index: Tensor, size: int) -> Tensor:
    """Return positions with the edge pixel repeated: a a | a b c | c c."""
    return index.clamp(0, size - 1)


def reflect(index: Tensor, size: int) -> Tensor:
    """Return positions mirrored at the border between pixels: b a | a b c | c b."""
    index = index.remainder(2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


def reflect_101(index: Tensor, size: int) -> Tensor:
    """Return positions mirrored at the edge pixel: c b | a b c | b a."""
    period = max(1, 2 * (size - 1))
    index = index.remainder(period)
    return torch.minimum(index, period - index) if size > 1 else torch.zeros_like(index)


Border = Callable[[Tensor, int], Tensor]


# --- filters


def correlate(x: Tensor, kernel: Tensor, border: Border) -> Tensor:
    """Return images [n, C, H, W] filtered with one kernel [2r + 1, 2r + 1], given in its precision."""
    radius = kernel.shape[0] // 2
    height, width = x.shape[-2:]
    rows, columns = (border(torch.arange(-radius, size + radius, device=x.device), size) for size in (height, width))
    padded, result = x[:, :, rows][..., columns], torch.zeros_like(x)
    for top, weights in enumerate(kernel.tolist()):
        for left, weight in enumerate(weights):
            if weight:
                result.add_(padded[:, :, top : top + height, left : left + width], alpha=weight)
    return result


def gaussian_matrix(size: int, sigma: float, *, truncate: float, border: Border, like: Tensor) -> Tensor:
    """Return the matrix [size, size] that smooths along an axis with a Gaussian cut off at truncate * sigma."""
    radius = int(truncate * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, device=like.device)
    weights = torch.exp(-0.5 * (offsets.double() / max(sigma, 1e-12)) ** 2)
    places = border(torch.arange(size, device=like.device)[:, None] + offsets, size)
    matrix = torch.zeros(size, size, dtype=torch.float64, device=like.device)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(size, -1)).to(like.dtype)


def gaussian_blur(x: Tensor, sigma: float, *, truncate: float, border: Border) -> Tensor:
    """Return images smoothed with a Gaussian of standard deviation ``sigma`` pixels."""
    rows, columns = (gaussian_matrix(size, sigma, truncate=truncate, border=border, like=x) for size in x.shape[-2:])
    return image_by_image(lambda image: rows @ image @ columns.T, x)


def smear(x: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Return images smeared to one side, along an angle of their own.

    A Gaussian's right half, 2 * radius + 1 pixels long, on whole pixels; beyond the border the edge pixel is repeated.
    This is ImageMagick's MotionBlurImage.

    Args:
        x: [n, C, H, W].
        degrees: [n].
    """
    steps = torch.arange(2 * radius + 1, dtype=torch.float64, device=x.device)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    angle = torch.deg2rad(degrees.double())[:, None]
    down, right = (torch.ceil(steps * part - 0.5).long() for part in (torch.sin(angle), torch.cos(angle)))
    n, channels, height, width = x.shape
    flat, result = x.flatten(2), torch.zeros_like(x)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        rows, columns = (
            replicate(torch.arange(size, device=x.device) + shift[:, step, None], size)
            for size, shift in ((height, down), (width, right))
        )
        places = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, -1).expand(-1, channels, -1)
        result.add_(flat.gather(2, places).view_as(x), alpha=weight)
    return result


def centre_zoom(x: Tensor, factor: float) -> Tensor:
    """Return the centre of images enlarged by ``factor`` of at least 1, at the size they had."""
    height, width = x.shape[-2:]
    crops = [-int(-size // factor) for size in (height, width)]
    top, left = (height - crops[0]) // 2, (width - crops[1]) // 2
    crop = x[:, :, top : top + crops[0], left : left + crops[1]].contiguous()
    size = [max(full, round(part * factor)) for full, part in zip((height, width), crops, strict=True)]
    large = torch.nn.functional.interpolate(crop, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return large[:, :, top : top + height, left : left + width]

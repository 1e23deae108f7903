"""The first convolution of a network for grey images, with a faster gradient with respect to the images.

oneDNN's gradient with respect to a convolution's input works on blocks of channels, and takes as long for one channel
as for sixteen: on networks for grey images it was 30 to 45 % of an attack's gradient. A product of matrices for each
image, and the sum of its overlapping patches, took a fifth of it (64 channels of 7x7 at 28x28: 2.4 instead of 11.8 ms;
16 of 4x4: 0.45 instead of 2.45). With three channels neither was the faster one throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Products of fewer rows take other routes in the library, whose rounding depends on where in memory an image lies: seen
# with up to 3 taps, and never with 4 and more.
FEWEST_TAPS = 9


class GreyConv2d(nn.Conv2d):
    """A convolution of frozen weights over one channel: the output of nn.Conv2d; its input gradient up to rounding.

    An image's gradient does not depend on its batch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of images [n, 1, H, W]."""
        if not (torch.is_grad_enabled() and input.requires_grad):
            return super().forward(input)
        return _GreyConvolution.apply(input, self.weight, self.bias, self.stride, self.padding, self.dilation)


class _GreyConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None,
        stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(weight)
        ctx.size, ctx.geometry = images.shape[2:], (dilation, padding, stride)
        return F.conv2d(images, weight, bias, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (weight,) = ctx.saved_tensors
        patches = weight.flatten(1).t().expand(len(grad), -1, -1) @ grad.flatten(2)  # [n, taps, places]
        images = F.fold(patches, ctx.size, weight.shape[2:], *ctx.geometry)
        return images, None, None, None, None, None


def quicken(module: nn.Module) -> None:
    """Make the convolutions of a frozen float32 module on the CPU that have one input channel a `GreyConv2d`.

    Those with very small kernels stay what they are.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.in_channels == 1 and layer.weight.dtype == torch.float32:
            plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
            if plain and layer.weight[0].numel() >= FEWEST_TAPS and layer.weight.device.type == "cpu":
                layer.__class__ = GreyConv2d

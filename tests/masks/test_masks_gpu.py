"""Masks and selection on a GPU give the bits that a CPU gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparse_robust.masks import Masks, cut
from sparse_robust_kernels import select
from sparse_robust_kernels.masks import count_bits, pack_bits, unpack_bits, zero_

pytestmark = pytest.mark.gpu


def test_packing() -> None:
    keep = torch.rand(100_003) > 0.3
    packed = pack_bits(keep)
    assert torch.equal(pack_bits(keep.cuda()).cpu(), packed)
    assert torch.equal(unpack_bits(packed.cuda(), keep.numel()).cpu(), keep)
    assert int(count_bits(packed.cuda())) == int(keep.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeroing(dtype: torch.dtype) -> None:
    keep = torch.rand(100_003) > 0.3
    tensor = torch.randn(100_003).to(dtype)
    there = tensor.cuda()
    zero_([tensor], [keep])
    zero_([there], [keep.cuda()])
    assert torch.equal(tensor, there.cpu()) and not there[~keep.cuda()].signbit().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("magnitude", [True, False])
def test_selection(dtype: torch.dtype, magnitude: bool) -> None:
    tensors = [torch.randn(3_000_017).to(dtype), torch.randn(1000, 77).round().to(dtype)]
    keep = [pack_bits(torch.rand(tensor.numel()) > 0.5) for tensor in tensors]
    there, kept_there = [tensor.cuda() for tensor in tensors], [bits.cuda() for bits in keep]
    for count in (1, 700_000, 1_500_000):
        assert select.kth(tensors, count, keep, magnitude=magnitude) == select.kth(
            there, count, kept_there, magnitude=magnitude
        )
        here = select.remove_lowest(tensors, count, keep, magnitude=magnitude)
        gpu = select.remove_lowest(there, count, kept_there, magnitude=magnitude)
        assert all(torch.equal(a, b.cpu()) for a, b in zip(here, gpu, strict=True))


def test_masks_of_a_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 2))
    there = copy.deepcopy(model).cuda().to(memory_format=torch.channels_last)
    masks = cut({n: p for n, p in model.named_parameters() if p.dim() == 4}, 1000, magnitude=True)
    assert masks == cut({n: p for n, p in there.named_parameters() if p.dim() == 4}, 1000, magnitude=True)
    assert masks <= Masks.full(there) and masks.on("0.weight", "cuda").device.type == "cuda"
    masks.apply_(model)
    masks.apply_(there)
    for ours, theirs in zip(model.parameters(), there.parameters(), strict=True):
        assert torch.equal(ours, theirs.cpu())

"""Bit masks: packing against NumPy, and zeroing that leaves +0.0 whatever was there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_robust_kernels import backends
from sparse_robust_kernels.masks import count_bits, pack_bits, unpack_bits, zero_


@given(st.lists(st.booleans(), max_size=70))
def test_packing_is_numpys_little_endian_order_and_comes_back(flags: list[bool]) -> None:
    keep = torch.tensor(flags, dtype=torch.bool)
    packed = pack_bits(keep)
    assert packed.numpy().tobytes() == np.packbits(keep.numpy(), bitorder="little").tobytes()
    assert torch.equal(unpack_bits(packed, len(flags)), keep)
    assert int(count_bits(packed)) == sum(flags)


def test_every_byte_is_counted() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    counts = [int(count_bits(every[i : i + 1])) for i in range(256)]
    assert counts == [i.bit_count() for i in range(256)]
    assert int(count_bits(torch.full((10_000,), 255, dtype=torch.uint8))) == 80_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_zero_leaves_positive_zero_and_touches_nothing_else(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    tensor = torch.randn(3, 5, 3, 3).to(dtype).to(memory_format=memory_format)
    keep = torch.rand(3, 5, 3, 3) > 0.5
    tensor[~keep] = torch.tensor([-1.0, float("inf"), float("nan"), -0.0], dtype=dtype).repeat(40)[: int((~keep).sum())]
    before = tensor.clone()
    zero_([tensor], [keep])
    pruned = tensor[~keep]
    assert (pruned == 0).all() and not pruned.signbit().any()
    assert torch.equal(tensor[keep], before[keep])
    assert tensor.is_contiguous(memory_format=memory_format)


def test_zero_keeps_nan_and_negative_zero_of_kept_values() -> None:
    tensor = torch.tensor([float("nan"), -0.0, float("inf"), -1.0])
    zero_([tensor], [torch.tensor([True, True, True, False])])
    assert tensor[0].isnan() and tensor[1].signbit() and tensor[2].isinf() and tensor[3] == 0


def test_zero_works_on_a_leaf_that_requires_a_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    zero_([weight], [torch.tensor([True, False, True, False])])
    assert weight.tolist() == [1, 0, 1, 0] and weight.grad_fn is None
    zero_([], [])


@pytest.mark.usefixtures("poison")
def test_nothing_is_left_unwritten() -> None:
    keep = torch.tensor([True] * 9 + [False] * 4)
    packed = pack_bits(keep)
    assert packed.tolist() == [255, 1]
    assert torch.equal(unpack_bits(packed, 13), keep)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_bits(torch.ones(3)), "flat bool tensor, got torch.float32"),
        (lambda: pack_bits(torch.ones(2, 2, dtype=torch.bool)), r"shape \(2, 2\)"),
        (lambda: unpack_bits(torch.zeros(2, dtype=torch.uint8), 17), "17 elements are packed in 3 bytes, got 2"),
        (lambda: unpack_bits(torch.zeros(2), 9), "flat uint8"),
        (lambda: count_bits(torch.zeros(2, 2, dtype=torch.uint8)), "flat uint8"),
        (lambda: zero_([torch.ones(2)], []), "1 tensors and 0 masks"),
        (lambda: zero_([torch.ones(2)], [torch.ones(3, dtype=torch.bool)]), r"tensor 0: shape \(2,\), but its mask"),
        (lambda: zero_([torch.ones(2)], [torch.ones(2)]), "a float and a bool mask"),
        (lambda: zero_([torch.ones(2).int()], [torch.ones(2, dtype=torch.bool)]), "a float and a bool mask"),
        (lambda: pack_bits(torch.ones(3, dtype=torch.bool), backend="nonesuch"), "no backend 'nonesuch'.*reference"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_the_reference_runs_everywhere() -> None:
    for op in ("masks.pack_bits", "masks.unpack_bits", "masks.count_bits", "masks.zero_"):
        assert "reference" in backends(op, "cpu") and "reference" in backends(op, "cuda")

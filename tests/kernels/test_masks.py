"""Bit masks: packing against NumPy, zeroing that leaves +0.0 whatever was there, masked copies, and their tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_robust_kernels import backends
from sparse_robust_kernels.masks import MaskTable, count_bits, masked_copy, pack_bits, unpack_bits, zero_


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


def transposed(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))


LAYOUTS = {
    "contiguous": torch.randn,
    "channels last": lambda shape: torch.randn(shape).contiguous(memory_format=torch.channels_last),
    "transposed": transposed,
    "with gaps": lambda shape: torch.randn(*shape, 2)[..., 0],
    "a view": lambda shape: torch.randn(torch.Size(shape).numel() + 3)[3:].view(shape),
}


@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (4, 1, 1, 7), (1, 6, 2, 1), (0, 3, 1, 1)])
def test_a_table_serves_tensors_of_any_layout(shape: tuple[int, ...], layout: str, other: str) -> None:
    keep = torch.rand(shape) > 0.5
    table = MaskTable([keep], [LAYOUTS[layout](shape)])
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float32):  # masks are widened and narrowed
        tensor = LAYOUTS[other](shape).to(dtype, memory_format=torch.preserve_format)
        expected, stride = tensor.where(keep, 0.0), tensor.stride()
        zero_([tensor], table)
        assert torch.equal(tensor, expected) and not tensor[~keep].signbit().any() and tensor.stride() == stride


def test_a_table_numbers_words_and_blocks_in_the_order_of_memory() -> None:
    weight = torch.empty(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    keep = torch.rand(weight.shape) > 0.5
    long = torch.rand(5000) > 0.5
    table = MaskTable([keep, None, long], [weight, torch.empty(0), torch.empty(5000)])
    in_memory = keep.permute(0, 2, 3, 1).reshape(-1)
    bits = unpack_bits(table.words.reshape(-1).view(torch.uint8), 32 * table.words.numel())
    assert torch.equal(bits[:24], in_memory) and not bits[24:2048].any()
    assert torch.equal(bits[2048:7048], long) and not bits[7048:].any()
    assert table.blocks.tolist() == [[0, 0], [2, 0], [2, 1], [2, 2]] and table.sizes.tolist() == [24, 0, 5000]
    assert table.words.numel() * 4 == 4 * 2048 // 8 and len(table) == 3


def test_a_table_leaves_out_what_is_not_there() -> None:
    weights = [torch.ones(3), torch.ones(4)]
    table = MaskTable([torch.zeros(3, dtype=torch.bool), None], weights)
    zero_([None, weights[1]], table)
    assert weights[0].all() and weights[1].all()
    zero_(weights, table)
    assert not weights[0].any() and weights[1].all()
    zero_([], MaskTable([], []))


@pytest.mark.parametrize("want", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_masked_copy_is_the_rounded_weight_where_it_is_kept(layout: str, want: torch.dtype) -> None:
    source = torch.nn.Parameter(torch.randn(4, 3, 2, 2))
    special = torch.tensor([float("nan"), float("inf"), -1.0, -0.0])
    source.data[:, 0, 0, 0] = special
    keep = torch.rand(source.shape) > 0.5
    keep[:, 0, 0, 0] = False
    target, whole = LAYOUTS[layout]((4, 3, 2, 2)).to(want), torch.full((4, 3, 2, 2), float("nan"), dtype=want)
    masked_copy([source, source], [keep, None], [target, whole])
    assert torch.equal(target, source.detach().to(want).where(keep, 0.0)) and not target[~keep].signbit().any()
    assert torch.equal(whole.nan_to_num(7.0), source.detach().to(want).nan_to_num(7.0)) and not target.requires_grad


@pytest.mark.parametrize("want", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_multiplied_before_they_are_rounded(layout: str, want: torch.dtype) -> None:
    source, scale = torch.nn.Parameter(torch.randn(4, 3, 2, 2)), torch.nn.Parameter(torch.randn(4))
    keep = torch.rand(source.shape) > 0.5
    target, whole = LAYOUTS[layout]((4, 3, 2, 2)).to(want), torch.empty(4, 3, 2, 2, dtype=want)
    masked_copy([source, source], [keep, None], [target, whole], scales=[scale, None])
    rows = zip(source.detach().flatten(1), scale.detach(), strict=True)
    product = torch.tensor([[*(w * s for w in row)] for row, s in rows])
    assert torch.equal(target, product.view(source.shape).to(want).where(keep, 0.0))
    assert torch.equal(whole, source.detach().to(want)) and not target.requires_grad


def test_a_masked_copy_to_bf16_rounds_to_the_nearest_and_to_even() -> None:
    halfway = 1 + 2.0**-8
    source = torch.tensor([halfway, halfway + 2.0**-20, 1 + 3 * 2.0**-8, -halfway, 3.4e38])
    target = torch.empty(5, dtype=torch.bfloat16)
    masked_copy([source], [None], [target])
    assert target.tolist() == [1, 1 + 2.0**-7, 1 + 2.0**-6, -1, float("inf")]


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
        (lambda: MaskTable([], [torch.ones(2)]), "1 tensors and 0 masks"),
        (lambda: zero_([None], [torch.ones(2, dtype=torch.bool)]), "tensor 0 is None: make a MaskTable"),
        (
            lambda: zero_([torch.ones(2)], MaskTable([None], [torch.ones(3)])),
            r"tensor 0: shape \(2,\), but its mask \(3,\)",
        ),
        (lambda: zero_([], MaskTable([None], [torch.ones(3)])), "masks of 1 tensors, got 0"),
        (lambda: zero_([torch.ones(3).int()], MaskTable([None], [torch.ones(3)])), "expected a float, got torch.int32"),
        (lambda: zero_([torch.ones(3, device="meta")], MaskTable([None], [torch.ones(3)])), "on meta, its mask on cpu"),
        (lambda: masked_copy([torch.ones(2)], [None], []), "one target a source, got 1 and 0"),
        (lambda: masked_copy([torch.ones(2)], [None], [torch.ones(3)]), r"shape \(2,\), but its mask \(3,\)"),
        (
            lambda: masked_copy([torch.ones(2)], [None], [torch.ones(2)], scales=[]),
            "one scale, or None, a source, got 0",
        ),
        (
            lambda: masked_copy([torch.ones(2)], [None], [torch.ones(2)], scales=[torch.ones(3)]),
            r"tensor 0: its scale must be torch.float32 \(2,\) on cpu, got torch.float32 \(3,\)",
        ),
        (
            lambda: masked_copy([torch.ones(2)], [None], [torch.ones(2)], scales=[torch.ones(2).double()]),
            "must be torch.float32 .* got torch.float64",
        ),
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
    for op in ("masks.pack_bits", "masks.unpack_bits", "masks.count_bits", "masks.zero_", "masks.masked_copy"):
        assert "reference" in backends(op, "cpu") and "reference" in backends(op, "cuda")

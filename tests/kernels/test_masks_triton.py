"""The kernels of masks: interpreted against the reference, compiled for an H200 without one, and run on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparse_robust_kernels.masks import MaskTable, count_bits, masked_copy, pack_bits, unpack_bits, zero_
from sparse_robust_kernels.masks.table import LONGEST_ROW

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language

from sparse_robust_kernels.masks.triton import row_of  # noqa: E402
from tests.kernels.harness import compile_sm90, interpret  # noqa: E402

LENGTHS = [1, 7, 31, 32, 33, 1000, 1025, 2047, 2048, 2049, 8191, 20_000]
SHAPES = [(1,), (7,), (3, 5, 3, 3), (64, 33), (65, 33, 1, 1), (0,), (2049,), (8, 64, 3, 3), (), (4096,)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    integer = BITS.get(ours.element_size(), ours.dtype) if ours.is_floating_point() else ours.dtype
    return ours.shape == theirs.shape and torch.equal(ours.view(integer).cpu(), theirs.view(integer).cpu())


def every_kind(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Values of all magnitudes and signs, with zeros of both signs, infinities and numbers below the normal ones."""
    values = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-44, 38, shape)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-40, 3.3895313892515355e38])
    chosen = special[torch.randint(len(special), shape)].double()
    return torch.where(torch.rand(shape) < 0.2, chosen, values).to(dtype)


def check_packing(device: str) -> None:
    for numel in LENGTHS:
        keep = torch.rand(numel) < 0.4
        packed = pack_bits(keep, "reference")
        ours = pack_bits(keep.to(device), "triton")
        assert same(ours, packed), numel
        assert same(unpack_bits(ours, numel, "triton"), keep), numel
        assert same(unpack_bits(packed.to(device), numel, "triton"), keep), numel
        assert int(count_bits(packed.to(device), "triton")) == int(keep.sum()), numel
    for shift in (1, 3, 8):  # a view that begins anywhere, and one with gaps
        keep = torch.rand(5000) < 0.4
        packed = pack_bits(keep, "reference")
        assert same(pack_bits(keep.to(device)[shift:], "triton"), pack_bits(keep[shift:], "reference"))
        part = packed[shift:101]
        numel = 8 * len(part) - 3
        assert same(unpack_bits(packed.to(device)[shift:101], numel, "triton"), unpack_bits(part, numel, "reference"))
        assert int(count_bits(packed.to(device)[shift:], "triton")) == int(count_bits(packed[shift:], "reference"))
    assert same(pack_bits(keep.to(device)[::2], "triton"), pack_bits(keep[::2], "reference"))
    assert (
        pack_bits(keep[:0].to(device), "triton").shape == (0,) and int(count_bits(packed[:0].to(device), "triton")) == 0
    )
    assert unpack_bits(packed[:0].to(device), 0, "triton").shape == (0,)
    every_word = torch.arange(65_536).to(torch.uint16).view(torch.uint8)
    assert int(count_bits(every_word.to(device), "triton")) == 16 * 32_768
    flags = unpack_bits(every_word.to(device), 16 * 65_536, "triton")
    assert same(flags, unpack_bits(every_word, 16 * 65_536, "reference"))
    assert same(pack_bits(flags, "triton"), every_word)


def laid_out(shape: tuple[int, ...], index: int) -> torch.memory_format:
    return torch.channels_last if len(shape) == 4 and index % 2 == 0 else torch.contiguous_format


def check_zeroing(device: str) -> None:
    for dtypes in [[torch.float32], [torch.bfloat16], DTYPES]:
        tensors = [
            every_kind(shape, dtypes[i % len(dtypes)]).contiguous(memory_format=laid_out(shape, i))
            for i, shape in enumerate(SHAPES)
        ]
        keep = [torch.rand(shape) < 0.3 for shape in SHAPES]
        there = [tensor.to(device, copy=True) for tensor in tensors]
        table = MaskTable([mask.to(device) for mask in keep], there)
        zero_(there, table, "triton")
        zero_(tensors, keep, "reference")
        assert all(same(a, b) for a, b in zip(there, tensors, strict=True))


def check_zeroing_of_some(device: str) -> None:
    """Gradients that are not there, that lie otherwise than their weights, and that begin anywhere in a bucket."""
    shapes = [(3, 5, 3, 3), (70,), (64, 64, 3, 3), (33, 65)]
    keep = [torch.rand(shape) < 0.3 for shape in shapes]
    table = MaskTable([mask.to(device) for mask in keep], [torch.empty(shape, device=device) for shape in shapes])
    bucket = torch.randn(sum(mask.numel() for mask in keep) + 1, device=device)
    views = bucket[1:].split([mask.numel() for mask in keep])
    tensors: list[Tensor | None] = [view.view(shape) for view, shape in zip(views, shapes, strict=True)]
    tensors[1] = None
    tensors[2] = torch.randn(shapes[2], device=device).contiguous(memory_format=torch.channels_last)
    tensors[3] = torch.randn(65, 33, device=device).t()
    before = [None if tensor is None else tensor.cpu() for tensor in tensors]
    first, gap = bucket[:1].cpu(), views[1].cpu()
    zero_(tensors, table, "triton")
    for tensor, mask, old in zip(tensors, keep, before, strict=True):
        assert tensor is None or (old is not None and same(tensor, torch.where(mask, old, 0.0)))
    assert same(bucket[:1], first) and same(views[1], gap), "nothing beside the tensors is written"
    zero_([None] * 4, table, "triton")
    zero_([], MaskTable([], []), "triton" if device == "cpu" else "auto")


def check_copying(device: str) -> None:
    for have, want in [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        *zip(DTYPES, DTYPES, strict=True),
    ]:
        sources = [every_kind(shape, have) for shape in SHAPES]
        sources[1][0], sources[3][1] = float("nan"), float("nan")
        keep = [None if i % 4 == 3 else torch.rand(shape) < 0.5 for i, shape in enumerate(SHAPES)]
        expected = [
            torch.empty(shape, dtype=want).contiguous(memory_format=laid_out(shape, i))
            for i, shape in enumerate(SHAPES)
        ]
        theirs = [tensor.to(device, copy=True) for tensor in expected]
        masked_copy(sources, keep, expected, "reference")
        table = MaskTable([None if mask is None else mask.to(device) for mask in keep], theirs)
        masked_copy([source.to(device) for source in sources], table, theirs, "triton")
        for ours, reference in zip(theirs, expected, strict=True):
            assert torch.equal(ours.isnan().cpu(), reference.isnan())
            assert same(ours.nan_to_num(1.0), reference.nan_to_num(1.0)), (have, want)
            assert ours.stride() == reference.stride()


def check_scaling(device: str) -> None:
    """Rows of any length, also where a block begins within one; tensors with and without numbers in one launch."""
    shapes = [(7,), (5, 3), (3, 5, 3, 3), (64, 33), (1, 4096), (70, 1), (2, 5000), (33, 8, 3, 3), (4100, 2)]
    for have, want in [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]:
        sources = [torch.randn(shape, dtype=have) * 3 for shape in shapes]
        scales = [None if i % 4 == 1 else torch.randn(len(source)) for i, source in enumerate(sources)]
        scales[2], sources[5][3, 0] = torch.tensor([0.0, float("nan"), float("inf")]), float("inf")
        keep = [None if i % 3 == 1 else torch.rand(shape) < 0.5 for i, shape in enumerate(shapes)]
        expected = [
            torch.empty(shape, dtype=want).contiguous(memory_format=laid_out(shape, i))
            for i, shape in enumerate(shapes)
        ]
        expected[3] = torch.empty(33, 64, dtype=want).t()  # rows lie side by side: no kernel
        theirs = [torch.empty_like(tensor, device=device) for tensor in expected]
        masked_copy(sources, keep, expected, "reference", scales=scales)
        there = [None if scale is None else scale.to(device) for scale in scales]
        table = MaskTable([None if mask is None else mask.to(device) for mask in keep], theirs)
        masked_copy([source.to(device) for source in sources], table, theirs, "triton", scales=there)
        for ours, reference in zip(theirs, expected, strict=True):
            assert torch.equal(ours.isnan().cpu(), reference.isnan())
            assert same(ours.nan_to_num(1.0), reference.nan_to_num(1.0)), want
            assert ours.stride() == reference.stride()


def check_rounding(device: str) -> None:
    """Every upper half of a float, with the lower halves around which rounding turns."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    for low in lower:
        source = (upper | low).view(torch.float32)
        target = torch.empty(len(source), dtype=torch.bfloat16, device=device)
        masked_copy([source.to(device)], [None], [target], "triton")
        expected, nan = source.to(torch.bfloat16), source.isnan()
        assert same(target[~nan.to(device)], expected[~nan]) and target[nan.to(device)].isnan().all()


CHECKS: list[Callable[[str], None]] = [
    check_packing,
    check_zeroing,
    check_zeroing_of_some,
    check_copying,
    check_scaling,
]


@interpret
@pytest.mark.parametrize("check", range(len(CHECKS)))
def test_interpreted(check: int) -> None:
    CHECKS[check]("cpu")


@triton.jit
def find(places, reciprocals, rows, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = row_of(tl.load(places + i, mask=i < n, other=0), tl.load(reciprocals + i, mask=i < n, other=1.0))
    tl.store(rows + i, found, mask=i < n)


@interpret
def test_interpreted_rows_are_found_by_a_product() -> None:
    """At both ends of every row that begins in a block, wherever in a row the block begins."""
    lengths = torch.cat([torch.arange(1, 3000), torch.randint(3000, LONGEST_ROW, (3000,)), torch.tensor([LONGEST_ROW])])
    starts = [torch.arange(int(length + 2047) // int(length) + 2) * length for length in lengths]
    places = torch.cat(
        [torch.cat([start - 1, start]).clamp(0, int(n) + 2047) for start, n in zip(starts, lengths, strict=True)]
    )
    of = torch.cat([length.expand(2 * len(start)) for start, length in zip(starts, lengths, strict=True)])
    rows = torch.empty(len(of), dtype=torch.int32)
    find[(triton.cdiv(len(of), 1 << 14),)](places.int(), 1 / of.float(), rows, len(of), BLOCK=1 << 14)
    assert torch.equal(rows.long(), places // of)


@pytest.mark.slow
@interpret
def test_interpreted_rounding_is_to_the_nearest_with_ties_to_even() -> None:
    check_rounding("cpu")


@interpret
def test_interpreted_types_that_no_kernel_converts_are_refused_by_name() -> None:
    source, target = torch.ones(3, dtype=torch.float64), torch.empty(3, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"'triton' on cpu for torch.float64 to torch.bfloat16; available there: auto, re"
    ):
        masked_copy([source], [None], [target], "triton")
    masked_copy([source], [None], [target])
    assert (target == 1).all()
    half = torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"'triton' on cpu for scaled torch.bfloat16; available there: auto, re"):
        masked_copy([half], [None], [half.clone()], "triton", scales=[half])


@interpret
def test_interpreted_operations_are_nodes_of_a_captured_graph() -> None:
    keep, weight = torch.rand(100) < 0.5, torch.randn(100)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def count(keep: Tensor) -> Tensor:
        packed = pack_bits(keep, "triton")
        return count_bits(packed, "triton") + unpack_bits(packed, 100, "triton").sum()

    assert int(count(keep)) == 2 * int(keep.sum())

    table = MaskTable([keep], [weight])

    @torch.compile(backend="aot_eager")
    def refresh(weight: Tensor) -> Tensor:
        target = torch.empty_like(weight, dtype=torch.bfloat16)
        masked_copy([weight], table, [target], "triton")
        return target * 2

    assert same(refresh(weight), torch.where(keep, weight.bfloat16(), 0.0) * 2)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [*CHECKS, check_rounding])
def test_on_a_gpu(check: Callable[[str], None]) -> None:
    check("cuda")


@pytest.mark.gpu
def test_a_graph_captures_what_ran_once_before() -> None:
    weights = [torch.randn(shape, device="cuda") for shape in SHAPES]
    copies = [torch.full_like(weight, float("nan"), dtype=torch.bfloat16) for weight in weights]
    keep = [torch.rand(shape, device="cuda") < 0.5 for shape in SHAPES]
    table = MaskTable(keep, weights)
    masked_copy(weights, table, copies)
    zero_(weights, table)  # a kernel cannot be loaded in a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masked_copy(weights, table, copies)
        zero_(weights, table)
    for weight in weights:
        weight.normal_()
    expected = [torch.where(mask, weight.bfloat16(), 0.0) for mask, weight in zip(keep, weights, strict=True)]
    graph.replay()
    assert all(same(a, b) for a, b in zip(copies, expected, strict=True))
    assert all(not weight[~mask].any() for mask, weight in zip(keep, weights, strict=True))


def kernels() -> dict[str, tuple[str, dict[str, str], dict[str, object], int]]:
    """Kernel, types, constants, and the most registers it may use, by name."""
    import triton.language as tl

    from sparse_robust_kernels.masks.triton import COUNTED, HALVES, WORDS

    table = {"sizes": "*i64", "blocks": "*i32", "words": "*i32"}
    zero = {"addresses": "*i64", **table}
    copy = {"sources": "*i64", "targets": "*i64", "scales": "*i64", "lengths": "*i32", **table}
    whole = {"ALIGNED": True, "WORDS": WORDS}
    plain, scaled = {"SCALED": False, **whole}, {"SCALED": True, **whole}
    f32, f16 = tl.int32, tl.int16
    return {
        "zero 32 bits": ("zero_kernel", zero, {"INTEGER": f32, **whole}, 64),
        "zero 16 bits": ("zero_kernel", zero, {"INTEGER": f16, **whole}, 64),
        "copy fp32 to bf16": ("copy_kernel", copy, {"SOURCE": f32, "INTEGER": f16, "TARGET": "bf16", **plain}, 96),
        "copy fp32 to fp16": ("copy_kernel", copy, {"SOURCE": f32, "INTEGER": f16, "TARGET": "fp16", **plain}, 96),
        "copy fp32": ("copy_kernel", copy, {"SOURCE": f32, "INTEGER": f32, "TARGET": "same", **plain}, 96),
        "scaled to bf16": ("copy_kernel", copy, {"SOURCE": f32, "INTEGER": f16, "TARGET": "bf16", **scaled}, 96),
        "scaled fp32": ("copy_kernel", copy, {"SOURCE": f32, "INTEGER": f32, "TARGET": "same", **scaled}, 96),
        "pack": ("pack_kernel", {"keep": "*u8", "halves": "*i16", "numel": "i64"}, {"HALVES": HALVES}, 32),
        "unpack": ("unpack_kernel", {"halves": "*i16", "keep": "*u8", "numel": "i64"}, {"HALVES": HALVES}, 32),
        "count": ("count_kernel", {"words": "*i32", "count": "*i64", "numel": "i64"}, {"BLOCK": COUNTED}, 32),
    }


@pytest.mark.sm90
@pytest.mark.parametrize("name", kernels())
def test_machine_code_for_an_h200(name: str) -> None:
    """No spills, few registers, and 128-bit accesses of what is read and written whole, whatever the length."""
    from sparse_robust_kernels.masks import triton as module

    kernel, types, constants, registers = kernels()[name]
    compiled = compile_sm90(getattr(module, kernel), types, constants, unaligned=["numel"])
    assert compiled.spill_bytes == 0 and compiled.registers <= registers, compiled.registers
    # Before Triton 3.8, rows of a scaled copy change their layout on the way.
    assert compiled.shared_bytes <= (4096 if "scaled" in name else 1024)
    if name != "unpack":  # which reads an eighth of what it writes
        assert 128 in compiled.load_widths
    if name not in ("pack", "count"):  # which write an eighth of what they read, or next to nothing
        assert 128 in compiled.store_widths


@pytest.mark.sm90
def test_tensors_that_begin_anywhere_are_read_in_smaller_pieces() -> None:
    from sparse_robust_kernels.masks.triton import zero_kernel

    _, types, constants, _ = kernels()["zero 32 bits"]
    compiled = compile_sm90(zero_kernel, types, constants | {"ALIGNED": False})
    assert compiled.store_widths == {32} and compiled.spill_bytes == 0

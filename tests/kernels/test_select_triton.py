"""Selection in Triton against the reference, bit for bit: in the interpreter, as machine code, and on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from sparse_robust_kernels import select
from sparse_robust_kernels.masks import count_bits, pack_bits, unpack_bits

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language

from sparse_robust_kernels.select import triton as kernels  # noqa: E402
from tests.kernels.harness import Compiled, compile_sm90, interpret  # noqa: E402

NAN, INFINITY = float("nan"), float("inf")
TYPES = [torch.float32, torch.bfloat16, torch.float16]


def some(sizes: list[int], dtype: torch.dtype, kind: str, device: str = "cpu") -> list[Tensor]:
    """Tensors of odd sizes: ``ties`` have few values, ``wild`` ones zeros of both signs, subnormals and infinities."""
    tensors = [torch.randn(size) for size in sizes]
    if kind == "ties":
        tensors = [(tensor * 2).round() / 2 for tensor in tensors]
    if kind == "wild":
        odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 6e-8, 3e38, -3e38, INFINITY, -INFINITY])
        tensors = [torch.where(torch.rand_like(t) < 0.5, odd[torch.randint(9, t.shape)], t) for t in tensors]
    return [tensor.to(device, dtype) for tensor in tensors]


def masks_of(tensors: list[Tensor]) -> list[Tensor | None]:
    """A random mask for every other tensor; the first one has none."""
    keep = [pack_bits(torch.rand(tensor.numel()) > 0.4).to(tensor.device) for tensor in tensors]
    return [mask if index % 2 else None for index, mask in enumerate(keep)]


def check(tensors: list[Tensor], keep: list[Tensor | None], magnitude: bool) -> None:
    """Compare everything that selection returns, and every step of it, with the reference on the CPU."""
    cpu = [tensor.cpu() for tensor in tensors]
    cpu_keep = [None if mask is None else mask.cpu() for mask in keep]
    kept = [t.numel() if m is None else int(count_bits(m)) for t, m in zip(cpu, cpu_keep, strict=True)]
    for k in {1, max(sum(kept) // 3, 1), sum(kept)}:
        expected = select.kth(cpu, k, cpu_keep, magnitude=magnitude, backend="reference")
        assert select.kth(tensors, k, keep, magnitude=magnitude, backend="triton") == expected
        left = select.remove_lowest(tensors, k, keep, magnitude=magnitude, backend="triton")
        reference = select.remove_lowest(cpu, k, cpu_keep, magnitude=magnitude, backend="reference")
        for got, mask in zip(left, reference, strict=True):
            assert torch.equal(got.cpu(), mask)


@interpret
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["ties", "wild"])
def test_odd_shapes_equal_the_reference(kind: str, dtype: torch.dtype, magnitude: bool) -> None:
    tensors = some([1, 7, 0, 1000, 2048, 4095], dtype, kind)  # one less than whole blocks, too
    check(tensors, masks_of(tensors), magnitude)


@interpret
@pytest.mark.parametrize("take", [1, 6, 2049, 2600, 7430])
def test_ties_are_taken_in_order_over_blocks_and_tensors(take: int) -> None:
    tensors = [torch.ones(5), torch.ones(5000), torch.ones(4097), torch.zeros(3)]
    keep = [None, pack_bits(torch.arange(5000) % 3 != 0), None, None]
    left = select.remove_lowest(tensors, take, keep, backend="triton")
    expected = select.remove_lowest(tensors, take, keep, backend="reference")
    assert all(torch.equal(got, mask) for got, mask in zip(left, expected, strict=True))


@interpret
def test_zeros_of_both_signs_are_ties() -> None:
    tensors = [torch.tensor([0.0, -0.0, 1.0, -1.0, 0.0, -0.0])]
    assert select.kth(tensors, 3, magnitude=False, backend="triton") == (0.0, 1, 4)
    check(tensors, [None], False)
    left = select.remove_lowest(tensors, 2, magnitude=False, backend="triton")
    assert unpack_bits(left[0], 6).tolist() == [False, True, True, False, True, True]


@interpret
def test_a_program_counts_many_blocks() -> None:
    tensors = some([5000, 9, 3000], torch.float32, "ties")
    programs, kernels.PROGRAMS = kernels.PROGRAMS, 2
    try:
        check(tensors, masks_of(tensors), False)
    finally:
        kernels.PROGRAMS = programs


@interpret
def test_types_formats_and_addresses_may_be_mixed() -> None:
    """Channels-last, transposed and unaligned tensors; each type is another launch."""
    filters = torch.randn(9, 8, 3, 3).to(memory_format=torch.channels_last)
    tensors = [filters, torch.randn(30, 20).T, torch.randn(2500)[1:], torch.randn(100).half()]
    tensors += [torch.randn(3000).bfloat16(), torch.randn(8, 4)]
    check(tensors, masks_of(tensors), True)


@interpret
def test_nan_is_named_unless_it_is_pruned() -> None:
    smallest = torch.tensor([0x3F800000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    with pytest.raises(ValueError, match=r"NaN in tensor 0 \(1 values\)"):
        select.kth([smallest], 1, backend="triton")
    for dtype in TYPES:
        for sign in (1.0, -1.0):
            tensors = some([50, 40], dtype, "ties")
            tensors[1][7] = torch.copysign(torch.tensor(NAN), torch.tensor(sign))
            for magnitude in (True, False):
                with pytest.raises(ValueError, match=r"NaN in second \(1 values\)"):
                    select.kth(tensors, 3, magnitude=magnitude, names=["first", "second"], backend="triton")
            keep = [None, pack_bits(torch.arange(40) != 7)]
            left = select.remove_lowest(tensors, 30, keep, backend="triton")
            reference = select.remove_lowest(tensors, 30, keep, backend="reference")
            assert all(torch.equal(got, mask) for got, mask in zip(left, reference, strict=True))


@interpret
@pytest.mark.parametrize("magnitude", [True, False])
def test_what_removes_nothing_leaves_nan(magnitude: bool) -> None:
    tensors = [torch.cat([torch.tensor([NAN, -NAN, INFINITY, -INFINITY, 0.0, -0.0]), torch.randn(5000)])]
    keep: list[Tensor | None] = [pack_bits(torch.arange(5006) % 7 != 5)]
    for mask, expected in ((None, pack_bits(torch.ones(5006, dtype=torch.bool))), (keep[0], keep[0])):
        left = select.remove_lowest(tensors, 0, [mask], magnitude=magnitude, backend="triton")
        assert torch.equal(left[0], expected)


@interpret
@pytest.mark.parametrize("take", [4097, 8193, 9000])
def test_all_ties_of_a_block_go_or_stay_together(take: int) -> None:
    """Blocks that lie wholly before or behind the last tie that goes."""
    tensors = [torch.cat([torch.ones(9000), torch.full((4000,), 2.0)]).roll(100), torch.ones(4096)]
    for magnitude in (True, False):
        left = select.remove_lowest(tensors, take, magnitude=magnitude, backend="triton")
        expected = select.remove_lowest(tensors, take, magnitude=magnitude, backend="reference")
        assert all(torch.equal(got, mask) for got, mask in zip(left, expected, strict=True))


class Shards:
    """Threads that sum counts over each other as processes do, one of them running at a time."""

    def __init__(self, world: int) -> None:
        self.world, self.turn, self.barrier = world, threading.Lock(), threading.Barrier(world, timeout=60)
        self.slots: list[Tensor] = [torch.empty(0)] * world

    def reduce(self, rank: int, counts: Tensor) -> Tensor:
        self.slots[rank] = counts.clone()
        self.turn.release()
        self.barrier.wait()
        total = torch.stack(self.slots).sum(0)
        self.barrier.wait()
        self.turn.acquire()
        return total

    def run(self, function: Callable[[int, select.Reduce], list[Tensor]]) -> list[list[Tensor]]:
        def one(rank: int) -> list[Tensor]:
            with self.turn:
                return function(rank, partial(self.reduce, rank))

        with ThreadPoolExecutor(self.world) as pool:
            return list(pool.map(one, range(self.world)))


@interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_shards_gives_the_same_masks(dtype: torch.dtype) -> None:
    whole = some([5001, 3, 100], dtype, "ties")  # shards begin at any address, and some are empty
    alone = select.remove_lowest(whole, 1234, backend="reference")
    for world in (2, 5):
        shards = [[tensor.tensor_split(world)[rank] for tensor in whole] for rank in range(world)]

        def one(rank: int, reduce: select.Reduce) -> list[Tensor]:
            mine = shards[rank]  # noqa: B023  (called before the next turn of the loop)
            left = select.remove_lowest(mine, 1234, reduce=reduce, rank=rank, world=world, backend="triton")  # noqa: B023
            return [unpack_bits(bits, tensor.numel()) for bits, tensor in zip(left, mine, strict=True)]

        found = Shards(world).run(one)
        for index, tensor in enumerate(whole):
            joined = torch.cat([masks[index] for masks in found])
            assert torch.equal(joined, unpack_bits(alone[index], tensor.numel()))


@interpret
def test_what_cannot_be_honoured_is_refused() -> None:
    doubles = [torch.ones(3, dtype=torch.float64)]
    with pytest.raises(ValueError, match="no backend 'triton' on cpu for float64 values"):
        select.kth(doubles, 1, backend="triton")
    assert select.kth(doubles, 1) == (1.0, 0, 3)


COMMON = {"table": "*i64", "owners": "*i32"}
COUNTS_IN_REGISTERS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)


def compiled(name: str, dtype: tl.dtype, **more: bool) -> Compiled:
    """A kernel as it is launched; numbers are not known to be multiples of anything."""
    own: dict[str, dict[str, str]] = {
        "histogram": {"blocks": "i32", "counts": "*i64", "low": "i32", "shift": "i32"},
        "count": {"counts": "*i32", "key": "i32"},
        "remove": {"ties": "*i64", "key": "i32"},
    }
    options = {"TYPE": dtype, "ALIGNED": True, "BLOCK": kernels.BLOCK, **more}
    if name == "histogram":
        options["BINS"] = kernels.BINS
    numbers = [argument for argument, kind in own[name].items() if kind == "i32"]
    kernel = getattr(kernels, f"{name}_kernel")
    return compile_sm90(kernel, {**COMMON, **own[name]}, options, num_warps=kernels.WARPS, unaligned=numbers)


@pytest.mark.sm90
@pytest.mark.parametrize("dtype", [tl.float32, tl.bfloat16, tl.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "more", "registers"),
    [
        ("histogram", {"MAGNITUDE": True, "LATE": False}, 64),
        ("histogram", {"MAGNITUDE": False, "LATE": True}, 80),
        ("count", {"MAGNITUDE": True, "NAN": False}, 32),
        ("count", {"MAGNITUDE": True, "NAN": True}, 32),
        ("remove", {"MAGNITUDE": True, "TIES": False}, 40),
        ("remove", {"MAGNITUDE": False, "TIES": True}, 80),
    ],
)
def test_machine_code_needs_few_registers_and_reads_widely(
    name: str, more: dict[str, bool], registers: int, dtype: tl.dtype
) -> None:
    code = compiled(name, dtype, **more)
    if name == "histogram" and COUNTS_IN_REGISTERS:
        registers = 112
    assert code.registers <= registers and code.spill_bytes == 0
    assert code.shared_bytes <= 2048  # the bins, or bits of masks on their way to where the values are
    assert 128 in code.load_widths


@pytest.mark.gpu
@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", ["plain", "ties", "wild"])
def test_a_gpu_selects_as_the_reference(kind: str, dtype: torch.dtype, magnitude: bool, poison: None) -> None:
    tensors = some([1, 7, 0, 1000, 1_000_003, 4100, 3_000_000], dtype, kind, "cuda")
    check(tensors, masks_of(tensors), magnitude)
    filters = torch.randn(64, 32, 3, 3, device="cuda").to(dtype).to(memory_format=torch.channels_last)
    check([filters, *tensors], [None, *masks_of(tensors)], magnitude)

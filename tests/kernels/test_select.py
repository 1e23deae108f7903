"""Exact selection against a stable sort: any float type, signs, ties, infinities, masks and shards."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_robust_kernels import select
from sparse_robust_kernels.masks import pack_bits, unpack_bits
from sparse_robust_kernels.select import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

# Few distinct values, so that there are ties, and the awkward ones: both zeros, subnormals, extremes, infinities.
awkward = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.5, 3e38, -3e38, float("inf"), -float("inf")])
values = st.one_of(awkward, st.floats(width=32, allow_nan=False))
arrays = st.lists(st.lists(st.tuples(values, st.booleans()), max_size=30), min_size=1, max_size=4)


def by_sorting(tensors: list[Tensor], keep: list[Tensor], magnitude: bool) -> tuple[Tensor, Tensor]:
    """Return (sorted kept values, their places in the flattened whole), by one stable sort."""
    flat = torch.cat([t.reshape(-1).double() for t in tensors])
    kept = torch.cat([k.reshape(-1) for k in keep]).nonzero().view(-1)
    order = (flat.abs() if magnitude else flat)[kept].sort(stable=True)
    return order.values, kept[order.indices]


def check_against_sorting(tensors: list[Tensor], keep: list[Tensor], k: int, magnitude: bool) -> None:
    ordered, places = by_sorting(tensors, keep, magnitude)
    packed = [pack_bits(mask.reshape(-1)) for mask in keep]
    found = select.kth(tensors, k, packed, magnitude=magnitude)
    assert found == (ordered[k - 1], int((ordered < found.value).sum()), int((ordered == found.value).sum()))
    expected = torch.cat([mask.reshape(-1) for mask in keep])
    expected[places[:k]] = False
    left = select.remove_lowest(tensors, k, packed, magnitude=magnitude)
    got = [unpack_bits(bits, tensor.numel()) for bits, tensor in zip(left, tensors, strict=True)]
    assert torch.equal(torch.cat(got), expected)


@given(arrays, st.data(), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_kth_and_cut_equal_a_stable_sort(
    lists: list[list[tuple[float, bool]]], data: st.DataObject, magnitude: bool, dtype: torch.dtype
) -> None:
    tensors = [torch.tensor([value for value, _ in part], dtype=dtype) for part in lists]
    keep = [torch.tensor([kept for _, kept in part], dtype=torch.bool) for part in lists]
    total = sum(int(mask.sum()) for mask in keep)
    if total:
        check_against_sorting(tensors, keep, data.draw(st.integers(1, total)), magnitude)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [True, False])
def test_every_float_type_over_several_chunks(
    dtype: torch.dtype, magnitude: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK", 64)
    tensors = [torch.randn(37, 5).to(dtype), torch.randn(3, 4, 3, 3).to(dtype).to(memory_format=torch.channels_last)]
    tensors += [torch.randn(64).round().to(dtype), torch.randn(0, 3).to(dtype), torch.randn(1).to(dtype)]
    keep = [torch.rand(tensor.shape) > 0.3 for tensor in tensors]
    total = sum(int(mask.sum()) for mask in keep)
    for k in (1, 2, total // 3, total // 2, total - 1, total):
        check_against_sorting(tensors, keep, k, magnitude)


@pytest.mark.parametrize("take", [1, 8, 20, 33, 49])
def test_ties_are_counted_on_through_chunks(take: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK", 8)
    check_against_sorting([torch.ones(50), torch.ones(3)], [torch.rand(50) > -1, torch.rand(3) > -1], take, True)


def test_mixed_types_are_compared_exactly() -> None:
    close = 1.0 + 2.0**-40  # fp32 cannot tell it from 1
    tensors = [torch.tensor([1.0, 3.0]), torch.tensor([close, -1.0], dtype=torch.float64)]
    assert select.kth(tensors, 3) == (close, 2, 1)
    with pytest.raises(ValueError, match="float tensor"):
        select.kth([torch.tensor([1, 2])], 1)


def test_counts_beyond_32_bits_are_kept() -> None:
    huge = 3_000_000_000
    many = select.kth([torch.tensor([1.0, 2.0])], huge + 1, reduce=lambda counts: counts * huge)
    assert many == (2.0, huge, huge)


def test_keys_sort_as_values_do() -> None:
    ordered = torch.tensor([-float("inf"), -3e38, -1.0, -1e-45, 0.0, 1e-45, 1.0, 3e38, float("inf")])
    for wide in (False, True):
        keys = reference.keys(ordered, magnitude=False, wide=wide)
        assert (keys.diff() > 0).all()
        zeros = reference.keys(torch.tensor([0.0, -0.0]), magnitude=False, wide=wide)
        assert zeros[0] == zeros[1]


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_named_unless_it_is_pruned(magnitude: bool, sign: float, dtype: torch.dtype) -> None:
    """A NaN with its sign bit set sorts below everything, one without it above everything."""
    good, bad = torch.randn(20).to(dtype), torch.randn(20).to(dtype)
    bad[7] = torch.copysign(torch.tensor(float("nan"), dtype=dtype), torch.tensor(sign, dtype=dtype))
    keep = torch.ones(20, dtype=torch.bool)
    everything = [pack_bits(keep)] * 2
    for call in (select.kth, select.remove_lowest):
        with pytest.raises(ValueError, match=r"NaN in second \(1 values\)"):
            call([good, bad], 3, everything, magnitude=magnitude, names=["first", "second"])
    masks = [torch.ones(20, dtype=torch.bool), keep.index_fill(0, torch.tensor([7]), False)]
    ordered, _ = by_sorting([good, bad], masks, magnitude)
    assert select.kth([good, bad], 3, [pack_bits(mask) for mask in masks], magnitude=magnitude).value == ordered[2]


def test_infinity_alone_is_no_error() -> None:
    tensors = [torch.tensor([-float("inf"), 1.0, float("inf")])]
    assert select.kth(tensors, 2) == (float("inf"), 1, 2)
    assert select.kth(tensors, 1, magnitude=False) == (-float("inf"), 0, 1)


class Processes:
    """Threads that sum tensors over each other, as processes do with an all-reduce."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=30)
        self.slots: list[Tensor | None] = [None] * world
        self.calls = 0

    def reduce(self, rank: int) -> Callable[[Tensor], Tensor]:
        def all_reduce(counts: Tensor) -> Tensor:
            assert counts.dtype == torch.int64
            self.slots[rank] = counts.clone()
            self.barrier.wait()
            total = torch.stack([slot for slot in self.slots if slot is not None]).sum(0)
            self.calls += rank == 0
            self.barrier.wait()
            return total

        return all_reduce

    def run(self, function: Callable[[int], object]) -> list[object]:
        results: list[object] = [None] * self.world
        threads = [threading.Thread(target=lambda r=r: results.__setitem__(r, function(r))) for r in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


@pytest.mark.acceptance("double-win", "A-7")
@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("kind", ["all equal", "rounded", "distinct"])
def test_any_number_of_shards_gives_the_same_masks(world: int, kind: str) -> None:
    whole = [torch.randn(40), torch.randn(7), torch.randn(33)]  # the second is smaller than eight shards
    if kind != "distinct":
        whole = [torch.ones_like(t) if kind == "all equal" else t.round() for t in whole]
    alone = select.remove_lowest(whole, 31)
    shards = [[t.tensor_split(world)[rank] for t in whole] for rank in range(world)]
    processes = Processes(world)

    def one(rank: int) -> tuple[select.Kth, list[Tensor]]:
        reduce = processes.reduce(rank)
        found = select.kth(shards[rank], 31, reduce=reduce)
        left = select.remove_lowest(shards[rank], 31, reduce=reduce, rank=rank, world=world)
        return found, [unpack_bits(bits, t.numel()) for bits, t in zip(left, shards[rank], strict=True)]

    results: list[tuple[select.Kth, list[Tensor]]] = processes.run(one)  # type: ignore[assignment]
    assert {found for found, _ in results} == {select.kth(whole, 31)}
    for index, (bits, tensor) in enumerate(zip(alone, whole, strict=True)):
        joined = torch.cat([masks[index] for _, masks in results])
        assert torch.equal(joined, unpack_bits(bits, tensor.numel()))
    assert processes.calls <= 3 + 3 + 1, "three sums of counts a selection, and one table of ties"


def test_nan_on_one_shard_stops_every_shard() -> None:
    shards = [[torch.ones(3), torch.ones(2)], [torch.ones(3), torch.tensor([1.0, float("nan")])]]
    processes = Processes(2)

    def one(rank: int) -> str:
        with pytest.raises(ValueError) as caught:
            select.kth(shards[rank], 1, reduce=processes.reduce(rank), names=["a", "b"])
        return str(caught.value)

    messages = processes.run(one)
    assert messages[0] == messages[1] and "b (1 values)" in str(messages[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select.kth([torch.ones(3)], 0), "k must be from 1 to 3 .*got 0"),
        (lambda: select.kth([torch.ones(3)], 4), "k must be from 1 to 3 .*got 4"),
        (lambda: select.remove_lowest([torch.ones(3)], 4), "from 1 to 3"),
        (lambda: select.remove_lowest([torch.ones(3)], 1, rank=1), "rank must be from 0 to world - 1 = 0, got 1"),
        (lambda: select.kth([], 1), "at least one tensor"),
        (lambda: select.kth([torch.ones(3)], 1, names=["a", "b"]), "expected 1 masks and names, got 1 and 2"),
        (lambda: select.kth([torch.ones(3)], 1, [torch.ones(3, dtype=torch.bool)]), "packed mask"),
        (lambda: select.kth([torch.ones(9)], 1, [torch.ones(1, dtype=torch.uint8)]), r"uint8 \(2,\)"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_removing_nothing_keeps_what_was_kept_even_beside_nan() -> None:
    keep = torch.tensor([True, False, True])
    (left,) = select.remove_lowest([torch.tensor([float("nan"), 0.0, -5.0])], 0, [pack_bits(keep)], magnitude=False)
    assert torch.equal(unpack_bits(left, 3), keep)


def test_the_input_is_not_changed_and_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the input, memory holds a few chunks and the packed mask."""
    monkeypatch.setattr(reference, "CHUNK", 4096)
    values = torch.randn(100, 4096)
    before = values.clone()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != values.untyped_storage().data_ptr():
                sizes.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        select.remove_lowest([values], 1000)
    assert torch.equal(values, before)
    assert sizes and max(sizes) <= max(values.numel() // 8, 8 * 4096)

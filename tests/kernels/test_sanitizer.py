"""What the interpreter hides and the sanitizer shows, on small kernels that go wrong."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.harness import interpret
from tests.kernels.sanitizer import Fault, install, interpreter

triton = pytest.importorskip("triton", reason="needs triton")
tl = triton.language


def fault(message: str) -> Any:
    """Expect a fault with this in its message; a star stands for anything."""
    return pytest.raises(Fault, match=re.escape(message).replace(r"\*", ".*"))


@triton.jit
def copy(x, out, n, BY: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i + BY, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@interpret
def test_accesses_beside_a_view_but_in_its_storage() -> None:
    whole, out = torch.arange(24.0), torch.zeros(24)
    copy[(2,)](whole[8:15], out[8:15], 7, BY=0, BLOCK=4)
    assert out[8:15].equal(whole[8:15]) and not out[15:].any()
    with fault("out of bounds: copy, program (1, 0, 0), reads 4 bytes at 0x*, 4 bytes past x (float32 [7])"):
        copy[(2,)](whole[8:15], out, 8, BY=0, BLOCK=4)
    with fault("out of bounds: copy, program (1, 0, 0), writes 4 bytes at 0x*, 4 bytes past out (float32 [7])"):
        copy[(2,)](whole, out[8:15], 7, BY=1, BLOCK=4)
    with fault("out of bounds: copy, program (0, 0, 0), writes 4 bytes at 0x*, 4 bytes before out (float32 [7])"):
        copy[(2,)](whole, out[8:15], 7, BY=-1, BLOCK=4)
    assert not out[15:].any() and not out[:8].any()


@interpret
def test_accesses_beside_a_storage_or_far_away() -> None:
    with fault("out of bounds: copy, program (0, 0, 0), reads 4 bytes at 0x*, 4 bytes past x (float32 [4])"):
        copy[(1,)](torch.ones(4), torch.ones(8), 8, BY=0, BLOCK=8)
    with fault("out of bounds: copy, program (0, 0, 0), writes 4 bytes at 0x*"):  # the process would die
        copy[(1,)](torch.ones(4), torch.ones(4), 4, BY=1_000_000_000, BLOCK=4)


@triton.jit
def spread(out, STRIDE: tl.constexpr):
    tl.store(out + tl.arange(0, 4) * STRIDE, 1.0)


@interpret
def test_what_lies_between_the_elements_of_a_tensor_is_not_its_own() -> None:
    whole = torch.zeros(8)
    spread[(1,)](whole[::2], STRIDE=2)
    assert whole.tolist() == [1, 0] * 4
    with fault("out of bounds: spread, program (0, 0, 0), writes 4 bytes at 0x*, in a gap of out (float32 [4])"):
        spread[(1,)](whole[::2], STRIDE=1)
    spread[(1,)](torch.zeros(4).expand(3, 4), STRIDE=1)


@triton.jit
def smooth(x, out, n, BLOCK: tl.constexpr):
    """Add each element and the next one, which may be another program's."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + i, mask=i < n, other=0.0) + tl.load(x + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(out + i, total, mask=i < n)


@triton.jit
def grow(x):
    value = tl.load(x)
    if tl.program_id(0) == 0:
        tl.store(x, value + 1)


@interpret
def test_a_program_reads_what_another_one_writes() -> None:
    x, out = torch.arange(12.0), torch.empty(12)
    smooth[(3,)](x, out, 12, BLOCK=4)
    assert out.tolist() == [*range(1, 23, 2), 11]
    message = "race: smooth, program (1, 0, 0), reads 4 bytes at 0x*, byte 32 of x (float32 [12])"
    with fault(message + ", which program (2, 0, 0) writes too"):
        smooth[(3,)](x, x, 12, BLOCK=4)
    with fault("race: grow, program (0, 0, 0), writes 4 bytes at 0x*, byte 0 of x *, which several programs read too"):
        grow[(3,)](x)
    grow[(1,)](x)


@triton.jit
def name(out, BY: tl.constexpr):
    tl.store(out + tl.program_id(0) * BY, tl.program_id(0) + tl.program_id(1))


@interpret
def test_two_programs_write_the_same_bytes() -> None:
    out = torch.zeros(8, dtype=torch.uint8)
    name[(8,)](out, BY=1)
    assert out.tolist() == [*range(8)]
    message = "race: name, program (1, 0, 0), writes 1 byte at 0x*, byte 1 of out (uint8 [8])"
    with fault(message + ", which program (1, 1, 0) writes too"):
        name[(2, 2)](out, BY=1)
    with fault("race: name, program (6, 0, 0), writes *, which program (7, 0, 0) writes too"):
        name[(8,)](out, BY=0)


@triton.jit
def vote(count, out, READ: tl.constexpr):
    before = tl.atomic_add(count, 1)
    if READ:
        before = tl.load(count)
    tl.store(out + tl.program_id(0), before)


@triton.jit
def claim(lock, BY: tl.constexpr):
    tl.atomic_cas(lock + tl.program_id(0) * BY, 0, 1)


@interpret
def test_atomics_may_meet_each_other_but_nothing_else() -> None:
    count, out = torch.zeros(1, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    vote[(4,)](count, out, READ=False)
    assert count.item() == 4 and sorted(out.tolist()) == [0, 1, 2, 3]
    with fault(
        "race: vote, program (2, 0, 0), updates 4 bytes at 0x*, byte 0 of count *, which program (3, 0, 0) reads"
    ):
        vote[(4,)](count, out, READ=True)
    with fault("race: vote, program (0, 0, 0), writes 4 bytes at 0x*, which several programs update too"):
        vote[(4,)](out, out, READ=False)
    with fault("out of bounds: vote, program (3, 0, 0), updates 4 bytes at 0x*"):
        vote[(4,)](count[:0], out, READ=False)
    claim[(4,)](count, BY=0)
    with fault("out of bounds: claim, program (3, 0, 0), updates 4 bytes at 0x*, 12 bytes past lock (int32 [1])"):
        claim[(4,)](count, BY=1)


@interpret
def test_who_relies_on_the_order_of_programs_is_surprised() -> None:
    count, out = torch.zeros(1, dtype=torch.int32), torch.empty(4, dtype=torch.int32)
    vote[(4,)](count, out, READ=False)
    assert out.tolist() == [3, 2, 1, 0]


@triton.jit
def squeeze(out, SHARE: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(out + i // 2, i // SHARE)


@interpret
def test_two_lanes_of_a_store_differ() -> None:
    out = torch.zeros(4, dtype=torch.int32)
    squeeze[(1,)](out, SHARE=2)
    assert out.tolist() == [0, 1, 2, 3]
    message = "two lanes: squeeze, program (0, 0, 0), writes 4 bytes at 0x*, byte 0 of out (int32 [4])"
    with fault(message + ", as 0x0 by one lane and as 0x1 by another"):
        squeeze[(1,)](out, SHARE=1)


@triton.jit
def pad(x, out, n, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    found = tl.atomic_add(x + i, 1, mask=i < n) if ATOMIC else tl.load(x + i, mask=i < n)
    tl.store(out + i, found)


@interpret
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "float64", "int32", "uint8"])
def test_lanes_that_are_masked_off_hold_poison(name: str) -> None:
    dtype = getattr(torch, name)
    for atomic in (False, True)[: 1 + (dtype.itemsize == 4)]:
        out = torch.zeros(8, dtype=dtype)
        pad[(1,)](torch.ones(5, dtype=dtype), out, 5, ATOMIC=atomic, BLOCK=8)
        assert out[:5].eq(1).all()
        assert out[5:].isnan().all() if dtype.is_floating_point else out[5:].view(torch.uint8).eq(0xA5).all()


@triton.jit
def widen(x, PAIR: tl.constexpr, PROMISE: tl.constexpr):
    if PROMISE:
        x = tl.multiple_of(x, 16)
    tl.store(x.to(tl.pointer_type(tl.float64)) if PAIR else x, 1.0)


@interpret
def test_addresses_that_are_not_aligned() -> None:
    x = torch.zeros(8)
    widen[(1,)](x, PAIR=True, PROMISE=True)
    assert x[:2].view(torch.float64).item() == 1
    with fault("misaligned: widen, program (0, 0, 0), writes 8 bytes at 0x*, byte 0 of x (float32 [7])"):
        widen[(1,)](x[1:], PAIR=True, PROMISE=False)
    with fault("misaligned: widen, program (0, 0, 0), promises a multiple of 16, got 0x*"):
        widen[(1,)](x[1:], PAIR=False, PROMISE=True)


@triton.jit
def add_one(table, sizes, total, BLOCK: tl.constexpr):
    """Add one to the tensors of a table, and their elements to a total."""
    size = tl.load(sizes + tl.program_id(0))
    values = tl.load(table + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(values + i, tl.load(values + i, mask=i < size, other=math.nan) + 1, mask=i < size)
    tl.atomic_add(total + tl.zeros([BLOCK], tl.int32), 1, mask=i < size)


def run(table: torch.Tensor, *sizes: int) -> int:
    total = torch.zeros(1, dtype=torch.int32)
    add_one[(len(sizes),)](table, torch.tensor(sizes), total, BLOCK=4)
    return int(total.item())


def table_of(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors])


@interpret
def test_tensors_of_a_table_are_known_as_they_were_asked_for() -> None:
    whole, other = torch.zeros(8), torch.zeros(3)
    table = table_of(whole[:3], whole[3:7], other)
    assert run(table, 3, 4, 3) == 10
    assert whole.tolist() == [1] * 7 + [0] and other.tolist() == [1] * 3
    with fault("race: add_one, program (0, 0, 0), reads *, which program (1, 0, 0) writes too"):
        run(table, 4, 4, 3)
    with fault("out of bounds: add_one, program (2, 0, 0), reads *, 4 bytes past tensor of a table (float32 [3])"):
        run(table, 3, 4, 4)
    with fault("out of bounds: add_one, program (0, 0, 0), reads *, 4 bytes past tensor of a table (float32 [3])"):
        run(table, 4)  # there is more at this address than was asked for
    table_of(whole)
    assert run(table, 4) == 4
    table_of(whole[:3], whole, whole[:3])
    assert run(table, 4) == 4
    table_of(whole[:3])
    with fault("out of bounds: add_one"):
        run(table, 4)
    assert run(table + 4, 2) == 2  # an address within


@interpret
def test_addresses_of_no_tensor_or_of_one_that_is_gone() -> None:
    gone = table_of(torch.zeros(70_000))
    with fault("out of bounds: add_one, *, byte 0 of the freed tensor of a table (float32 [70000])"):
        run(gone, 3)
    with fault("out of bounds: add_one, program (0, 0, 0), reads 4 bytes at 0x0"):
        run(torch.zeros(1, dtype=torch.int64), 3)
    tensor = torch.zeros(5)
    table = torch.tensor([tensor.untyped_storage().data_ptr()])
    with fault("out of bounds: add_one"):
        run(table, 3)
    assert tensor.data_ptr() == table and run(table, 3) == 3
    assert tensor.tolist() == [1, 1, 1, 0, 0]


@interpret
def test_an_address_within_a_tensor_at_which_a_freed_one_began() -> None:
    memory = np.zeros(9, np.float32)
    table_of(torch.from_numpy(memory[4:6]))  # of a storage of its own, gone at once
    whole = torch.from_numpy(memory)
    assert run(table_of(whole) + 16, 4) == 4
    assert whole.tolist() == [0] * 4 + [1] * 4 + [0]


def test_an_interpreter_without_the_hooks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(vars(interpreter.InterpreterBuilder))
    monkeypatch.delattr(interpreter.InterpreterBuilder, "create_atomic_cas")
    with pytest.raises(
        RuntimeError, match=r"changes InterpreterBuilder.create_atomic_cas of .*, which triton \d.* lacks"
    ):
        install.__wrapped__()
    monkeypatch.undo()
    assert dict(vars(interpreter.InterpreterBuilder)) == before

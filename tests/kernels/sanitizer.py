"""Makes Triton's interpreter find the faults that it hides and a GPU shows.

The interpreter runs one program after another on the memory of the process: a race goes well, and an access beside a
tensor finds its neighbour. After `install` every launch raises a `Fault`, at the line of the kernel, where

- lanes read, write or atomically update what belongs to no tensor of the launch. It has those among its arguments, and
  those that ``Tensor.data_ptr`` was asked for, if the kernel makes a pointer of the address. A tensor is its elements:
  neither the rest of its storage nor what lies between them;
- a program writes what another one reads, writes or updates, or reads what another one updates, byte by byte. It does
  not see races within a program, and does not understand programs that wait for each other by an atomic's memory order;
- two lanes of one store write different values to one place;
- an address is no multiple of the element's size, or not of what ``tl.multiple_of`` promises.

Two more faults show in what a kernel returns: a lane that is masked off, of an atomic or of a load without ``other``,
holds poison instead of 0, and the programs of a grid run from the last to the first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from triton.runtime import interpreter

CLASHES = {"read": ("write", "update"), "write": ("write", "read", "update"), "update": ("write", "read")}
SEVERAL = -1  # in place of a program's number
REMEMBERED = 1000  # addresses; above that, those of freed tensors are forgotten
_builder = interpreter.interpreter_builder
_data_ptr = torch.Tensor.data_ptr


class Fault(BaseException):
    """What a kernel does wrong. No Exception: the interpreter would wrap it, and a fallback might hide it."""


@dataclasses.dataclass(frozen=True)
class View:
    """Where a tensor lies, without keeping it alive."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    end: int
    base: int  # of its storage
    space: int  # bytes of its storage
    storage: StorageWeakRef

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str) -> View:
        storage, start, shape, strides = tensor.untyped_storage(), _data_ptr(tensor), tensor.shape, tensor.stride()
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        end = start + (last + 1) * tensor.element_size() if tensor.numel() else start
        weak = StorageWeakRef(storage)
        return cls(name, tensor.dtype, tuple(shape), strides, start, end, storage.data_ptr(), storage.nbytes(), weak)

    def __str__(self) -> str:
        freed = "the freed " if self.storage.expired() else ""
        return f"{freed}{self.name} ({str(self.dtype).removeprefix('torch.')} {list(self.shape)})"


class Shadow:
    """What is known of each byte of a storage: whether the launch has it, and which programs did what to it."""

    def __init__(self, base: int, space: int) -> None:
        self.base, self.end = base, base + space
        self.given = np.zeros(space, bool)
        self.users = {kind: np.zeros(space, np.int32) for kind in CLASHES}  # programs from 1, SEVERAL, or 0: none

    def give(self, view: View) -> None:
        item = view.dtype.itemsize
        shape = [1 if stride == 0 else size for size, stride in zip(view.shape, view.strides, strict=True)]
        strides = [stride * item for stride in view.strides]
        elements = torch.from_numpy(self.given).as_strided([*shape, item], [*strides, 1], view.start - self.base)
        elements.fill_(True)

    def use(self, kind: str, where: Any, program: int) -> tuple[int, str, int] | None:
        """Note what a program does to these bytes. Return where it meets another one first, and what that one did."""
        for other in CLASHES[kind]:
            users = self.users[other][where]
            clash = (users != 0) & (users != program)
            if clash.any():
                at = int(clash.argmax())
                return at, other, int(users[at])
        before = self.users[kind][where]
        self.users[kind][where] = np.where((before == 0) | (before == program), program, SEVERAL)
        return None


class Launch:
    """The tensors of one launch, and what its programs do to them."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        self.views: list[View] = []
        self.shadows: dict[int, Shadow] = {}  # by the start of the storage
        self.addresses = {0}  # that need not be looked up
        for name, argument in arguments.items():
            for tensor_name, tensor in _tensors(name, argument):
                self.give(View.of(tensor, tensor_name))

    def give(self, view: View) -> None:
        self.views.append(view)
        if view.start < view.end and not view.storage.expired():
            if view.base not in self.shadows:
                self.shadows[view.base] = Shadow(view.base, view.space)
            self.shadows[view.base].give(view)

    def give_addresses(self, addresses: np.ndarray) -> None:
        """Add the tensors that begin at these addresses or, for an address at which none does, that it lies in."""
        for address in set(addresses.ravel().tolist()) - self.addresses:
            self.addresses.add(address)
            _, found = _asked.get(address, (0, []))
            if all(view.storage.expired() for view in found):  # what begins here was freed, and lies in another one now
                found = [view for _, views in _asked.values() for view in views if view.start <= address < view.end]
            for view in found:
                self.give(view)

    def access(self, kind: str, pointers: np.ndarray, mask: np.ndarray, item: int, values: Any = None) -> None:
        """Check what the lanes that are not masked off do to ``item`` bytes each."""
        addresses, lanes = np.ascontiguousarray(pointers).reshape(-1).view(np.int64), _lanes(mask, pointers.shape)
        if not lanes.all():
            addresses = addresses[lanes.reshape(-1)]
        if not len(addresses):
            return
        low, high = int(addresses[0]), int(addresses[-1]) + item
        in_a_row = high - low == len(addresses) * item and bool((np.diff(addresses) == item).all())
        odd = low % item if in_a_row else addresses % item
        if np.any(odd):
            self.fail("misaligned", kind, int(addresses[np.argmax(odd != 0)]), item)
        if not in_a_row:
            low, high = int(addresses.min()), int(addresses.max()) + item
            if kind == "write":
                self.check_lanes(addresses, np.broadcast_to(values, pointers.shape)[lanes], item)
        program = _number()
        for shadow, inside in self.parts(kind, addresses, low, high, item):
            where: Any = slice(low - shadow.base, high - shadow.base)
            if not in_a_row or len(inside) < len(addresses):
                where = (inside[:, None] + np.arange(-shadow.base, item - shadow.base)).reshape(-1)
            given = shadow.given[where]
            if not given.all():
                self.fail("out of bounds", kind, int(inside[int(given.argmin()) // item]), item)
            clash = shadow.use(kind, where, program) if program else None
            if clash:
                at, other, user = clash
                did = f"several programs {other}" if user == SEVERAL else f"program {_index(user)} {other}s"
                self.fail("race", kind, int(inside[at // item]), item, f", which {did} too")

    def parts(
        self, kind: str, addresses: np.ndarray, low: int, high: int, item: int
    ) -> Iterator[tuple[Shadow, np.ndarray]]:
        """Yield the storages that addresses lie in, with those that do; nearly always it is one."""
        for shadow in self.shadows.values():
            if shadow.base <= low and high <= shadow.end:
                yield shadow, addresses
                return
        for shadow in self.shadows.values():
            inside = (addresses >= shadow.base) & (addresses + item <= shadow.end)
            if inside.any():
                yield shadow, addresses[inside]
                addresses = addresses[~inside]
        if len(addresses):
            self.fail("out of bounds", kind, int(addresses[0]), item)

    def check_lanes(self, addresses: np.ndarray, values: np.ndarray, item: int) -> None:
        order = np.argsort(addresses, kind="stable")
        addresses, bits = addresses[order], values[order].view(f"u{item}")
        differ = (np.diff(addresses) == 0) & (bits[1:] != bits[:-1])
        if differ.any():
            at = int(differ.argmax())
            what = f", as {bits[at]:#x} by one lane and as {bits[at + 1]:#x} by another"
            self.fail("two lanes", "write", int(addresses[at]), item, what)

    def fail(self, fault: str, kind: str, address: int, item: int, what: str = "") -> NoReturn:
        place = f"{item} byte{'s' * (item > 1)} at {address & (2**64 - 1):#x}"
        if self.views:  # say where that is, by the nearest one
            view = min(self.views, key=lambda view: max(view.start - address, address + item - view.end, 0))
            before, past = view.start - address, address + item - view.end
            where = f"byte {-before} of"
            if before > 0 or past > 0:
                where = f"{before} bytes before" if before > 0 else f"{past} bytes past"
            elif fault == "out of bounds" and not view.storage.expired():
                where = "in a gap of"
            place += f", {where} {view}"
        raise Fault(f"{fault}: {self.kernel}, program {_index(_number(1))}, {kind}s {place}{what}")


_asked: dict[int, tuple[int, list[View]]] = {}  # by address: the number of launches before, and what was asked for it
_launches = 0
_running: Launch | None = None


def _remember(tensor: torch.Tensor) -> int:
    """``Tensor.data_ptr``. An address means the tensor that was last asked for it, or all those since the last launch.

    So a longer or shorter tensor at the same address that an earlier launch had does not count.
    """
    address = _data_ptr(tensor)
    if address and _running is None and tensor.device.type == "cpu" and tensor.numel():
        launches, views = _asked.get(address, (-1, []))
        _asked[address] = _launches, [*(views if launches == _launches else []), View.of(tensor, "tensor of a table")]
    return address


def _tensors(name: str, argument: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(argument, tuple):
        for index, part in enumerate(argument):
            yield from _tensors(f"{name}[{index}]", part)
    elif isinstance(argument, torch.Tensor):
        yield name, argument
    elif hasattr(argument, "base"):  # a descriptor, or a tensor seen as of another type
        yield from _tensors(name, argument.base)


def _number(least: int = 2) -> int:
    """Return the number of the program that runs, from 1; 0 in a grid of less than ``least``."""
    (x, y, z), (nx, ny, nz) = _builder.grid_idx, _builder.grid_dim
    return x + nx * (y + ny * z) + 1 if nx * ny * nz >= least else 0


def _index(number: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(number - 1, _builder.grid_dim, order="F"))


def _lanes(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(mask, shape).astype(bool, copy=False)  # what is and-ed with a bool may be int64


def _poison(result: Any, mask: np.ndarray) -> Any:
    """Fill the lanes that are masked off: floats with NaN, integers with 0xA5."""
    lanes = _lanes(mask, result.data.shape)
    if not lanes.all():
        byte = b"\xff" if result.get_element_ty().is_floating() else b"\xa5"
        result.data = np.where(lanes, result.data, np.frombuffer(byte * result.data.itemsize, result.data.dtype))
    return result


def _launch(inner: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
    global _launches, _running
    _running = Launch(executor.fn.__name__, dict(zip(executor.arg_names, args, strict=False)) | kwargs)
    try:
        return inner(executor, *args, **kwargs)
    finally:
        _running, _launches = None, _launches + 1
        if len(_asked) > REMEMBERED:
            for address in [key for key, (_, views) in _asked.items() if all(v.storage.expired() for v in views)]:
                del _asked[address]


def _place(inner: Callable[..., Any], builder: Any, *index: int) -> None:
    inner(builder, *(size - 1 - i for size, i in zip(builder.grid_dim, index, strict=True)))


def _load(inner: Callable[..., Any], builder: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kw: Any) -> Any:
    assert _running is not None
    element = pointers.get_element_ty()
    _running.access("read", pointers.data, mask.data, 8 if element.is_ptr() else element.primitive_bitwidth // 8)
    result = inner(builder, pointers, mask, other, *args, **kw)
    if element.is_ptr():
        _running.give_addresses(result.data)
    return _poison(result, mask.data) if other is None else result


def _store(inner: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kw: Any) -> Any:
    assert _running is not None
    _running.access("write", pointers.data, mask.data, value.data.itemsize, value.data)
    return inner(builder, pointers, value, mask, *args, **kw)


def _update(inner: Callable[..., Any], builder: Any, op: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
    assert _running is not None
    _running.access("update", pointers.data, mask.data, value.data.itemsize)
    return _poison(inner(builder, op, pointers, value, mask, *args), mask.data)


def _swap(inner: Callable[..., Any], builder: Any, pointers: Any, expected: Any, *args: Any) -> Any:
    assert _running is not None
    _running.access("update", pointers.data, np.array(True), expected.data.itemsize)
    return inner(builder, pointers, expected, *args)


def _to_pointer(inner: Callable[..., Any], builder: Any, value: Any, *args: Any) -> Any:
    assert _running is not None
    _running.give_addresses(value.data)
    return inner(builder, value, *args)


def _promise(inner: Callable[..., Any], handle: Any, name: str, values: Any) -> None:
    if name == "tt.divisibility" and handle.data.size == 1 and handle.data.item() % values[0]:
        assert _running is not None
        what = f"promises a multiple of {values[0]}, got {handle.data.item():#x}"
        raise Fault(f"misaligned: {_running.kernel}, program {_index(_number(1))}, {what}")
    inner(handle, name, values)


_HOOKS: list[tuple[str, str, Callable[..., Any]]] = [
    ("GridExecutor", "__call__", _launch),
    ("InterpreterBuilder", "set_grid_idx", _place),
    ("InterpreterBuilder", "create_masked_load", _load),  # which every other load calls
    ("InterpreterBuilder", "create_masked_store", _store),  # which every other store calls
    ("InterpreterBuilder", "create_atomic_rmw", _update),
    ("InterpreterBuilder", "create_atomic_cas", _swap),
    ("InterpreterBuilder", "create_int_to_ptr", _to_pointer),
    ("TensorHandle", "set_attr", _promise),
]


@functools.cache
def install() -> None:
    """Watch every launch of this process from now on."""
    missing = [f"{owner}.{name}" for owner, name, _ in _HOOKS if name not in vars(getattr(interpreter, owner, object))]
    if missing:
        raise RuntimeError(
            f"the sanitizer changes {', '.join(missing)} of triton.runtime.interpreter, which triton "
            f"{triton.__version__} lacks: look for what took its place"
        )
    for place, name, around in _HOOKS:
        owner = getattr(interpreter, place)
        setattr(owner, name, _hooked(around, getattr(owner, name)))
    torch.Tensor.data_ptr = _remember  # type: ignore[assignment, method-assign]


def _hooked(around: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: around(inner, self, *args, **kwargs)

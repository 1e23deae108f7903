"""One registry of implementations: ``auto`` picks, an explicit request is honoured or refused.

| backend | what runs |
|---|---|
| ``auto`` | ``triton`` on CUDA where it can be imported, ``reference`` elsewhere |
| ``triton`` | the kernels of ``<op>/triton.py``; on the CPU too where Triton interprets (``TRITON_INTERPRET=1``) |
| ``reference`` | plain torch, everywhere |
| ``compile`` | torch.compile of the reference, where an operation offers it |

Triton is imported with the first request that may need it: on CUDA, or for ``triton`` by name.
"""

from __future__ import annotations

import functools
import importlib
import logging
import pkgutil
import typing
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ORDER = ("triton", "reference", "compile")  # of preference

_logger = logging.getLogger(__name__)
_functions: dict[str, Callable[..., Any]] = {}  # by "operation:backend"
_devices: dict[str, dict[str, frozenset[str]]] = {}  # by operation and backend; an empty set means all
_failures: dict[str, str] = {}  # by folder whose kernels were asked for: why they cannot be imported, or ""
_choices: dict[tuple[str, str, str, str], str] = {}  # what `_choose` found before


def register(
    op: str, backend: str, *, devices: tuple[str, ...] = (), compiles: bool = False
) -> Callable[[_Function], _Function]:
    """Register a function as ``backend`` of ``op``, whose name is ``<folder>.<function>``.

    Args:
        devices: the device types it runs on; empty means all. A ``triton`` backend also runs on the CPU where Triton
            interprets.
        compiles: offer torch.compile of the function as backend ``compile``.
    """
    kinds = frozenset(devices)
    if backend == "triton" and kinds and _interprets():
        kinds |= {"cpu"}

    def add(function: _Function) -> _Function:
        entries: list[tuple[str, Callable[..., Any]]] = [(backend, function)]
        if compiles:
            entries.append(("compile", _compiled(function)))
        for name, entry in entries:
            _functions[f"{op}:{name}"] = entry
            _devices.setdefault(op, {})[name] = kinds
        _choices.clear()
        return function

    return add


def opaque(op: str, *, fake: Callable[..., Any], mutates: Iterable[str] = ()) -> Callable[[_Function], _Function]:
    """Make a function that torch.compile cannot look into, such as a kernel launch, one node of the graph it captures.

    While torch.compile traces, the call becomes a custom operator ``sparse_robust::<op>``; outside of it the function
    itself is called, which spares the operator's ten microseconds. Goes below `register`::

        @register("scale.double", "triton", devices=("cuda",))
        @opaque("scale.double", fake=lambda x, **_: torch.empty_like(x))
        def double(x: Tensor, *, bias: float) -> Tensor: ...

    Args:
        op: the operation's name; dots become underscores.
        fake: takes the same arguments and returns empty tensors of the shapes, types and strides that the function
            returns (None where it returns nothing); it sees no data and does not mutate.
        mutates: names of the arguments (Tensor or list[Tensor]) that the function writes to.

    The function is annotated with what an operator's schema can say: Tensor, Tensor | None, Sequence[Tensor], int (64
    bits, signed), float, bool, str, Sequence[int], torch.dtype; it returns a tensor, a tuple of them, or None, and
    never one of its arguments or a view of them.
    """

    def wrap(function: _Function) -> _Function:
        # torch reads the annotations, but not as text, and None not as a type.
        hints = typing.get_type_hints(function)
        function.__annotations__ = {name: None if hint is type(None) else hint for name, hint in hints.items()}
        operator: Any = torch.library.custom_op(
            f"sparse_robust::{op.replace('.', '_')}", function, mutates_args=tuple(mutates)
        )
        operator.register_fake(fake)

        def call(*args: Any, **kwargs: Any) -> Any:
            return operator(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

        return typing.cast(_Function, call)

    return wrap


def operations() -> tuple[str, ...]:
    """Return the names of all operations of this package."""
    package = importlib.import_module(__package__ or "sparse_robust_kernels")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            importlib.import_module(f"{package.__name__}.{module.name}")  # which registers what it holds
    return tuple(sorted(_devices))


def backends(op: str, device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Return the names of the implementations of ``op`` that run on ``device``, the automatic choice first."""
    kind = torch.device(device).type
    if kind == "cuda":
        _load_triton(op)
    found = [name for name, devices in _devices.get(op, {}).items() if not devices or kind in devices]
    if kind != "cuda":  # where Triton interprets it is there for tests, never the automatic choice
        return tuple(sorted(found, key=lambda name: (name != "reference", name)))
    return tuple(sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)))


def resolve(
    op: str, backend: str = "auto", device: torch.device | str = "cpu", *, unfit: str = ""
) -> Callable[..., Any]:
    """Return the function that runs ``op`` on ``device``.

    Args:
        unfit: why the kernels do not take these arguments, such as "float64 images"; empty if they do. The automatic
            choice falls back to the reference then, and ``triton`` by name is refused.

    Raises:
        ValueError: if ``backend`` is not ``auto`` and does not run there; the message lists what does.
    """
    kind = device.type if isinstance(device, torch.device) else torch.device(device).type
    return _functions[_choose(op, backend, kind, unfit)]


def require_known(backend: str) -> None:
    """Raise ValueError for what is no backend's name, where it cannot be resolved yet."""
    if backend not in ("auto", *_ORDER):
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(('auto', *_ORDER))}")


def _choose(op: str, backend: str, kind: str, unfit: str) -> str:
    choice = _choices.get((op, backend, kind, unfit))
    if choice is None:
        choice = _choices[op, backend, kind, unfit] = _find(op, backend, kind, unfit)
    return choice


# Traced code calls _choose once and keeps the name. torch.compiler.assume_constant_result says so too, but imports the
# compiler, which takes more than a second.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find(op: str, backend: str, kind: str, unfit: str) -> str:
    if backend == "triton":
        _load_triton(op)
    available = backends(op, kind)
    if not available:
        raise ValueError(
            f"no implementation of {op!r} runs on {kind}; known operations: {', '.join(sorted(_devices)) or 'none'}"
        )
    failure = _failures.get(_folder(op), "")
    if backend == "auto" and kind == "cuda" and failure:
        _warn_once(f"triton cannot be imported, kernels run as plain torch: {failure}")
    if unfit:
        if backend == "auto" and available[0] == "triton":
            _logger.info("%s runs as plain torch: its kernels do not take %s", op, unfit)
        available = tuple(name for name in available if name != "triton")
    chosen = available[0] if available and backend == "auto" else backend
    if chosen not in available:
        why = (f" for {unfit}" if unfit else f" ({failure})" if failure else "") if backend == "triton" else ""
        raise ValueError(
            f"{op!r} has no backend {backend!r} on {kind}{why}; available there: {', '.join(('auto', *available))}"
        )
    return f"{op}:{chosen}"


def _folder(op: str) -> str:
    return op.partition(".")[0]


def _load_triton(op: str) -> None:
    """Import the kernels of an operation, once."""
    folder = _folder(op)
    if folder in _failures or op not in _devices:
        return
    module = f"{__package__}.{folder}.triton"
    _failures[folder] = ""
    try:
        importlib.import_module(module)
    except ImportError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # an operation without kernels is no failure
            _failures[folder] = str(error)


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] | None = None

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():  # already within a compiled function
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function)
        return compiled(*args, **kwargs)

    return call

"""One registry of implementations: ``auto`` picks, an explicit request is honoured or refused."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_IMPLEMENTATIONS: dict[str, dict[str, tuple[Callable[..., Any], frozenset[str]]]] = {}


def register(op: str, backend: str, *, devices: tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """Register a function as ``backend`` of ``op``. ``devices`` are the device types it runs on; empty means all."""

    def add(function: _Function) -> _Function:
        _IMPLEMENTATIONS.setdefault(op, {})[backend] = (function, frozenset(devices))
        return function

    return add


def operations() -> tuple[str, ...]:
    """Return the names of all operations of this package."""
    package = importlib.import_module(__package__ or "sparse_robust_kernels")
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            importlib.import_module(f"{package.__name__}.{module.name}")  # which registers what it holds
    return tuple(sorted(_IMPLEMENTATIONS))


def backends(op: str, device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Return the names of the implementations of ``op`` that run on ``device``, the automatic choice first."""
    kind = torch.device(device).type
    found = [name for name, (_, devices) in _IMPLEMENTATIONS.get(op, {}).items() if not devices or kind in devices]
    return tuple(sorted(found, key=lambda name: (name == "reference", name)))


def resolve(op: str, backend: str = "auto", device: torch.device | str = "cpu") -> Callable[..., Any]:
    """Return the function that runs ``op`` on ``device``.

    Raises:
        ValueError: if ``backend`` is not ``auto`` and does not run there; the message lists what does.
    """
    available = backends(op, device)
    if not available:
        raise ValueError(
            f"no implementation of {op!r} runs on {torch.device(device).type}; known operations: "
            f"{', '.join(sorted(_IMPLEMENTATIONS)) or 'none'}"
        )
    chosen = available[0] if backend == "auto" else backend
    if chosen not in available:
        raise ValueError(
            f"{op!r} has no backend {backend!r} on {torch.device(device).type}; available there: "
            f"{', '.join(('auto', *available))}"
        )
    return _IMPLEMENTATIONS[op][chosen][0]

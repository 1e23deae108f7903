"""What the gates have in common: exact comparison, and the settings under which equality may be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from sparse_robust.bench.harness import GateError


def require_same(what: str, got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Raise `GateError` unless two sets of tensors agree bit for bit; the message names the first that does not."""
    if got.keys() != expected.keys():
        raise GateError(f"{what}: expected the names {sorted(expected)}, got {sorted(got)}")
    for name, tensor in got.items():
        other = expected[name].to(tensor.device)
        if tensor.shape != other.shape:
            raise GateError(f"{what}: {name} has shape {tuple(tensor.shape)}, expected {tuple(other.shape)}")
        differing = int((tensor != other).sum())
        if differing:
            largest = float((tensor.double() - other.double()).abs().max())
            raise GateError(f"{what}: {differing} of {tensor.numel()} values of {name} differ, by up to {largest:.3g}")


def require_close(
    what: str, got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], tolerance: float
) -> None:
    """Raise `GateError` where a tensor differs by more than a share of its largest expected value."""
    for name, tensor in got.items():
        other = expected[name].to(tensor.device).double()
        error = float((tensor.double() - other).abs().max()) if tensor.numel() else 0.0
        largest = float(other.abs().max()) if tensor.numel() else 0.0
        if not error <= tolerance * largest:
            raise GateError(
                f"{what}: {name} is off by {error:.2g}, more than {tolerance:.0e} of its largest, {largest:.2g}"
            )


def require_finite(what: str, value: torch.Tensor) -> None:
    """Raise `GateError` if a value is NaN or infinite."""
    if not bool(value.isfinite().all()):
        raise GateError(f"{what} is not finite")


@contextmanager
def reproducible() -> Iterator[None]:
    """Let cuDNN choose only algorithms that give the same bits twice, in fp32. The timing itself runs without this."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield

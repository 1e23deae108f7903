"""Counted randomness: numbers that are a function of (key, stream, sample id, element) and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import resolve
from sparse_robust_kernels.rng.reference import signed

__all__ = ["check_counter", "philox_uniform", "signed"]


def philox_uniform(
    ids: Tensor, numel: int, *, key: int | Tensor, stream: int | Tensor, backend: str = "auto"
) -> Tensor:
    """Return uniform numbers in [0, 1) for each sample: float32 ``[n, numel]``, multiples of 2**-24.

    Philox4x32-10 with counter words (element // 4, stream, low and high half of the id) and the two halves of the key;
    element e takes output word e % 4. The same bits come on every device, in every batch and order, and the numbers of
    a sample do not depend on ``numel``: a longer row continues a shorter one.

    Args:
        ids: int64 ``[n]``, sample ids.
        numel: numbers a sample, 0 or more.
        key: 64 bits; usually derived from a seed and a purpose. Or an int64 tensor without dimensions that holds these
            bits (see `signed`), beside ids: work that is captured once and replayed then takes its key from there.
        stream: 32 bits; tells the draws for one purpose apart (restart, step). One number for all samples, or int64
            ``[n]``, one for each.

    Raises:
        ValueError: if an argument is not of that kind.
    """
    check_counter(ids, key, stream)
    if not 0 <= numel <= 2**34:
        raise ValueError(f"numel must be in 0..2**34, got {numel}")
    generated: Tensor = resolve("rng.philox_uniform", backend, ids.device)(ids, numel, key=key, stream=stream)
    return generated


def check_counter(ids: Tensor, key: int | Tensor, stream: int | Tensor) -> None:
    """Check what names the numbers of a draw, as `philox_uniform` describes it."""
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"ids must be int64 [n], got {ids.dtype} {tuple(ids.shape)}")
    if isinstance(key, Tensor):
        if key.dtype != torch.int64 or key.dim() or key.device != ids.device:
            raise ValueError(f"key must be int64 () beside ids, got {key.dtype} {tuple(key.shape)} on {key.device}")
    elif not 0 <= key < 2**64:
        raise ValueError(f"key takes 64 bits, got {key}")
    if isinstance(stream, Tensor):
        if stream.dtype != torch.int64 or stream.shape != ids.shape or stream.device != ids.device:
            raise ValueError(
                f"stream must be int64 {tuple(ids.shape)} beside ids, got {stream.dtype} on {stream.device}"
            )
    elif not 0 <= stream < 2**32:
        raise ValueError(f"stream takes 32 bits, got {stream}")

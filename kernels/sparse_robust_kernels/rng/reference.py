"""Philox4x32-10 in plain torch integers: the meaning of the generator, and its CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

# Counter blocks generated at a time: a word is an int64 while it is computed, eight times the size of its result.
CHUNK = 1 << 18


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Return the four output words of Philox4x32-10; words are int64 tensors (broadcastable) that hold 32 bits.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


@register("rng.philox_uniform", "reference")
def philox_uniform(ids: Tensor, numel: int, *, key: int, stream: int | Tensor) -> Tensor:
    """See `sparse_robust_kernels.rng.philox_uniform`."""
    blocks = torch.arange(-(-numel // 4), device=ids.device).unsqueeze(0)
    rows = max(1, CHUNK // max(1, blocks.numel()))
    streams = (stream if isinstance(stream, Tensor) else torch.full_like(ids, stream)) & WORD
    parts = [_rows(*part, blocks, numel, key) for part in zip(ids.split(rows), streams.split(rows), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows(ids: Tensor, streams: Tensor, blocks: Tensor, numel: int, key: int) -> Tensor:
    low, high = (ids & WORD).unsqueeze(1), ((ids >> 32) & WORD).unsqueeze(1)
    words = philox((blocks, streams.unsqueeze(1), low, high), (key & WORD, key >> 32))
    shape = (len(ids), blocks.shape[1])
    lanes = torch.stack([word.expand(shape) for word in words], dim=2).flatten(1)[:, :numel]
    return (lanes >> 8).to(torch.float32) * 2.0**-24


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # It wraps around in int64; the mask takes the bits that an unsigned 64-bit product would have.
    product = word * factor
    return (product >> 32) & WORD, product & WORD

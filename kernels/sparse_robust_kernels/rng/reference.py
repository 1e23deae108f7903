"""Philox4x32-10 in plain torch integers: the meaning of the generator, and its CPU path."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

# Counter blocks generated at a time: a word is an int64 while it is computed, eight times the size of its result.
CHUNK = 1 << 18
ARRAY_CHUNK = 1 << 15  # 0.5 MB of words, which a cache holds

_HIGH = int(sys.byteorder == "little")  # where in an unsigned 64-bit number its upper word lies


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Any) -> tuple[Tensor, ...]:
    """Return the four output words of Philox4x32-10; words are int64 tensors (broadcastable) that hold 32 bits,
    those of the key integers or such tensors.

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
def philox_uniform(ids: Tensor, numel: int, *, key: int | Tensor, stream: int | Tensor) -> Tensor:
    """See `sparse_robust_kernels.rng.philox_uniform`."""
    blocks = -(-numel // 4)
    arrays = ids.device.type == "cpu" and not torch.compiler.is_compiling() and _has_arrays()
    draw, most = (_rows_of_arrays, ARRAY_CHUNK) if arrays else (_rows, CHUNK)
    rows = max(1, most // max(1, blocks))
    streams = (stream if isinstance(stream, Tensor) else torch.full_like(ids, stream)) & WORD
    halves: Any = (key & WORD, (key >> 32) & WORD)
    parts = [draw(*part, blocks, halves) for part in zip(ids.split(rows), streams.split(rows), strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:, :numel]


def _rows(ids: Tensor, streams: Tensor, blocks: int, key: tuple[int, int]) -> Tensor:
    low, high = (ids & WORD).unsqueeze(1), ((ids >> 32) & WORD).unsqueeze(1)
    words = philox((torch.arange(blocks, device=ids.device).unsqueeze(0), streams.unsqueeze(1), low, high), key)
    lanes = torch.stack([word.expand(len(ids), blocks) for word in words], dim=2).flatten(1)
    return (lanes >> 8).to(torch.float32) * 2.0**-24


def _rows_of_arrays(ids: Tensor, streams: Tensor, blocks: int, key: tuple[int, int]) -> Tensor:
    """Return the same on 32-bit words, which NumPy's arrays have and torch's arithmetic has not.

    Words 0 and 2 lie in one array, and 1 and 3 in another: a round is a product and two exclusive ors. It takes a fifth
    of the time of `_rows` for a few numbers a sample, and a third for images.
    """
    factors, rounds = _constants(int(key[0]), int(key[1]))
    shape = (2, len(ids), blocks)
    even, odd = (torch.empty(shape, dtype=torch.int32).numpy().view("uint32") for _ in range(2))
    even[0], odd[0] = torch.arange(blocks).numpy(), streams.numpy()[:, None]
    even[1], odd[1] = (ids & WORD).numpy()[:, None], (ids >> 32 & WORD).numpy()[:, None]
    for words in rounds:
        products = (even * factors)[::-1].view("uint32")
        even = products[..., _HIGH::2] ^ odd
        even ^= words
        odd = products[..., 1 - _HIGH :: 2].copy()
    lanes = torch.empty((*shape[1:], 4), dtype=torch.int32)
    for lane, word in enumerate((even[0], odd[0], even[1], odd[1])):
        lanes.numpy()[..., lane] = (word >> 8).view("int32")
    return lanes.flatten(1) * 2.0**-24


@lru_cache(maxsize=64)
def _constants(first: int, second: int) -> tuple[Any, Any]:
    """Return the factors, and the key's two words in every round, as arrays that broadcast over pairs of words."""
    keys = [[first + number * WEYL[0] & WORD, second + number * WEYL[1] & WORD] for number in range(ROUNDS)]
    arrays = (torch.tensor(values)[..., None, None].numpy() for values in (MULTIPLIERS, keys))
    return next(arrays).astype("uint64"), next(arrays).astype("uint32")


@cache
def _has_arrays() -> bool:
    """Whether torch can hand out its tensors as arrays, which takes NumPy."""
    return importlib.util.find_spec("numpy") is not None


def signed(value: int, bits: int) -> int:
    """Return the integer of two's complement whose last bits are those of ``value``."""
    value %= 1 << bits
    return value - (value >> (bits - 1) << bits)


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    # It wraps around in int64; the mask takes the bits that an unsigned 64-bit product would have.
    product = word * factor
    return (product >> 32) & WORD, product & WORD

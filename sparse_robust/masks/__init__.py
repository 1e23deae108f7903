"""Masks over the prunable weights of a model: what is prunable, exact selection, and one immutable mask set."""

from sparse_robust.masks.mask_set import Masks
from sparse_robust.masks.prunable import fit_stem, prunable_weights, stem_weights
from sparse_robust.masks.select import cut, select_kth
from sparse_robust.masks.shards import Shard, shard_of
from sparse_robust.masks.wrappers import unwrap
from sparse_robust_kernels.select import Kth

__all__ = [
    "Kth",
    "Masks",
    "Shard",
    "cut",
    "fit_stem",
    "prunable_weights",
    "select_kth",
    "shard_of",
    "stem_weights",
    "unwrap",
]

"""The operations that are timed, one module each. Importing this package registers them."""

from sparse_robust.bench.operations import (
    kernels,
    mask_storage,
    masked_step,
    memory_format,
    optimizer_step,
    pgd,
    replica_refresh,
    robust_step,
    select,
    training_step,
)

__all__ = [
    "kernels",
    "mask_storage",
    "masked_step",
    "memory_format",
    "optimizer_step",
    "pgd",
    "replica_refresh",
    "robust_step",
    "select",
    "training_step",
]

"""The operations that are timed, one module each. Importing this package registers them."""

from sparse_robust.bench.operations import masked_step, optimizer_step, pgd, select, training_step

__all__ = ["masked_step", "optimizer_step", "pgd", "select", "training_step"]

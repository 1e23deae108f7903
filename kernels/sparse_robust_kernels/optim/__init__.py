"""Masked SGD and AdamW: one pass updates weights and slots, keeps what is pruned at +0.0, and writes a bf16 copy.

`MaskedSGD` and `MaskedAdamW` are drop-in optimizers; `sgd_` and `adamw_` are the operations under them.
"""

from __future__ import annotations

from sparse_robust_kernels.optim.operations import adamw_, sgd_, storage_bits, storage_integers
from sparse_robust_kernels.optim.optimizers import MaskedAdamW, MaskedSGD

__all__ = ["MaskedAdamW", "MaskedSGD", "adamw_", "sgd_", "storage_bits", "storage_integers"]

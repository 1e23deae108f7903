"""Operations of the robust inner loop: each with a plain torch reference, and kernels that mean the same.

Needs torch alone (and triton for the kernels). One folder an operation: ``reference.py`` is its meaning and CPU path.
"""

from sparse_robust_kernels._dispatch import backends, operations, resolve

__all__ = ["backends", "operations", "resolve"]

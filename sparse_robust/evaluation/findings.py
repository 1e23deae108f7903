"""What a check of a model or its data found, and the words it is told in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparse_robust.errors import UsageError

_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing found.

    Attributes:
        name: what was checked, the same in every report: ``image-range``, ``stochastic``...
        severity: ``error`` if an evaluation would fail or mean nothing, ``warning`` if its number may mislead.
        sentence: the number, what it means and what to do; it may take two or three.
    """

    name: str
    severity: Literal["error", "warning"]
    sentence: str


def has_errors(findings: Sequence[Finding]) -> bool:
    """Return whether any of them is an error."""
    return any(finding.severity == "error" for finding in findings)


def require_sound(findings: Sequence[Finding]) -> None:
    """Raise the errors among the findings; warnings are the caller's to show.

    Raises:
        UsageError: with the sentences of all errors.
    """
    errors = [finding.sentence for finding in findings if finding.severity == "error"]
    if errors:
        raise UsageError(" ".join(errors))


def describe(value: object) -> str:
    """Return a tensor's type and shape, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def ids_of(ids: Tensor | None, n: int) -> Tensor:
    """Return the sample ids on the CPU; None means 0..n-1."""
    return torch.arange(n) if ids is None else ids.detach().cpu()


def name_samples(ids: Tensor, chosen: Tensor) -> str:
    """Name the first of the chosen samples."""
    which = ids[chosen.cpu()].tolist()
    more = f" and {len(which) - _SHOWN} more" if len(which) > _SHOWN else ""
    return f"sample ids {', '.join(map(str, which[:_SHOWN]))}{more}"

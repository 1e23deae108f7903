"""The network that a configuration asks for: its classes and channels are those of the data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparse_robust.data import Data
from sparse_robust.errors import UsageError
from sparse_robust.models import ModelSpec


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """A timm network, to be fitted to a data set.

    Raises:
        UsageError: for a value that `ModelSpec` refuses.
    """

    name: str
    """A timm architecture, ``local-dir:PATH`` or ``hf-hub:ID``; see `ModelSpec`."""
    num_classes: int | None = None
    """None takes those of the data; a number is checked against them."""
    in_chans: int | None = None
    """None takes those of the images; a number is checked against them."""
    stem: str = "default"
    """``default``, or ``small`` for small images."""
    pretrained: bool = False
    """Whether timm fills the network with its published weights."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the timm constructor: JSON values."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kwargs", self.spec().kwargs)

    def spec(self, *, num_classes: int = 10, in_chans: int = 3) -> ModelSpec:
        """Return what builds it, with these classes and channels where it names none itself."""
        return ModelSpec(
            self.name, num_classes if self.num_classes is None else self.num_classes,
            in_chans if self.in_chans is None else self.in_chans, self.stem, self.pretrained, self.kwargs,
        )  # fmt: skip

    def for_data(self, data: Data) -> ModelSpec:
        """Return what builds it for a data set.

        Raises:
            UsageError: if it names other classes or channels than the data has.
        """
        spec = self.spec(num_classes=data.num_classes, in_chans=data.in_chans)
        if spec.num_classes != data.num_classes:
            raise UsageError(
                f"model.num_classes is {spec.num_classes} and {data.name} has {data.num_classes} classes: leave it "
                "out, the head is that of the data."
            )
        if spec.in_chans != data.in_chans:
            raise UsageError(
                f"model.in_chans is {spec.in_chans} and the images of {data.name} have {data.in_chans}: leave it out, "
                "or set data channels (1 or 3)."
            )
        return spec

"""What builds one architecture, as a value that goes into files and comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import nn

from sparse_robust.errors import UsageError, unknown
from sparse_robust.files import canonical_json
from sparse_robust.masks import unwrap

STEMS = ("default", "small")
_OWN_ARGUMENT = {
    "num_classes": "num_classes",
    "in_chans": "in_chans",
    "pretrained": "pretrained",
    "checkpoint_path": "checkpoint",
    "pretrained_cfg": "name, as local-dir:PATH or hf-hub:ID",
    "pretrained_cfg_overlay": "checkpoint",
    "cache_dir": "the environment variable HF_HOME",
}


@dataclass(frozen=True)
class ModelSpec:
    """The architecture of a model: equal specs build networks with the same parameter names and shapes.

    Raises:
        UsageError: for a value outside the ranges below, naming the field.
    """

    name: str
    """A timm architecture, with or without a weights tag (``resnet50``, ``resnet50.a1_in1k``), ``local-dir:PATH`` or
    ``hf-hub:ID``. The spec that a built model carries always has the plain name."""
    num_classes: int = 10
    """Classes of the head, 2 or more."""
    in_chans: int = 3
    """Channels of the images, 1 or more."""
    stem: str = "default"
    """``default``, or ``small`` for small images (see `use_small_stem`)."""
    pretrained: bool = False
    """Whether timm fills the network with its published weights; no part of the architecture."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the timm constructor: JSON values. Lists become tuples, None is left out. Never changed."""
    source: str = ""
    """Where a resolved name came from (``local-dir:...``, ``hf-hub:...``); no part of the architecture."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UsageError(f"a model is named by a text such as 'resnet18', not by {self.name!r}.")
        if not _is_int(self.num_classes) or self.num_classes < 2:
            raise UsageError(f"num_classes must be a whole number of 2 or more, got {self.num_classes!r}.")
        if not _is_int(self.in_chans) or self.in_chans < 1:
            raise UsageError(f"in_chans must be a whole number of 1 or more, got {self.in_chans!r}.")
        if self.stem not in STEMS:
            raise unknown("stem", str(self.stem), STEMS)
        if not isinstance(self.kwargs, Mapping):
            raise UsageError(f"kwargs must map names of timm arguments to values, got {self.kwargs!r}.")
        for key in self.kwargs:
            if key in _OWN_ARGUMENT:
                raise UsageError(f"{key!r} cannot be among the timm arguments: give {_OWN_ARGUMENT[key]} instead.")
        frozen = {key: _freeze(key, value) for key, value in self.kwargs.items() if value is not None}
        object.__setattr__(self, "kwargs", frozen)

    def __hash__(self) -> int:
        return hash(canonical_json(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as JSON values; `from_dict` turns them back into an equal spec."""
        return asdict(self) | {"kwargs": {key: _thaw(value) for key, value in self.kwargs.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSpec:
        """Return the spec that `to_dict` described.

        Raises:
            UsageError: for a key that is no field (nearest names first) or a value out of range.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("key of a model", str(key), known)
        if "name" not in values:
            raise UsageError(f"a model needs the key 'name', got only {', '.join(sorted(values)) or 'nothing'}.")
        return cls(**values)

    def with_(self, **changes: Any) -> ModelSpec:
        """Return this spec with some fields changed."""
        return replace(self, **changes)


def spec_of(model: nn.Module) -> ModelSpec:
    """Return the spec that ``model`` carries.

    Raises:
        UsageError: if the model was not built by `create_model` or `load_model`.
    """
    spec = find_spec(model)
    if spec is None:
        raise UsageError(f"this {type(model).__name__} carries no ModelSpec: build it with create_model or load_model.")
    return spec


def find_spec(model: nn.Module) -> ModelSpec | None:
    """Return the spec that ``model`` or the model inside its wrappers carries, if any."""
    spec = getattr(unwrap(model), "spec", None)
    return spec if isinstance(spec, ModelSpec) else None


def attach_spec(model: nn.Module, spec: ModelSpec) -> None:
    """Make ``spec`` the spec that ``model`` carries."""
    inner: Any = unwrap(model)
    inner.spec = spec


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _freeze(key: str, value: Any) -> Any:
    """Return ``value`` with every list made a tuple, after checking that JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(key, item) for item in value)
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) for name in value):
            raise UsageError(f"the timm argument {key!r} has a key that is no text: {list(value)!r}.")
        return {name: _freeze(key, item) for name, item in value.items()}
    plain = value is None or isinstance(value, (str, bool, int))
    if plain or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UsageError(
        f"the timm argument {key!r} must be made of JSON values, got {value!r}: a model's description goes into files. "
        "Name layers by text, as in act_layer='gelu'."
    )


def _thaw(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_thaw(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _thaw(item) for name, item in value.items()}
    return value

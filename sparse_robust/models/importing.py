"""Weights from strangers' files: every name is matched, dropped for a stated reason, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import unwrap
from sparse_robust.models.head import head_names
from sparse_robust.models.spec import find_spec
from sparse_robust.models.stem import stem_names

# Where training programs put the weights among the other things they save.
_CONTAINERS = ("model", "state_dict", "model_state_dict")
# What wrappers put before a name: DataParallel, robustness and Lightning, torch.compile, transfer code.
_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.")
# Parts of an adversarial-training wrapper that hold no weights of their own: the robustness library stores its
# attacker, with a second copy of all weights, and its normaliser.
_WRAPPERS = ("attacker", "normalizer")
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class ImportReport:
    """What became of every name.

    Fields:
        matched: names of the model that were filled from the file.
        ignored: names of the file that were dropped on purpose: a wrapper's parts, and values that are no tensors.
        missing: names of the model that the file lacks and may lack: batch-norm counters, an allowed new head.
        mismatched: names of the model that kept their values because the file's shape differs, where that was allowed.
    """

    matched: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = ("matched", "ignored", "missing", "mismatched")
        return "; ".join(f"{part} {_some(getattr(self, part))}" for part in parts)


def import_weights(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    allow_head_mismatch: bool = False,
    allow_stem_mismatch: bool = False,
    source: str = "the checkpoint",
) -> ImportReport:
    """Copy ``state`` into ``model``: all of it, or nothing and an error.

    Accepted are plain state dicts, the usual dictionaries around them (under ``model`` or ``state_dict``), the prefixes
    ``module.``, ``model.``, ``_orig_mod.`` and ``backbone.`` in any order, and the layout of the robustness library and
    of the robust ImageNet models of Salman et al. (2020): ``module.model.*`` beside ``module.attacker.*`` and
    ``module.normalizer.*``. Floating-point values are converted to the model's precision.

    Args:
        model: filled in place; unchanged when an error is raised.
        state: as `load_state` returns it.
        allow_head_mismatch: a head that is absent or of another shape leaves the model's whole head as it is.
        allow_stem_mismatch: a first convolution of another shape leaves the model's as it is.
        source: what errors call the file.

    Raises:
        UsageError: if a name of the model has no values, a name of the file no place, or shapes differ; the message
            names the first ones. Also for values that are NaN or infinite.
    """
    model = unwrap(model)
    expected = model.state_dict()
    found, ignored = named_tensors(state, expected, source)
    kept = _kept(model, expected, found, allow_head_mismatch, allow_stem_mismatch)
    matched = [name for name in expected if name in found and name not in kept and _fits(expected[name], found[name])]
    counters = [name for name in expected if name not in found and name.endswith(_COUNTER)]
    missing = [name for name in expected if name not in found and name not in kept and name not in counters]
    differing = [name for name in expected if name in found and name not in kept and name not in matched]
    extra = [name for name in found if name not in expected and name not in kept]
    if missing or differing or extra or not matched:
        raise UsageError(_misfit(model, source, expected, found, matched, missing, differing, extra))
    _check_finite(model, found, matched, source)
    with torch.no_grad():
        for name in matched:
            expected[name].copy_(found[name])
        for name in counters:
            expected[name].zero_()
    absent = (*counters, *(name for name in kept if name not in found))
    return ImportReport(tuple(matched), ignored, absent, tuple(name for name in kept if name in found))


def named_tensors(
    state: Mapping[str, Any], expected: Mapping[str, torch.Tensor], source: str
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Return the tensors of ``state`` under the model's names, and the names that were dropped.

    A prefix is taken off only where the name with it is unknown to the model.

    Raises:
        UsageError: if there is no tensor at all, or if two names of the file become one.
    """
    found: dict[str, torch.Tensor] = {}
    origin: dict[str, str] = {}
    ignored: list[str] = []
    for name, value in _contents(state).items():
        plain = _without_prefixes(str(name), expected)
        wrapped = plain not in expected and any(part in _WRAPPERS for part in str(name).split("."))
        if wrapped or not isinstance(value, torch.Tensor):
            ignored.append(str(name))
        elif plain in found:
            raise UsageError(f"{source} holds {plain} twice: as {origin[plain]!r} and as {name!r}. Keep one of them.")
        else:
            found[plain], origin[plain] = value, str(name)
    if not found:
        raise UsageError(f"{source} holds no weights: no tensor under {_some(tuple(map(str, state)))}.")
    return found, tuple(ignored)


def _contents(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the innermost state dict of a training program's dictionary."""
    for _ in range(3):  # a bound, because a file can hold a dictionary that contains itself
        inner = next((state[key] for key in _CONTAINERS if isinstance(state.get(key), (Mapping, nn.Module))), None)
        if inner is None:
            break
        state = inner.state_dict() if isinstance(inner, nn.Module) else inner
    return state


def _without_prefixes(name: str, expected: Mapping[str, torch.Tensor]) -> str:
    while name not in expected:
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            break
        name = name.removeprefix(prefix)
    return name


def _kept(
    model: nn.Module,
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    allow_head: bool,
    allow_stem: bool,
) -> tuple[str, ...]:
    """Return the names that keep the model's own values: an allowed part is taken whole or not at all."""
    kept: tuple[str, ...] = ()
    for allowed, names in ((allow_head, head_names(model)), (allow_stem, stem_names(model))):
        if allowed and not all(name in found and _fits(expected[name], found[name]) for name in names):
            kept += names
    return kept


def _fits(own: torch.Tensor, other: torch.Tensor) -> bool:
    return own.shape == other.shape and own.is_floating_point() == other.is_floating_point()


def _check_finite(model: nn.Module, found: Mapping[str, torch.Tensor], names: list[str], source: str) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters and not bool(torch.isfinite(found[name]).all()):
            raise UsageError(f"{source} holds NaN or infinity in {name}: it is damaged or its training diverged.")


def _misfit(
    model: nn.Module,
    source: str,
    expected: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    matched: list[str],
    missing: list[str],
    differing: list[str],
    extra: list[str],
) -> str:
    spec = find_spec(model)
    name = spec.name if spec else type(model).__name__
    shapes = tuple(f"{key} {list(found[key].shape)} instead of {list(expected[key].shape)}" for key in differing)
    parts = [f"{source} does not fit {name}: {len(matched)} of its {len(expected)} tensors match"]
    parts += [f"missing {_some(tuple(missing))}"] if missing else []
    parts += [f"of another shape or kind {_some(shapes)}"] if shapes else []
    parts += [f"unknown to the model {_some(tuple(extra))}"] if extra else []
    head, stem = set(head_names(model)), set(stem_names(model))
    if not matched and [v.shape for v in found.values()] == [v.shape for v in expected.values()]:
        advice = "All shapes agree in their order: import_by_position loads it if the order is the architecture's."
    elif {*missing, *differing, *extra} <= head:
        advice = "Only the head differs: build the model with the file's class count, or pass allow_head_mismatch=True."
    elif {*missing, *differing, *extra} <= head | stem:
        advice = "The first convolution differs: check in_chans and stem."
    else:
        advice = "Build the architecture that the file was made for."
    return f"{'; '.join(parts)}. Nothing was loaded. {advice}"


def _some(names: tuple[str, ...], limit: int = 5) -> str:
    """Return the count and the first names."""
    shown = ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
    return f"{len(names)}" + (f" ({shown})" if names else "")

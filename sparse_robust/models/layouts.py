"""How other programs lay out a weights file: what wraps names, what normalises images, what masks weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, cut
from sparse_robust.models.report import some

# Where training programs put the weights among the other things they save.
CONTAINERS = ("model", "state_dict", "model_state_dict")
# What wrappers put before a name: DataParallel, robustness and Lightning, torch.compile, transfer code, FSDP, and
# nn.Sequential(normalise, model).
PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "_fsdp_wrapped_module.", "1.")
# What wrappers of a part of the network put into a name: DataParallel around VGG's features, compiled blocks.
INSIDE = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Parts of an adversarial-training wrapper that hold no weights of their own: the robustness library stores its
# attacker, with a second copy of all weights.
ATTACKERS = frozenset({"attacker"})
# Modules that normalise images: robustness, RobustBench, advertorch in an nn.Sequential; and their buffers, which some
# robust networks hold themselves.
NORMALISERS = frozenset({"normalizer", "normalize", "norm_layer", "0"})
STATISTICS = {"mean": 0, "new_mean": 0, "mu": 0, "std": 1, "new_std": 1, "sigma": 1}
# torch.nn.utils.prune stores a weight as these two; HYDRA and hidden networks store scores beside it.
ORIGINAL, MASK, SCORES = "_orig", "_mask", "popup_scores"

MOST_CHANNELS = 1024
"""Of images, and so numbers in a mean."""

LARGE = 1 << 28
"""Numbers in a tensor that repeats few of them: more would fill the memory as soon as they are looked at."""

Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class Contents:
    """What is in a weights file, under the model's names.

    Fields:
        tensors: by name, masked where the file holds masks.
        ignored: names that were dropped: a wrapper's parts, and values that are no tensors.
        masks: what the file says is kept, if it holds masks or scores.
        normalization: (mean, std) of the file's normaliser, if it has one.
    """

    tensors: dict[str, Tensor]
    ignored: tuple[str, ...] = ()
    masks: dict[str, Tensor] = field(default_factory=dict)
    normalization: Statistics | None = None

    def kept(self, names: list[str]) -> Masks | None:
        """Return the masks among ``names``, in that order, or None without any."""
        found = {name: self.masks[name] for name in names if name in self.masks}
        return Masks.from_bools(found) if found else None


def read_contents(
    state: Mapping[str, Any], expected: Mapping[str, Tensor], source: str, density: float | None = None
) -> Contents:
    """Sort what `load_state` returned: tensors under the model's names, masks and statistics out of their disguises.

    Args:
        state: a state dict, or a training program's dictionary around one.
        expected: the model's state dict. A prefix is taken off only where the name with it is unknown to the model.
        source: what errors call the file.
        density: share of the weights to keep in each layer that comes with scores, 0 to 1; None takes the ``k`` that
            the file may hold.

    Raises:
        UsageError: if there is no tensor at all, two names become one, two normalisers differ, masks do not fit their
            weights, or scores come without a density.
    """
    found: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    ignored: list[str] = []
    statistics: dict[str, Tensor] = {}
    for name, value in state_dict_in(state).items():
        full = str(name)
        plain = _plain(full, expected)
        parts = full.split(".")
        if isinstance(value, Tensor) and plain not in expected and _is_statistic(parts, plain, value):
            statistics[full] = value
        elif not isinstance(value, Tensor) or (plain not in expected and ATTACKERS.intersection(parts)):
            ignored.append(full)
        elif plain in found:
            raise UsageError(f"{source} holds {plain} twice: as {origin[plain]!r} and as {full!r}. Keep one of them.")
        else:
            found[plain], origin[plain] = _dense(value, full, source), full
    if not found:
        raise UsageError(f"{source} holds no weights: no tensor under {some(tuple(map(str, state)))}.")
    contents = Contents(found, tuple(ignored), normalization=_normalization(statistics, source))
    return _unmask(contents, source, density if density is not None else _stored_density(state))


def state_dict_in(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the innermost state dict of a training program's dictionary."""
    for _ in range(3):  # a bound, because a file can hold a dictionary that contains itself
        inner = next((state[key] for key in CONTAINERS if isinstance(state.get(key), (Mapping, nn.Module))), None)
        if inner is None:
            break
        state = inner.state_dict() if isinstance(inner, nn.Module) else inner
    return state


# --- names


def _plain(name: str, expected: Mapping[str, Tensor]) -> str:
    """Return the name without what wrappers added to it."""
    known = expected.__contains__
    stripped = name
    while not known(_weight_of(stripped)):
        prefix = next((prefix for prefix in PREFIXES if stripped.startswith(prefix)), None)
        if prefix is None:
            break
        stripped = stripped.removeprefix(prefix)
    if known(_weight_of(stripped)):
        return stripped
    inner = ".".join(part for part in stripped.split(".") if part not in INSIDE)
    return inner if known(_weight_of(inner)) else stripped


def _weight_of(name: str) -> str:
    """Return the name of the weight that an original, a mask or scores belong to; other names as they are."""
    if name.endswith((ORIGINAL, MASK)):
        return name.removesuffix(ORIGINAL).removesuffix(MASK)
    return f"{name.removesuffix(SCORES)}weight" if name.rpartition(".")[2] == SCORES else name


def _dense(value: Tensor, name: str, source: str) -> Tensor:
    kind = "quantized" if value.is_quantized else "without values" if value.is_meta else str(value.layout)
    if kind == "torch.strided" and value.numel() > LARGE and value.untyped_storage().nbytes() < value.nbytes:
        kind = f"{list(value.shape)} made of {value.untyped_storage().nbytes()} bytes"
    if kind != "torch.strided":
        raise UsageError(f"{source}: {name} is {kind}; expected an ordinary dense tensor. Convert the file first.")
    return value.detach()


# --- normalisation


def _is_statistic(parts: list[str], plain: str, value: Tensor) -> bool:
    """Tell whether a tensor is the mean or the deviation of a layer that normalises images."""
    if parts[-1] not in STATISTICS or not value.is_floating_point() or value.numel() > MOST_CHANNELS:
        return False
    return bool(NORMALISERS.intersection(parts[:-1])) or (plain in STATISTICS and value.ndim >= 3)


def _normalization(found: Mapping[str, Tensor], source: str) -> Statistics | None:
    """Return the one (mean, std) that all normalisers of a file agree on.

    Raises:
        UsageError: if they disagree, or one has only a mean or a deviation.
    """
    pairs: dict[str, list[tuple[float, ...] | None]] = {}
    for name, value in found.items():
        place, _, kind = name.rpartition(".")
        pairs.setdefault(place, [None, None])[STATISTICS[kind]] = tuple(value.double().flatten().tolist())
    known: tuple[str, Statistics] | None = None
    for place, (mean, std) in pairs.items():
        if mean is None or std is None:
            raise UsageError(f"{source} normalises images by half: {place or 'it'} lacks a mean or a deviation.")
        if known is not None and not same_statistics(known[1], (mean, std)):
            raise UsageError(
                f"{source} holds two normalisers that differ: {known[0]} with {show(known[1])}, and {place} with "
                f"{show((mean, std))}. Say which one counts, by leaving the other out of the file."
            )
        known = known or (place, (mean, std))
    return known[1] if known else None


def same_statistics(first: Statistics, second: Statistics) -> bool:
    """Tell whether two (mean, std) are the same to four digits, one number standing for all channels."""
    for a, b in zip(first, second, strict=True):
        size = max(len(a), len(b))
        if len(a) not in (1, size) or len(b) not in (1, size):
            return False
        pairs = zip(a * (size // len(a)), b * (size // len(b)), strict=True)
        if not all(math.isclose(x, y, rel_tol=1e-4, abs_tol=1e-6) for x, y in pairs):
            return False
    return True


def show(statistics: Statistics) -> str:
    """Return (mean, std) as text with four digits."""
    return ", ".join(
        f"{kind} ({', '.join(f'{value:.4g}' for value in values)})"
        for kind, values in zip(("mean", "std"), statistics, strict=True)
    )


# --- masks


def _unmask(contents: Contents, source: str, density: float | None) -> Contents:
    """Return the contents with masks and scores turned into masked weights and masks."""
    tensors, masks = dict(contents.tensors), {}
    for name in contents.tensors:
        if name.endswith(MASK) and (weight := _take(tensors, name.removesuffix(MASK), source)) is not None:
            masks[name.removesuffix(MASK)] = _kept_by_mask(tensors.pop(name), weight, name, source)
            tensors[name.removesuffix(MASK)] = weight
    scored = {n: w for n in tensors if (w := _weight_of(n)) != n and n.rpartition(".")[2] == SCORES and w in tensors}
    if scored:
        keep = _share(density, source)
        for name, scored_weight in scored.items():
            masks[scored_weight] = _kept_by_scores(tensors.pop(name), tensors[scored_weight], keep, name, source)
    for name, kept in masks.items():
        tensors[name] = tensors[name].masked_fill(~kept, 0)
    pruned = {name: kept for name, kept in masks.items() if kept.ndim > 1 or not bool(kept.all())}
    return replace(contents, tensors=tensors, masks=pruned)


def _take(tensors: dict[str, Tensor], name: str, source: str) -> Tensor | None:
    """Remove the values that a mask belongs to: under their original name, or under their own."""
    original, plain = tensors.pop(name + ORIGINAL, None), tensors.pop(name, None)
    if original is not None and plain is not None:
        raise UsageError(f"{source} holds {name} twice: as {name} and as {name + ORIGINAL}. Keep one of them.")
    return plain if original is None else original


def _kept_by_mask(mask: Tensor, weight: Tensor, name: str, source: str) -> Tensor:
    if mask.shape != weight.shape:
        raise UsageError(f"{source}: {name} has shape {list(mask.shape)} and its weight {list(weight.shape)}.")
    kept = mask != 0
    if not bool(((mask == 1) | ~kept).all()):
        raise UsageError(f"{source}: {name} is no mask: it holds other values than 0 and 1.")
    return kept


def _kept_by_scores(scores: Tensor, weight: Tensor, density: float, name: str, source: str) -> Tensor:
    """Return what HYDRA keeps of one layer: all but the ``int((1 - k) n)`` lowest absolute scores.

    Source: the forward pass of Sehwag et al., 2020, after Ramanujan et al., 2020. Ties are broken by flat index.
    """
    if scores.shape != weight.shape or not scores.is_floating_point():
        raise UsageError(
            f"{source}: {name} is {scores.dtype} {list(scores.shape)}; expected a score for each weight of "
            f"{list(weight.shape)}."
        )
    try:
        return cut({name: scores.float()}, int((1 - density) * scores.numel()), magnitude=True)[name]
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from error


def _share(density: float | None, source: str) -> float:
    if density is None:
        raise UsageError(
            f"{source} holds scores (popup_scores) and does not say how many weights they keep: give density=, the k "
            "of its training program (0.1 keeps 10 % of each layer)."
        )
    if not 0 < density <= 1:
        raise UsageError(f"density is a share of the weights, above 0 and at most 1; got {density!r}.")
    return density


def _stored_density(state: Mapping[str, Any]) -> float | None:
    """Return the ``k`` that a file holds itself or among its program's options."""
    options = state.get("args")
    values = (state.get("k"), getattr(options, "k", None), options.get("k") if isinstance(options, Mapping) else None)
    numbers = (value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool))
    return next((float(value) for value in numbers), None)


def translated(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors under timm's names, where timm knows the layout of another library (torchvision's VGG).

    Only names and shapes may change: what timm would resample or drop counts as no translation.
    """
    import sys

    module = sys.modules[type(model).__module__]
    convert: Callable[..., Any] | None = getattr(module, "checkpoint_filter_fn", None)
    convert = convert or getattr(module, "_filter_fn", None)
    if convert is None:
        return None
    for arguments in ((dict(tensors), model), (dict(tensors),)):
        try:
            found = convert(*arguments)
        except Exception:  # it was written for files of one kind, and fails on others in any way
            continue
        expected = model.state_dict()
        if isinstance(found, Mapping) and {n: tuple(v.shape) for n, v in found.items()} == {
            name: tuple(value.shape) for name, value in expected.items()
        }:
            sizes = sum(value.numel() for value in tensors.values()), sum(v.numel() for v in found.values())
            return dict(found) if sizes[0] == sizes[1] else None
    return None

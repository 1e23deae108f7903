"""Weights from strangers' files: every name is matched, dropped for a stated reason, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import unwrap
from sparse_robust.models.head import head_names
from sparse_robust.models.layouts import Contents, read_contents, same_statistics, show, translated
from sparse_robust.models.normalization import get_normalization, set_normalization
from sparse_robust.models.report import CheckpointMismatch, ImportReport, some
from sparse_robust.models.spec import find_spec
from sparse_robust.models.stem import stem_names
from sparse_robust.models.suggest import classes_in, fitting

_COUNTER = "num_batches_tracked"


def import_weights(
    model: nn.Module,
    state: Mapping[str, Any],
    *,
    allow_head_mismatch: bool = False,
    allow_stem_mismatch: bool = False,
    density: float | None = None,
    keep_normalization: bool = False,
    source: str = "the checkpoint",
) -> ImportReport:
    """Copy ``state`` into ``model``: all of it, or nothing and an error.

    Accepted are plain state dicts, the usual dictionaries around them (under ``model`` or ``state_dict``), what
    wrappers put before or into names (``module.``, ``model.``, ``_orig_mod.``, ``backbone.``, FSDP's, in any nesting),
    torchvision's names where timm knows them, and

    - the robustness library and the robust ImageNet models of Salman et al. (2020): ``module.model.*`` beside
      ``module.attacker.*`` and ``module.normalizer.*``. The mean and deviation of a normaliser become the model's own
      (`set_normalization`);
    - ``weight_orig`` and ``weight_mask`` of ``torch.nn.utils.prune``, and ``popup_scores`` of HYDRA (Sehwag et al.,
      2020): the weights are loaded masked, and the masks are in the report.

    Floating-point values are converted to the model's precision.

    Args:
        model: filled in place; unchanged when an error is raised.
        state: as `load_state` returns it.
        allow_head_mismatch: a head that is absent or of another shape leaves the model's whole head as it is.
        allow_stem_mismatch: a first convolution of another shape leaves the model's as it is.
        density: for a file with scores, the share of each layer's weights to keep (HYDRA's ``k``).
        keep_normalization: the model's mean and deviation stay, and those of the file must be the same.
        source: what errors call the file.

    Raises:
        CheckpointMismatch: if a name of the model has no values, a name of the file no place, or shapes differ; the
            message names the first ones and says what the file fits.
        UsageError: for values that are NaN or infinite, masks that do not fit their weights, or normalisers that do not
            agree.
    """
    model = unwrap(model)
    expected = model.state_dict()
    contents = read_contents(state, expected, source, density)
    placed = _place(model, expected, contents, allow_head_mismatch, allow_stem_mismatch)
    if _refused(placed):
        converted = None if contents.masks else translated(model, contents.tensors)
        if converted is None:
            raise CheckpointMismatch(_misfit(model, source, expected, contents, placed, state), placed)
        contents = replace(contents, tensors=converted)
        placed = _place(model, expected, contents, allow_head_mismatch, allow_stem_mismatch)
    _check_finite(model, contents.tensors, placed.matched, source)
    _normalize_as(model, contents, keep_normalization, source)
    with torch.no_grad():
        for name in placed.matched:
            expected[name].copy_(contents.tensors[name])
        for name in placed.missing:
            if name.endswith(_COUNTER):
                expected[name].zero_()
    masks = contents.kept([name for name in placed.matched if name in contents.masks])
    return replace(placed, masks=masks, normalization=contents.normalization)


def _place(
    model: nn.Module, expected: Mapping[str, Tensor], contents: Contents, allow_head: bool, allow_stem: bool
) -> ImportReport:
    """Return where every name goes. What must not be missing, mismatched or unknown still stands under those words."""
    found = contents.tensors
    kept = _kept(model, expected, found, allow_head, allow_stem)
    fits = [name for name in expected if name in found and name not in kept and _fits(expected[name], found[name])]
    return ImportReport(
        matched=tuple(fits),
        ignored=contents.ignored,
        missing=tuple(name for name in expected if name not in found),
        mismatched=tuple(name for name in expected if name in found and (name in kept or name not in fits)),
        unknown=tuple(name for name in found if name not in expected),
        allowed=kept,
    )


def _refused(placed: ImportReport) -> bool:
    return bool(not placed.matched or placed.unknown or _wrong(placed))


def _wrong(placed: ImportReport) -> list[str]:
    """Return the names of the model that the file should have filled and does not."""
    absent = [name for name in placed.missing if not name.endswith(_COUNTER)]
    return [name for name in (*absent, *placed.mismatched) if name not in placed.allowed]


def _kept(
    model: nn.Module,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    allow_head: bool,
    allow_stem: bool,
) -> tuple[str, ...]:
    """Return the names that keep the model's own values: an allowed part is taken whole or not at all."""
    kept: tuple[str, ...] = ()
    for allowed, names in ((allow_head, head_names(model)), (allow_stem, stem_names(model))):
        if allowed and not all(name in found and _fits(expected[name], found[name]) for name in names):
            kept += names
    return kept


def _fits(own: Tensor, other: Tensor) -> bool:
    return own.shape == other.shape and own.is_floating_point() == other.is_floating_point()


def _check_finite(model: nn.Module, found: Mapping[str, Tensor], names: tuple[str, ...], source: str) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name in parameters and not bool(torch.isfinite(found[name]).all()):
            raise UsageError(f"{source} holds NaN or infinity in {name}: it is damaged or its training diverged.")


def _normalize_as(model: nn.Module, contents: Contents, keep: bool, source: str) -> None:
    """Make the file's normaliser the model's, or check that they are the same."""
    theirs, ours = contents.normalization, get_normalization(model)
    if theirs is None:
        return
    if keep and (ours is None or not same_statistics(theirs, ours)):
        raise UsageError(
            f"{source} normalises images with {show(theirs)}, and the model with {show(ours) if ours else 'nothing'}. "
            "Nothing was loaded. Leave out mean and std to take those of the file."
        )
    if not keep:
        try:
            set_normalization(model, *theirs)
        except UsageError as error:
            raise UsageError(f"{source} has a normaliser that does not fit: {error} Nothing was loaded.") from error


def _misfit(
    model: nn.Module,
    source: str,
    expected: Mapping[str, Tensor],
    contents: Contents,
    placed: ImportReport,
    state: Mapping[str, Any],
) -> str:
    spec, found = find_spec(model), contents.tensors
    name = spec.name if spec else type(model).__name__
    wrong = set(_wrong(placed))
    missing = tuple(key for key in placed.missing if key in wrong)
    differing = tuple(key for key in placed.mismatched if key in wrong)
    shapes = tuple(f"{key} {list(found[key].shape)} instead of {list(expected[key].shape)}" for key in differing)
    parts = [f"{source} does not fit {name}: {len(placed.matched)} of its {len(expected)} tensors match"]
    parts += [f"missing {some(missing)}"] if missing else []
    parts += [f"of another shape or kind {some(shapes)}"] if shapes else []
    parts += [f"unknown to the model {some(placed.unknown)}"] if placed.unknown else []
    advice = _advice(model, expected, found, wrong | set(placed.unknown), bool(placed.matched), state)
    return f"{'; '.join(parts)}. Nothing was loaded. {advice}"


def _advice(
    model: nn.Module,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    wrong: set[str],
    matched: bool,
    state: Mapping[str, Any],
) -> str:
    head, stem = head_names(model), stem_names(model)
    if not matched and [v.shape for v in found.values()] == [v.shape for v in expected.values()]:
        return "All shapes agree in their order: import_by_position loads it if the order is the architecture's."
    if wrong <= set(head):
        classes = classes_in(head, found)
        count = f"the file's class count (num_classes={classes})" if classes else "the file's class count"
        return f"Only the head differs: build the model with {count}, or pass allow_head_mismatch=True."
    if wrong <= {*head, *stem}:
        return "The first convolution differs: check in_chans and stem."
    fits = fitting(found)
    if fits:
        return f"The file fits {' or '.join(fits)}."
    says = next((state[key] for key in ("arch", "architecture") if isinstance(state.get(key), str)), None)
    named = f" It says of itself that it is a {says[:60]!r}." if says else ""
    return f"Build the architecture that the file was made for.{named}"

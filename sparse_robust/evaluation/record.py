"""The record of an evaluation: one JSON object, in the fields of RobustBench and those that a sparse network adds."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, cast

import torch
from torch import nn

from sparse_robust._version import __version__
from sparse_robust.attacks.autoattack import VERSIONS
from sparse_robust.attacks.budget import parse_eps
from sparse_robust.attacks.context import Model
from sparse_robust.attacks.norms import NORMS
from sparse_robust.errors import UsageError, unknown
from sparse_robust.evaluation.verdicts import Verdicts
from sparse_robust.files import write_json
from sparse_robust.masks import Masks, unwrap
from sparse_robust.masks.wrappers import find_parameters
from sparse_robust.models.spec import find_spec


class Evaluated(Protocol):
    """What a record and the tables need of an `Evaluation`; the fields are explained there."""

    @property
    def clean(self) -> float: ...
    @property
    def robust(self) -> float: ...
    @property
    def robust_after(self) -> tuple[float, ...]: ...
    @property
    def stages(self) -> tuple[tuple[str, float], ...]: ...
    @property
    def per_image(self) -> Verdicts: ...
    @property
    def counts(self) -> dict[str, int]: ...
    @property
    def flips(self) -> dict[str, int]: ...


class AttackRecord(TypedDict):
    """An attack that ran, and the robust accuracy after it and all before it, in percent."""

    attack: str
    eps: str
    robust_acc: str


class RobustnessRecord(TypedDict):
    """The fields of a record, in the order they are written.

    ==================  ================================================================================
    name                of the model, free text
    dataset             whose test images were evaluated
    threat_model        ``Linf``, ``L2`` or ``L1``
    eps                 radius, ``8/255`` or ``0.5``
    clean_acc           percent with two decimals, as text, like all accuracies here and in RobustBench
    autoattack_acc      only if the attacks were AutoAttack's standard version and no others
    robust_acc          under all attacks at this eps and at smaller ones
    attacks             the attacks up to this eps in the order they ran, each with the accuracy after it
    images              how many were evaluated
    architecture        name of the network
    parameters          numbers in all parameters, zeros included; null for a plain function
    additional_data     whether other data than the data set's own were trained on
    footnote            free text
    sparsity            pruned weights over prunable weights, 0 to 1
    sparsity_all        pruned weights over all parameters, 0 to 1
    pattern             of the masks: ``unstructured``, ``2:4``, ``channel``...
    remaining_params    parameters less the pruned weights
    ticket              digest of the masks, 64 hexadecimal digits; empty for a dense network
    counts              passes of images through the model: ``forward``, ``backward``, ``queries``
    flips               candidates of a lower precision or a copy, and those that the model rejected
    flags               alarms: sentences that say why the number may be too high
    versions            of this package, torch and Python
    machine             where it was measured
    date                ISO 8601, as given
    ==================  ================================================================================
    """

    name: str
    dataset: str
    threat_model: str
    eps: str
    clean_acc: str
    autoattack_acc: NotRequired[str]
    robust_acc: str
    attacks: list[AttackRecord]
    images: int
    architecture: str
    parameters: int | None
    additional_data: bool
    footnote: str
    sparsity: float
    sparsity_all: float | None
    pattern: str
    remaining_params: int | None
    ticket: str
    counts: dict[str, int]
    flips: dict[str, int]
    flags: list[str]
    versions: dict[str, str]
    machine: dict[str, Any]
    date: str


_FIELDS = tuple(RobustnessRecord.__annotations__)


def make_record(
    evaluation: Evaluated,
    model: Model,
    *,
    name: str,
    dataset: str,
    date: str,
    norm: str = "Linf",
    eps: str | float | None = None,
    version: str | None = None,
    masks: Masks | None = None,
    pattern: str = "unstructured",
    architecture: str | None = None,
    additional_data: bool = False,
    footnote: str = "",
    flags: Sequence[str] = (),
    machine: object = None,
) -> RobustnessRecord:
    """Return the record of an evaluation; equal arguments give equal records.

    Args:
        evaluation: with at least one attack.
        model: the one evaluated.
        date: when, ISO 8601.
        norm: of all attacks.
        eps: which of several radii the record is about; None for the only one.
        version: of AutoAttack, if that is what ran.
        masks: of a sparse model, applied to it.
        architecture: None takes it from the model.
        flags: sentences of the alarms that went off.
        machine: a mapping or a dataclass, such as `sparse_robust.bench.machines.Machine`.

    Raises:
        UsageError: without attacks; for an eps that was not evaluated; if ``version`` is ``standard`` and other attacks
            ran; if pruned weights of the model are not zero.
    """
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    radius = _radius(evaluation, eps)
    attacks = _attacks(evaluation, radius)
    robust = attacks[-1]["robust_acc"]
    parameters = _count(model)
    pruned = 0 if masks is None else _pruned(model, masks)
    record = RobustnessRecord(
        name=name, dataset=dataset, threat_model=norm, eps=eps_text(radius), clean_acc=_percent(evaluation.clean),
        robust_acc=robust, attacks=attacks, images=len(evaluation.per_image),
        architecture=_architecture(model) if architecture is None else architecture, parameters=parameters,
        additional_data=additional_data, footnote=footnote,
        sparsity=0.0 if masks is None else masks.sparsity,
        sparsity_all=None if parameters is None else pruned / max(parameters, 1), pattern=pattern,
        remaining_params=None if parameters is None else parameters - pruned,
        ticket="" if masks is None else masks.digest(), counts=dict(evaluation.counts), flips=dict(evaluation.flips),
        flags=list(flags), versions=_versions(), machine=_plain(machine), date=date,
    )  # fmt: skip
    if version == "standard":
        _require_standard(evaluation, radius)
        record["autoattack_acc"] = robust
    written: dict[str, Any] = dict(record)
    return cast(RobustnessRecord, {field: written[field] for field in _FIELDS if field in written})


def write_record(path: str | Path, record: RobustnessRecord) -> None:
    """Write a record as indented JSON, atomically; its fields keep their order."""
    write_json(path, record)


def eps_text(eps: float) -> str:
    """Write a radius as people do: ``8/255`` where it is a whole or half number of 255ths, otherwise as a decimal."""
    pixels = eps * 255
    if float(f"{eps:.3g}") == eps:
        return f"{eps:g}"
    if math.isclose(2 * pixels, round(2 * pixels), rel_tol=1e-6):
        return f"{round(2 * pixels) / 2:g}/255"
    return f"{eps:.6g}"


def robust_at(evaluation: Evaluated) -> dict[float, float]:
    """Return the robust accuracy (0 to 1) for each radius, ascending: after all attacks of that and smaller radii."""
    last = {eps: robust for (_, eps), robust in zip(evaluation.stages, evaluation.robust_after, strict=True)}
    return dict(sorted(last.items()))


def _radius(evaluation: Evaluated, eps: str | float | None) -> float:
    radii = sorted({radius for _, radius in evaluation.stages})
    if not radii:
        raise UsageError("a robustness record needs an evaluation with at least one attack, and this one has none.")
    known = ", ".join(map(eps_text, radii))
    if eps is None:
        if len(radii) > 1:
            raise UsageError(f"this evaluation has several radii: say with eps which one the record is about: {known}.")
        return radii[0]
    wanted = parse_eps(eps)
    found = [radius for radius in radii if math.isclose(radius, wanted, rel_tol=1e-6)]
    if not found:
        raise UsageError(f"this evaluation has no attack at eps {eps!r}; it has {known}.")
    return found[0]


def _attacks(evaluation: Evaluated, radius: float) -> list[AttackRecord]:
    return [
        AttackRecord(attack=name, eps=eps_text(eps), robust_acc=_percent(robust))
        for (name, eps), robust in zip(evaluation.stages, evaluation.robust_after, strict=True)
        if eps <= radius
    ]


def _require_standard(evaluation: Evaluated, radius: float) -> None:
    ran = sorted({name for name, eps in evaluation.stages if eps <= radius})
    if ran != sorted(VERSIONS["standard"]):
        raise UsageError(
            f"AutoAttack's standard version is {', '.join(VERSIONS['standard'])}, and these attacks ran: "
            f"{', '.join(ran)}. Leave out version='standard': robust_acc then holds what they reached."
        )


def _count(model: Model) -> int | None:
    return sum(p.numel() for p in unwrap(model).parameters()) if isinstance(model, nn.Module) else None


def _pruned(model: Model, masks: Masks) -> int:
    """Return how many weights are pruned, after checking that they are zero in the model."""
    if not isinstance(model, nn.Module):
        raise UsageError("masks belong to the weights of an nn.Module; of a plain function they say nothing.")
    for name, weight in find_parameters(model, masks.shapes()).items():
        left = int((weight.detach()[~masks.on(name, weight.device)] != 0).sum())
        if left:
            raise UsageError(
                f"{left} pruned weights of {name} are not zero in this model: apply the masks before it is evaluated "
                "(masks.apply_(model)), or leave them out of the record."
            )
    return masks.numel() - masks.count()


def _architecture(model: Model) -> str:
    if not isinstance(model, nn.Module):
        return getattr(model, "__name__", type(model).__name__)
    spec = find_spec(model)
    return spec.name if spec else type(unwrap(model)).__name__


def _versions() -> dict[str, str]:
    return {"sparse_robust": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _plain(machine: object) -> dict[str, Any]:
    if is_dataclass(machine) and not isinstance(machine, type):
        return asdict(machine)
    return dict(machine) if isinstance(machine, Mapping) else {}


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"

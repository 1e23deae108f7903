"""Architectures from timm: names and folders resolved, timm's errors in our words."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from sparse_robust.errors import FileError, UsageError, unknown
from sparse_robust.models.head import replace_head
from sparse_robust.models.sizes import check_classifier
from sparse_robust.models.spec import ModelSpec, attach_spec
from sparse_robust.models.stem import use_small_stem
from sparse_robust.seeding import seeded

_log = logging.getLogger(__name__)


def build_model(spec: ModelSpec, *, seed: int = 0, pretrained: bool = False) -> nn.Module:
    """Build the architecture that ``spec`` describes, without normalisation; ``pretrained`` also loads timm's weights.

    The model carries the spec with a ``local-dir:`` or ``hf-hub:`` name resolved, so that the spec alone rebuilds it.

    Raises:
        UsageError, FileError: as `create_model`.
    """
    _check_name(spec.name)
    with seeded("model", seed):
        # Published weights are loaded with their own head: timm checks names strictly only then.
        model = _timm_model(spec, pretrained, None if pretrained else spec.num_classes)
    attach_spec(model, _resolved(spec.with_(pretrained=pretrained, stem="default"), model))
    if pretrained and getattr(model, "num_classes", None) != spec.num_classes:
        replace_head(model, spec.num_classes, seed)
    if spec.stem == "small":
        new = use_small_stem(model, seed)
        report_new_stem(spec.name, set(new) if pretrained else set())
    check_classifier(model)
    return model


def report_new_stem(name: str, new: set[str]) -> None:
    """Log that loaded values of the weights ``new`` were given up for the small stem."""
    if new:
        _log.warning(
            "%s: stem='small' starts %s afresh, because the loaded values belong to another stem. "
            "A mask made for them does not fit it.",
            name,
            ", ".join(sorted(new)),
        )


def _check_name(name: str) -> None:
    from timm.models import get_arch_pretrained_cfgs, is_model, list_models, parse_model_name, split_model_name_tag

    if Path(name).suffix in (".safetensors", ".pt", ".pth", ".ckpt", ".bin") and Path(name).is_file():
        raise UsageError(
            f"{name} is a weights file, not a model's name: give the architecture as name and this file as "
            "checkpoint=, or load it with load_model if save_model wrote it."
        )
    try:
        source, plain = parse_model_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if source:
        return
    architecture, tag = split_model_name_tag(plain)
    if not is_model(architecture):
        raise unknown("model", architecture, list_models())
    tags = [known.partition(".")[2] for known in get_arch_pretrained_cfgs(architecture)]
    if tag and tag not in tags:
        raise unknown(f"weights tag of {architecture}", tag, tags)


def _timm_model(spec: ModelSpec, pretrained: bool, num_classes: int | None) -> nn.Module:
    """Let timm build the network, and say in our words what went wrong where it does not."""
    import timm  # here, because it takes seconds and most of the package does not need it
    from safetensors import SafetensorError

    try:
        return timm.create_model(
            spec.name, pretrained=pretrained, in_chans=spec.in_chans, num_classes=num_classes, **spec.kwargs
        )
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"cannot read {spec.name}{' with its weights' if pretrained else ''}: {str(error).rstrip('.')}. "
            "Without a connection to the Hub use local-dir:FOLDER or checkpoint=FILE."
        ) from error
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError, AttributeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in {"in_chans": spec.in_chans, **spec.kwargs}.items())
        raise UsageError(
            f"timm cannot build {spec.name} with {given}{' and its weights' if pretrained else ''}: "
            f"{type(error).__name__}: {error}"
        ) from error


def _resolved(spec: ModelSpec, model: Any) -> ModelSpec:
    """Return ``spec`` with a folder or Hub id replaced by the architecture and the arguments found there."""
    from timm.models import load_model_config_from_hf, parse_model_name

    source, identifier = parse_model_name(spec.name)
    if not source:
        return spec
    if source == "hf-hub":
        arguments = load_model_config_from_hf(identifier)[2]
    else:
        arguments = json.loads((Path(identifier) / "config.json").read_text(encoding="utf-8")).get("model_args", {})
    record = model.pretrained_cfg
    if record.get("fixed_input_size"):  # timm took the size from the record, which the plain name does not have
        arguments = {"img_size": record["input_size"][-2:], **arguments}
    arguments = {key: value for key, value in arguments.items() if key not in ("num_classes", "in_chans")}
    return spec.with_(name=record["architecture"], kwargs={**arguments, **spec.kwargs}, source=spec.name)

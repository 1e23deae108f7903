"""Which architectures a weights file fits, for the error that says it does not fit this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sparse_robust.models.head import head_names
from sparse_robust.models.stem import stem_names

# By a name that only the family has: its usual members. Each is built once, without memory, in about 0.1 s.
FAMILIES = {
    "layer1.0.conv1.weight": (
        "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
        "resnext50_32x4d", "resnext101_32x8d", "seresnet50", "test_resnet",
    ),
    "conv1.0.weight": ("resnet10t", "resnet14t", "resnet18d", "resnet26d", "resnet50d", "test_resnet"),
    "blocks.0.attn.qkv.weight": (
        "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_base_patch32_224", "test_vit",
    ),
    "conv_stem.weight": (
        "efficientnet_b0", "efficientnet_lite0", "mobilenetv2_100", "mobilenetv3_small_100", "mobilenetv3_large_100",
        "test_efficientnet",
    ),
    "stages.0.blocks.0.conv_dw.weight": ("convnext_atto", "convnext_nano", "convnext_tiny", "convnext_small"),
    "features.denseblock1.denselayer1.conv1.weight": ("densenet121", "densenet169", "densenet201"),
    "layers.0.blocks.0.attn.qkv.weight": ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"),
}  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """Shapes by name of an architecture, batch-norm counters left out, and the names of its head and its stem."""

    shapes: dict[str, tuple[int, ...]]
    head: tuple[str, ...]
    stem: tuple[str, ...]


@cache
def _layout(name: str) -> _Layout:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name)
    return _Layout(_shapes(model.state_dict()), head_names(model), stem_names(model))


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items() if not name.endswith("num_batches_tracked")}


def fitting(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return ready arguments of `create_model` for up to three architectures whose names and shapes the file has.

    Head and stem may differ; what they must be is part of the suggestion.
    """
    there, found = _shapes(tensors), []
    for name in (name for mark, names in FAMILIES.items() if mark in there for name in names):
        layout = _layout(name)
        here, loose = layout.shapes, {*layout.head, *layout.stem}
        fixed = here.keys() - loose
        if there.keys() - loose == fixed and all(there[key] == here[key] for key in fixed):
            found.append(_arguments(name, layout, tensors))
    return tuple(found[:3])


def classes_in(names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> int | None:
    """Return how many classes the head ``names`` has in a file, or None where it is not there."""
    weight = next((tensors[name] for name in names if name in tensors and name.endswith("weight")), None)
    return int(weight.shape[0]) if weight is not None and weight.ndim >= 2 else None


def _arguments(name: str, layout: _Layout, tensors: Mapping[str, Tensor]) -> str:
    parts = [f'"{name}"']
    classes = classes_in(layout.head, tensors)
    if classes is not None:
        parts.append(f"num_classes={classes}")
    for stem in layout.stem:
        shape = tensors[stem].shape if stem in tensors else ()
        if len(shape) == 4:
            parts += [f"in_chans={shape[1]}"] if shape[1] != 3 else []
            parts += ['stem="small"'] if shape[-1] == 3 else []
    return f"create_model({', '.join(parts)})"

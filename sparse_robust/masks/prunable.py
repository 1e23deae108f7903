"""Which weights of a model are pruned, and over which sparsity is therefore counted."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd

from sparse_robust.errors import UsageError, unknown
from sparse_robust.masks.shards import whole_shape
from sparse_robust.masks.wrappers import reshard, unwrap

if TYPE_CHECKING:
    from sparse_robust.masks.mask_set import Masks


def prunable_weights(
    model: nn.Module, *, stem: bool = True, head: bool = False, exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Return the weights that pruning acts on, by parameter name, in module order.

    These are the weights of every convolution (transposed ones too) and every linear layer except the classifier; no
    biases, norms or embeddings. For a ResNet that is exactly the set of its Conv2d weights. A weight that several
    layers share counts once, under its first name.

    Args:
        model: any module, wrapped or not.
        stem: prune the first convolution too. Which one that is comes from timm's ``pretrained_cfg['first_conv']``,
            else it is the first in module order.
        head: prune the classifier too: what timm's ``get_classifier()`` returns, else the last linear layer.
        exclude: layers to leave alone: names (``layer1.0``, with all below it) or globs (``*.downsample.*``).

    Raises:
        UsageError: if nothing is left, a pattern matches no layer, or a weight is reparametrised.
    """
    model = reshard(unwrap(model))
    weights = _weights(model)
    dropped: set[str] = set()
    for pattern in [exclude] if isinstance(exclude, str) else exclude:
        matched = {name for name in weights if matches_layer(pattern, name)}
        if not matched:
            raise unknown("layer to exclude", pattern, [_layer(name) for name in weights])
        dropped |= matched
    if not stem:
        first = stem_weights(model)
        if not first:
            raise UsageError("stem=False leaves the first convolution alone, and this model has no convolution.")
        dropped |= set(first)
    if not head:
        classifier = _classifier(model)
        dropped |= {name for name, weight in weights.items() if id(weight) in classifier}
    kept = {name: weight for name, weight in weights.items() if name not in dropped}
    if not kept:
        found = f"its {len(weights)} layers are all excluded" if weights else "it has no convolution or linear layer"
        raise UsageError(f"{type(model).__name__} has no prunable weight: {found}.")
    return kept


def stem_weights(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the first convolution's weights: one, or one a branch; none without a convolution."""
    model = unwrap(model)
    config = getattr(model, "pretrained_cfg", None)
    listed = config.get("first_conv") if isinstance(config, Mapping) else None
    listed = [listed] if isinstance(listed, str) else listed or []
    modules = dict(model.named_modules())
    named = [f"{name}.weight" for name in listed if isinstance(modules.get(name), (_ConvNd, nn.Linear))]
    first = next((f"{name}.weight" for name, module in modules.items() if isinstance(module, _ConvNd)), None)
    return tuple(named) or ((first,) if first else ())


def fit_stem(masks: Masks, model: nn.Module) -> Masks:
    """Return the masks that fit this model when only its stem differs from the one they were made for.

    A 7x7 stem that was replaced by a 3x3 one has no use for the old mask: it is left unmasked, with a warning. Masks
    that fit come back as they are, and other differences are left for `Masks.apply_` to refuse.
    """
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    shapes = masks.shapes()
    differs = [n for n in stem_weights(model) if n in shapes and whole_shape(parameters[n]) != shapes[n]]
    if not differs:
        return masks
    for name in differs:
        warnings.warn(
            f"the stem {name} has shape {whole_shape(parameters[name])}, its mask {shapes[name]}: left unmasked",
            stacklevel=2,
        )
    return masks.only([name for name in masks.names() if name not in differs])


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            raise UsageError(
                f"the weight of {name} is computed from other tensors (a parametrisation or torch.nn.utils.prune). "
                "Make it plain first: remove_parametrizations(...) or prune.remove(...)."
            )
        if id(weight) not in seen and weight.is_floating_point():
            seen.add(id(weight))
            weights[f"{name}.weight" if name else "weight"] = weight
    return weights


def _classifier(model: nn.Module) -> set[int]:
    """The ids of the weights of the classification head; some models have two."""
    get = getattr(model, "get_classifier", None)
    parts: Iterable[object]
    if callable(get):
        found = get()
        parts = found if isinstance(found, (tuple, list)) else [found]
    else:
        parts = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    return {
        id(layer._parameters.get("weight"))
        for part in parts
        if isinstance(part, nn.Module)
        for layer in part.modules()
        if isinstance(layer, (_ConvNd, nn.Linear))
    }


def matches_layer(pattern: str, name: str) -> bool:
    layer = _layer(name)
    return (
        pattern in (name, layer)
        or layer.startswith(f"{pattern}.")
        or fnmatchcase(name, pattern)
        or fnmatchcase(layer, pattern)
    )


def _layer(name: str) -> str:
    return name.removesuffix(".weight")

"""The classification head: where it is, and a new one for a new task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import unwrap
from sparse_robust.models.spec import attach_spec, find_spec
from sparse_robust.seeding import seeded


def replace_head(model: nn.Module, num_classes: int, seed: int = 0) -> nn.Module:
    """Give ``model`` a new head of ``num_classes`` classes and return it; everything else stays bit for bit.

    The head is timm's own for the family (``reset_classifier``), initialised by torch's default for a linear layer
    under ``seed``; the caller's random state is untouched. It is new even where the class count stays the same.

    Args:
        model: a timm classifier.
        num_classes: 2 or more.
        seed: any integer; the same seed gives the same head.

    Raises:
        UsageError: if the model has no replaceable head or the count is below 2.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise UsageError(f"num_classes must be a whole number of 2 or more, got {num_classes!r}.")
    inner, spec = unwrap(model), find_spec(model)
    reset: Any = getattr(inner, "reset_classifier", None)
    if reset is None:
        raise UsageError(f"{type(inner).__name__} has no replaceable head: it is not a timm classifier.")
    with seeded("head", seed, num_classes):
        reset(num_classes)
    for classifier in classifiers(inner):
        classifier.train(inner.training)
    if spec is not None:
        attach_spec(model, spec.with_(num_classes=num_classes))
    return model


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """Return the last layers that produce the logits: one for most families, two for distilled transformers."""
    get: Any = getattr(model, "get_classifier", None)
    found = get() if get is not None else ()
    found = (found,) if isinstance(found, nn.Module) and not isinstance(found, nn.ModuleList) else tuple(found)
    return tuple(module for module in found if isinstance(module, nn.Module))


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the state-dict names that belong to the head, such as ``fc.weight`` and ``fc.bias``."""
    heads = {id(module) for module in classifiers(model)}
    prefixes = [name + "." for name, module in model.named_modules(remove_duplicate=False) if id(module) in heads]
    return under(model.state_dict(), prefixes)


def under(names: Iterable[str], prefixes: Iterable[str]) -> tuple[str, ...]:
    """Return the names that start with one of the prefixes, in their order."""
    starts = tuple(prefixes)
    return tuple(name for name in names if name.startswith(starts))

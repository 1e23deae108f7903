"""Networks from timm by name, folder, Hub id or checkpoint file, with normalisation inside."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.models.build import build_model, report_new_stem
from sparse_robust.models.checkpoint import load_state
from sparse_robust.models.importing import import_weights
from sparse_robust.models.normalization import default_normalization, set_normalization
from sparse_robust.models.spec import ModelSpec
from sparse_robust.models.stem import stem_names

_log = logging.getLogger(__name__)


def create_model(
    name: str,
    *,
    num_classes: int = 10,
    in_chans: int = 3,
    stem: str = "default",
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    mean: Sequence[float] | float | None = None,
    std: Sequence[float] | float | None = None,
    seed: int = 0,
    trust_pickle: bool = False,
    allow_head_mismatch: bool = False,
    **timm_kwargs: Any,
) -> nn.Module:
    """Build a timm classifier that takes images in [0, 1] and returns logits.

    The result is the timm module itself: its parameter names and state dict are timm's. It normalises its images (see
    `set_normalization`) and carries its `ModelSpec` as ``model.spec``.

    Args:
        name: a timm architecture (``resnet18``, ``resnet50.a1_in1k``), ``local-dir:PATH`` or ``hf-hub:ID``.
        num_classes: classes of the head, 2 or more. Published weights with another count get a new head.
        in_chans: channels of the images. timm adapts published weights of the first convolution to them.
        stem: ``small`` removes the early reduction by four of a ResNet (see `use_small_stem`).
        pretrained: load the weights that timm publishes, or those of the folder or Hub repository; strict.
        checkpoint: a weights file for this architecture (see `load_state` and `import_weights`); strict.
        mean, std: one number a channel, in units of the images; by default those of the checkpoint's own normaliser,
            else what timm records for the network.
        seed: any integer; keys every initial value that no file provides. The caller's random state is untouched.
        trust_pickle: allow ``checkpoint`` to run code while it is read.
        allow_head_mismatch: keep a new head where the head in ``checkpoint`` has another shape.
        **timm_kwargs: further arguments of the timm constructor (``img_size``, ``drop_path_rate``, ...), JSON values.

    Raises:
        UsageError: for an unknown name (nearest names first), a network that is no classifier or not for that many
            channels, arguments it does not know, or a checkpoint that does not fit.
        FileError: for a folder, repository or file that cannot be read.
    """
    if pretrained and checkpoint is not None:
        raise UsageError("pretrained=True and checkpoint=... both name the weights: give one of them.")
    spec = ModelSpec(name, num_classes, in_chans, stem, pretrained, timm_kwargs)
    state = None if checkpoint is None else load_state(checkpoint, trust_pickle=trust_pickle)
    model = build_model(spec, seed=seed, pretrained=pretrained)
    default_mean, default_std = default_normalization(model, in_chans)
    set_normalization(model, default_mean if mean is None else mean, default_std if std is None else std)
    if state is not None:
        report = import_weights(
            model,
            state,
            allow_head_mismatch=allow_head_mismatch,
            allow_stem_mismatch=stem == "small",
            keep_normalization=mean is not None or std is not None,
            source=str(checkpoint),
        )
        _log.info("%s: %s", checkpoint, report)
        report_new_stem(name, set(stem_names(model)) & set(report.mismatched))
    return model

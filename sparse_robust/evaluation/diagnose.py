"""What is wrong with a model or its data before an evaluation begins: each finding with its number and a remedy.

An evaluation of the wrong thing runs for hours and ends with a number. These checks take three passes over one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from sparse_robust.attacks.context import Model, attack_context
from sparse_robust.attacks.inputs import check_logits
from sparse_robust.errors import UsageError
from sparse_robust.evaluation.check_inputs import check_devices, check_images, check_label_type
from sparse_robust.evaluation.findings import Finding, has_errors, ids_of, name_samples, require_sound
from sparse_robust.evaluation.watch import GradientCalls, Normalisations
from sparse_robust.masks import unwrap

__all__ = ["Finding", "diagnose", "require_sound"]

# Relative to the largest logit. Kernels may differ in the last bits from pass to pass and between batch shapes (TF32
# keeps ten bits); dropout and batch statistics change far more.
_SAME_PASS, _SAME_BATCH = 1e-4, 1e-2
_ENOUGH = 16  # images from which accuracy and predictions say something


def diagnose(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    ids: Tensor | None = None,
    lo: float = 0.0,
    hi: float = 1.0,
    needs_grad: bool = True,
) -> tuple[Finding, ...]:
    """Check a model and one batch of its images; the model and the generators of random numbers are left as they were.

    What comes later is not checked where it could not work any more: a wrong image type hides everything else.

    Args:
        model: an nn.Module, in the mode its owner left it in, or any function from images to logits. Of a function
            neither modes nor normalisation layers can be seen.
        x: images [n, ...].
        y: labels [n].
        ids: int64 [n], sample ids for the messages; None means 0..n-1.
        lo, hi: the box the images should lie in.
        needs_grad: whether any attack will differentiate the model.
    """
    if isinstance(model, nn.Module):
        model = unwrap(model)  # compiled code and wrappers hide the layers
    found = [*check_images(model, x, lo, hi, ids), *check_label_type(x, y), *check_devices(model, x, y)]
    if has_errors(found):
        return tuple(found)
    found += _check_mode(model)
    x, y = x.detach(), y.detach()
    with _left_alone(model, x.device):
        calls, layers = GradientCalls(), Normalisations(model)
        try:
            with calls, layers:
                leaf, logits = _pass(model, x)
        except RuntimeError as error:
            if not calls.count:
                raise
            return (*found, _optimises(calls.count, error))
        except UsageError as error:
            return (*found, Finding("output", "error", str(error)))
        found += [_optimises(calls.count)] if calls.count else []
        if needs_grad and not _reaches(logits, leaf):
            found.append(_NO_GRADIENT)
        logits = logits.detach()
        found += _check_logits(logits, y, ids_of(ids, len(x)))
        if not has_errors(found):
            found += _check_normalisation(layers, x)
            found += _check_probabilities(logits)
            found += _check_determinism(model, x, logits)
            found += _check_predictions(logits, y)
    return tuple(found)


# --- the model while it is looked at


@contextmanager
def _left_alone(model: Model, device: torch.device) -> Iterator[None]:
    """Evaluation mode, gradients allowed; afterwards flags, buffers and random generators are as before."""
    owners = list(model.modules()) if isinstance(model, nn.Module) else []
    saved = [(m, name, b, b.clone()) for m in owners for name, b in m._buffers.items() if b is not None]
    cuda = [device] if device.type == "cuda" else []
    plain = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    try:
        with plain, torch.random.fork_rng(devices=cuda), attack_context(model), torch.enable_grad():
            yield
    finally:
        for module, name, buffer, value in saved:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


def _pass(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the images as a leaf, and the logits, with their graph."""
    leaf = (x.clone() if x.is_inference() else x.detach()).requires_grad_()
    output = model(leaf)
    if isinstance(output, Tensor) and output.shape == (len(x), 1):
        raise UsageError(
            "the model has one output, and a classifier has a logit for each of two or more classes. For a score z of "
            "the second of two classes, evaluate lambda x: torch.cat([-model(x), model(x)], 1) / 2."
        )
    return leaf, check_logits(output, len(x))


def _reaches(logits: Tensor, leaf: Tensor) -> bool:
    """Return whether the images have a gradient, be it zero."""
    if not logits.requires_grad:
        return False
    return torch.autograd.grad(logits.sum(), leaf, allow_unused=True)[0] is not None


# --- the model's flags and layers


def _check_mode(model: Model) -> Iterator[Finding]:
    if not isinstance(model, nn.Module):
        return
    training = [n or type(m).__name__ for n, m in model.named_modules() if m.training and _differs_in_training(m)]
    if training:
        sentence = (
            f"{len(training)} layers of batch norm or dropout are in training mode (first {', '.join(training[:3])}): "
            "they are evaluated in eval mode and put back afterwards. Call model.eval() if that was an oversight."
        )
        yield Finding("train-mode", "warning", sentence)


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, _NormBase):
        return bool(module.track_running_stats)
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if type(module).__name__ in ("DropPath", "StochasticDepth"):  # of timm and torchvision
        return bool(getattr(module, "drop_prob", None) or getattr(module, "p", None))
    return isinstance(module, nn.RReLU)


def _check_normalisation(layers: Normalisations, x: Tensor) -> Iterator[Finding]:
    again, steep = layers.normalised_again(), layers.steeper_than_one(x)
    if again is None and steep is None:
        return
    evidence = f"its second normalisation gets values down to {again:.3g}" if again is not None else ""
    if reached := layers.reached_first_layer():
        also = "; " if evidence else ""
        evidence += f"{also}the first layer gets values of mean {reached[0]:.2g}, standard deviation {reached[1]:.2g}"
    yield Finding(
        "normalises-twice",
        "warning",
        f"the model seems to normalise twice: {evidence}, where images in [0, 1] normalised once give a mean of about "
        "0 and a standard deviation of about 1. Take one out: the Normalize layer, or the mean and std of the model.",
    )


def _optimises(calls: int, error: Exception | None = None) -> Finding:
    sentence = (
        f"the model computes gradients inside its forward pass ({calls} calls of autograd in one pass): it optimises "
        "at test time. "
    )
    if error is not None:
        return Finding(
            "test-time-gradients",
            "error",
            f"{sentence}It cannot do so while its parameters are frozen, as they are under attack ({error}). Evaluate "
            "it without that step.",
        )
    remedy = "Attacks through such a pass are often too weak: report an attack made for this model as well."
    return Finding("test-time-gradients", "warning", sentence + remedy)


# --- the logits

_NO_GRADIENT = Finding(
    "no-gradient",
    "error",
    "the logits have no gradient with respect to the images: does the model detach, round-trip through NumPy or "
    "compute under torch.no_grad()? Gradient attacks would return noise; Square needs no gradient.",
)


def _check_logits(logits: Tensor, y: Tensor, ids: Tensor) -> Iterator[Finding]:
    bad = ~logits.isfinite().all(1)
    if bad.any():
        sentence = (
            f"the logits of {int(bad.sum())} of {len(y)} images hold NaN or infinity: {name_samples(ids, bad)}. No "
            "verdict about these means anything. Look for overflow in half precision, a division by zero, a diverged "
            "training."
        )
        yield Finding("logits", "error", sentence)
    classes = logits.shape[1]
    least, most = int(y.min()), int(y.max())
    if least < 0 or most >= classes:
        wrong = (y < 0) | (y >= classes)
        remedy = "Does the model belong to this data set?"
        if (least, most) == (1, classes):
            remedy = "They seem to count from 1: subtract 1."
        elif least < 0:
            remedy = "Leave out images without a label."
        sentence = (
            f"labels are in 0..{classes - 1} for a model with {classes} outputs, got values from {least} to {most} "
            f"({name_samples(ids, wrong)}). {remedy}"
        )
        yield Finding("label-range", "error", sentence)


def _check_probabilities(logits: Tensor) -> Iterator[Finding]:
    off = float((logits.sum(1) - 1).abs().max())
    if float(logits.min()) >= 0 and off < 1e-3:
        sure = 100 * float((logits.amax(1) >= 1 - 1e-6).float().mean())
        yield Finding(
            "probabilities",
            "warning",
            f"the outputs look like probabilities: all {len(logits)} rows lie in [0, 1] and sum to 1 (within "
            f"{off:.1g}). Attacks need logits: gradients vanish where a probability is 1, here in {sure:.0f} % of the "
            "rows. Take off the softmax at the end of the model.",
        )
        return
    off = float(logits.logsumexp(1).abs().max())
    if float(logits.max()) <= 1e-6 and off < 1e-3:
        yield Finding(
            "log-probabilities",
            "warning",
            f"the outputs look like log-probabilities: the exponentials of all {len(logits)} rows sum to 1 (within "
            f"{off:.1g}). They differ like logits, so verdicts hold, but small differences are rounded: take off the "
            "log-softmax at the end of the model.",
        )


def _check_determinism(model: Model, x: Tensor, logits: Tensor) -> Iterator[Finding]:
    scale = max(float(logits.abs().max()), 1e-12)
    again = _pass(model, x)[1].detach()
    gap = float((again - logits).abs().max())
    if not gap <= _SAME_PASS * scale:
        changed = int((again.argmax(1) != logits.argmax(1)).sum())
        yield Finding(
            "stochastic",
            "warning",
            f"two passes over the same {len(x)} images differ by up to {gap:.2g} (largest logit {scale:.2g}), and "
            f"{changed} predictions with them: the model draws random numbers. Use AutoAttack(version='rand'), which "
            "averages gradients over eot_iter passes.",
        )
        return
    if len(x) < 4:  # batch statistics of fewer images hardly differ
        return
    pair = _pass(model, x[:2])[1].detach()
    gap = float((pair - logits[:2]).abs().max())
    if not gap <= _SAME_BATCH * scale * (10 if logits.dtype.itemsize < 4 else 1):
        yield Finding(
            "batch-dependent",
            "warning",
            f"the logits of two images change by up to {gap:.2g} (largest {scale:.2g}) when the others are left out of "
            "the batch: images see their neighbours. Is a batch norm in training mode inside this function? Verdicts "
            "depend on the batch.",
        )


def _check_predictions(logits: Tensor, y: Tensor) -> Iterator[Finding]:
    n, classes = logits.shape
    if n < _ENOUGH:
        return
    prediction = logits.argmax(1)
    one_label = bool((y == y[0]).all())
    if one_label:
        yield Finding(
            "one-class",
            "warning",
            f"all {n} labels of the first batch are {int(y[0])}: the images seem to be sorted by class, and the first "
            "ones of them say nothing about the others. Evaluate all of them, or a subset drawn from every class.",
        )
    accuracy, chance = float((prediction == y).float().mean()), 1 / classes
    if bool((prediction == prediction[0]).all()) and not (one_label and accuracy):
        yield Finding(
            "constant-prediction",
            "warning",
            f"the model predicts class {int(prediction[0])} for all {n} images of the first batch. Were its weights "
            "loaded, and are the images in the range it was trained with?",
        )
    elif accuracy <= chance + (chance * (1 - chance) / n) ** 0.5:
        yield Finding(
            "chance",
            "warning",
            f"{100 * accuracy:.1f} % of the {n} images of the first batch are classified correctly, and chance is "
            f"{100 * chance:.1f} % for {classes} classes. Check the weights, the normalisation, the order of the "
            "channels and that of the labels.",
        )

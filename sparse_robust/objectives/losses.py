"""The losses of the regimes: from the network's answers to clean and to crafted images, one scalar.

All take logits [n, classes] and compute in float32 (float64 where logits are that), so that mixed precision does not
touch them, and none gives NaN or an infinite gradient for finite logits, however large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.attacks.losses import kl
from sparse_robust.attacks.passes import full_precision

Forward = Callable[[Tensor], Tensor]
"""Images [n, ...] -> logits [n, classes], with graph."""

Loss = Callable[[Forward, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(forward, clean images, images to train on, labels) -> the scalar loss, and the logits it is mostly about."""


def cross_entropy(
    forward: Forward, x: Tensor, shown: Tensor, y: Tensor, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy on the images to train on; labels are int64 [n] or probabilities [n, classes]."""
    logits = full_precision(forward(shown))
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing), logits


def trades(
    forward: Forward, x: Tensor, shown: Tensor, y: Tensor, *, beta: float = 6.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return mean CE(f(x), y) + beta * mean KL(softmax f(x) || softmax f(x')).

    Nothing is detached: the second term also moves the prediction on clean images. The authors' code passes x through
    the network twice, which differs in one more update of the running statistics only.

    Source: Zhang et al., Theoretically principled trade-off between robustness and accuracy (2019), equation 5.
    """
    clean, adversarial = full_precision(forward(x)), full_precision(forward(shown))
    natural = F.cross_entropy(clean, y, label_smoothing=label_smoothing)
    return natural + beta * kl(adversarial, clean).mean(), adversarial


def mart(
    forward: Forward, x: Tensor, shown: Tensor, y: Tensor, *, beta: float = 5.0, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return mean BCE(p(x'), y) + beta * mean KL(p(x) || p(x')) * (1 - p(x)[y]).

    BCE is the boosted cross-entropy -log p[y] - log(1 - max over j != y of p[j]). Nothing is detached, as in the
    authors' code, whose small constants are kept: they belong to its gradients.

    Source: Wang et al., Improving adversarial robustness requires revisiting misclassified examples (2020),
    equations 8 to 11.
    """
    clean, adversarial = full_precision(forward(x)), full_precision(forward(shown))
    p_clean, p_adversarial = clean.softmax(1), adversarial.softmax(1)
    rival = adversarial.detach().scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    boosted = F.cross_entropy(adversarial, y, label_smoothing=label_smoothing)
    boosted = boosted - (1.0001 - p_adversarial.gather(1, rival) + 1e-12).log().mean()
    # p * log p from log_softmax: where p underflows, the logarithm of p itself has no gradient.
    moved = (p_clean * (clean.log_softmax(1) - (p_adversarial + 1e-12).log())).sum(1)
    unsure = 1.0000001 - p_clean.gather(1, y[:, None])[:, 0]
    return boosted + beta * (moved * unsure).mean(), adversarial

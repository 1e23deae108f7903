"""What an attack maximises: losses of one value an image, so that nothing depends on the batch it is in.

All take logits [n, classes], in float32 or float64, with at least two classes, and labels int64 [n], and return [n].
A larger value is always closer to what the attack wants: for the untargeted losses (those in `LOSSES`) to any class
but y, for the targeted ones to the target. The negative of an untargeted loss, with the target in the place of y, is a
targeted one.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

# Keeps the ratios finite where all logits are equal; as in Croce and Hein's code.
_TINY = 1e-12


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log softmax(logits)[y] for logits [n, classes] and labels int64 [n]: float [n]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return max over j != y of logits[j], minus logits[y], [n]; an image is misclassified where it is positive.

    Source: Carlini and Wagner, Towards evaluating the robustness of neural networks (2017), with confidence 0.
    """
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - _at(logits, y)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """Return the difference of logits ratio: the margin over the gap of the largest to the third largest logit, [n].

    Shifting or scaling the logits does not change it; where y is predicted it is from -1 to 0. Two classes have no
    third logit, and the ratio to the second would be the sign alone: there it is the plain `margin`.

    Source: Croce and Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks (2020), equation 6.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + _TINY)


def cross_entropy_targeted(logits: Tensor, target: Tensor) -> Tensor:
    """Return log softmax(logits)[target], [n]."""
    return -cross_entropy(logits, target)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return (logits[target] - logits[y]) over the gap of the largest logit to the mean of third and fourth, [n].

    With three classes the gap is that of the largest to the third; with two it is 1, as in `dlr`.

    Source: Croce and Hein (2020), equation 7.
    """
    ahead = _at(logits, target) - _at(logits, y)
    if logits.shape[1] < 3:
        return ahead
    top = logits.topk(min(4, logits.shape[1]), dim=1).values
    return ahead / (top[:, 0] - top[:, 2:].mean(1) + _TINY)


def kl(logits: Tensor, clean_logits: Tensor) -> Tensor:
    """Return KL(softmax(clean_logits) || softmax(logits)), [n]: how far predictions moved from those on clean images.

    It is least, with a gradient of zero, at the clean image itself: start elsewhere.

    Source: Zhang et al., Theoretically principled trade-off between robustness and accuracy (TRADES, 2019).
    """
    return F.kl_div(logits.log_softmax(1), clean_logits.log_softmax(1), reduction="none", log_target=True).sum(1)


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "cw": margin, "dlr": dlr}
"""The untargeted losses, (logits, y) -> [n]."""

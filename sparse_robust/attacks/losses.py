"""What an attack maximises: losses of one value an image, so that nothing depends on the batch it is in."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Return -log softmax(logits)[y] for logits [n, classes] and labels int64 [n]: float [n]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return max over j != y of logits[j], minus logits[y], [n]; an image is misclassified where it is positive.

    Source: Carlini and Wagner, Towards evaluating the robustness of neural networks (2017), with confidence 0.
    """
    own = logits.gather(1, y[:, None])
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.amax(1) - own[:, 0]


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ce": cross_entropy, "cw": margin}

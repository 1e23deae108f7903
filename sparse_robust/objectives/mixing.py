"""Mixup and CutMix by timm, as functions of (seed, epoch, the images of the batch)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.errors import UsageError
from sparse_robust.seeding import derive_seed


@dataclass(frozen=True)
class Mixing:
    """Mixes each image of a batch with the one at the opposite place, by one ratio a batch (timm's mode ``batch``).

    The draws depend on the seed and the sample ids of the batch alone: a resumed run mixes as the uninterrupted one.

    Attributes:
        mixup: alpha of Zhang et al., mixup: Beyond empirical risk minimization (2018); 0 is off.
        cutmix: alpha of Yun et al., CutMix (2019); 0 is off. With both, each batch gets one of them, by a coin.
        num_classes: classes of the labels.
    """

    mixup: float
    cutmix: float
    num_classes: int

    def __call__(self, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images, like x, and class probabilities [n, classes]; the last of an odd number stays pure."""
        if self.num_classes < 2:
            raise UsageError(f"mixing needs the number of classes, at least 2; got {self.num_classes}.")
        from timm.data import Mixup  # a heavy import that most runs have no use for

        mixer = Mixup(self.mixup, self.cutmix, label_smoothing=0.0, num_classes=self.num_classes)
        even = len(x) - len(x) % 2
        mixed, labels = x.clone(), F.one_hot(y, self.num_classes).to(x.dtype)
        with _numpy_seeded(derive_seed("mixing", seed, ids.tolist())):
            mixed[:even], labels[:even] = mixer(mixed[:even].clone(), y[:even])
        return mixed, labels


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Give timm, which draws from numpy's global generator, a stream of its own."""
    state = np.random.get_state()
    np.random.seed(np.random.SeedSequence(seed).generate_state(4))
    try:
        yield
    finally:
        np.random.set_state(state)

"""Black-box transfer: what adversarial images of one model do to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_robust.attacks import Attack, Model, parse_eps
from sparse_robust.errors import UsageError
from sparse_robust.evaluation.streaming import Columns, batches, device_of, merge, predict


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """Result of `transfer_matrix`. Accuracies are shares of all images, in [0, 1].

    Attributes:
        names: the models, in the order of rows and columns.
        attack: name of the attack, ``eps``: its radius.
        clean: accuracy of each model without an attack, float64 [models].
        accuracy: float64 [models, models]; entry [s, t] is the share of all images that target t still classifies
            correctly when it is given the images that the attack made on source s. The diagonal is the white-box
            attack.
        ids: int64 [n], the sample ids; the per-image results are in their order.
        clean_correct: bool [models, n].
        correct: bool [models, models, n]; entry [s, t, i] says whether target t classifies the image that was made from
            image i on source s correctly.
    """

    names: tuple[str, ...]
    attack: str
    eps: float
    clean: Tensor
    accuracy: Tensor
    ids: Tensor
    clean_correct: Tensor
    correct: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def success(self) -> Tensor:
        """bool [models, models, n]: the target is right without an attack, and wrong on the source's image."""
        return self.clean_correct[None] & ~self.correct

    def get(self, source: str, target: str) -> float:
        """Return the accuracy of the target on the source's images."""
        return float(self.accuracy[self.names.index(source), self.names.index(target)])

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the per-image results, as JSON values: ``accuracy[source][target]``."""
        rows = self.accuracy.tolist()
        return {
            "images": len(self),
            "attack": self.attack,
            "eps": self.eps,
            "clean": dict(zip(self.names, self.clean.tolist(), strict=True)),
            "accuracy": {
                source: dict(zip(self.names, row, strict=True)) for source, row in zip(self.names, rows, strict=True)
            },
        }


def transfer_matrix(
    models: Mapping[str, Model], loader: Iterable[Any], attack: Attack, eps: str | float
) -> TransferMatrix:
    """Attack every model, and show the images to all of them.

    The images are those of ``attack.run`` on the source: also where it did not fool the source, and the clean image
    where the source was wrong without an attack, unless the attack goes on there. Attacks that stop at the first image
    that fools the source (``keep="first"``) end close to its decision boundary, and transfer less than those of the
    published protocol (``PGD(keep="last")``, all steps on all images).

    Models are put in eval mode and given back as they were. Shards of a loader with ``world > 1`` are merged.

    Args:
        models: by name; each maps images [n, C, H, W] in [0, 1] to logits [n, classes]. They may be on different
            devices.
        loader: yields (x, y) or (x, y, ids); it is streamed.
        attack: untargeted.
        eps: radius: a number, or text such as ``8/255``.

    Raises:
        UsageError: for no model, a loader that yields nothing, and what the attack refuses.
    """
    if not models:
        raise UsageError("transfer_matrix needs at least one model, got none.")
    radius = parse_eps(eps)
    rows: list[Columns] = []
    for x, y, ids in batches(loader, None):
        clean = torch.stack([_correct(model, x, y) for model in models.values()], 1)
        crafted = [_craft(attack, source, x, y, ids, radius) for source in models.values()]
        shown = [torch.stack([_correct(target, images, y) for target in models.values()], 1) for images in crafted]
        rows.append({"ids": ids, "clean": clean, "correct": torch.stack(shown, 1)})
    columns = merge(rows, loader, "transfer_matrix")
    clean_correct, correct = columns["clean"].T.contiguous(), columns["correct"].permute(1, 2, 0).contiguous()
    accuracy = (clean_correct.double().mean(1), correct.double().mean(2))
    return TransferMatrix(tuple(models), attack.name, radius, *accuracy, columns["ids"], clean_correct, correct)


def _craft(attack: Attack, source: Model, x: Tensor, y: Tensor, ids: Tensor, eps: float) -> Tensor:
    device = device_of(source) or x.device
    return attack.run(source, x.to(device), y.to(device), eps=eps, ids=ids.to(device)).images


def _correct(model: Model, images: Tensor, y: Tensor) -> Tensor:
    """Return bool [n] on the CPU, whether the model classifies the images correctly."""
    device = device_of(model) or images.device
    labels = y.to(device)
    return (predict(model, images.to(device), labels) == labels).cpu()

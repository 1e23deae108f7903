"""Training with channels last: only the layout of convolutions changes, and nothing that leaves the run shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.data import Data
from sparse_robust.masks import Masks
from sparse_robust.pruning import prune
from sparse_robust.training import Hook, Recipe, Trainer, TrainResult
from sparse_robust.training.trainee import Trainee

ONE_STEP: dict[str, Any] = {"regime": "adversarial", "steps": 2, "epochs": 1, "lr": 0.05, "eps": 0.1}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Linear(8 * 5 * 5, 10),
    )  # fmt: skip


class Layouts(Hook):
    """Notes how the second convolution's weight, gradient and momentum lie after an update."""

    name = "layouts"

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def before_update(self, trainee: Trainee, update: int) -> None:
        weight = trainee.inner[3].weight
        slots = [slot for slot in trainee.inner_optimizer.state.get(weight, {}).values() if slot is not None]
        self.seen += [
            tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
            for tensor in (weight, weight.grad, *slots)
        ]


def fit(data: Data, **recipe: Any) -> tuple[TrainResult, nn.Module, Masks, list[bool]]:
    model, hook = network(), Layouts()
    masks = prune(model, 0.5)
    given = Recipe(**{**ONE_STEP, "batch_size": len(data.train), "validate_every": 0, **recipe})
    return Trainer(model, data, given, seed=0, masks=masks, hooks=[hook]).fit(), model, masks, hook.seen


def test_convolutions_lie_with_channels_last_while_they_train_and_not_after(digits: Data) -> None:
    result, model, masks, seen = fit(digits, epochs=3, ema_decay=0.9)
    assert len(seen) == 8 and all(seen)  # weight and gradient three times, momentum twice
    assert result.how["channels_last"] is True
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    assert all(tensor.is_contiguous() for tensor in result.selection.state("last").values())
    assert all(not parameter[~masks[name]].any() for name, parameter in model.named_parameters() if name in masks)


def test_it_can_be_left_out_and_changes_roundings_alone(digits: Data) -> None:
    (last, _, _, seen), (plain, _, _, unseen) = fit(digits), fit(digits, channels_last=False)
    assert all(seen) and not any(unseen) and plain.how["channels_last"] is False
    theirs = plain.selection.state("last")
    for name, tensor in last.selection.state("last").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


class Viewed(nn.Module):
    """Reads features as they lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 6, 5, stride=4), nn.Linear(6 * 6 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(x.view(len(x), -1))


def test_a_network_that_does_not_take_it_trains_as_it_is(digits: Data) -> None:
    model = Viewed()
    with pytest.warns(UserWarning, match=r"trained without recipe.channels_last.*view size is not compatible"):
        result = Trainer(model, digits, Recipe(**ONE_STEP), seed=0).fit()
    assert result.how["channels_last"] is False and model.conv.weight.is_contiguous() and model.training
    assert result.how["attack"]["replica"] and not result.how["attack"]["channels_last"]
    assert "view size" in result.how["attack"]["reason"]

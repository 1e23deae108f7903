"""The replica that training attacks: it follows the network bit for bit, and runs record whether there was one."""

import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks import PGD
from sparse_robust.attacks.replica import make_replica
from sparse_robust.data import Data
from sparse_robust.errors import UsageError
from sparse_robust.files import sha256_state
from sparse_robust.pruning import prune
from sparse_robust.training import Recipe, Trainer, TrainResult, crafting

FAST: dict[str, Any] = {
    "regime": "adversarial", "steps": 2, "epochs": 1, "batch_size": 32, "lr": 0.05, "eps": 0.1, "validate_every": 0,
}  # fmt: skip


def small(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8),
        nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8 * 5 * 5, 10),
    )  # fmt: skip


def fit(model: nn.Module, data: Data, replica: str, **recipe: Any) -> TrainResult:
    masks = prune(model, 0.5)
    return Trainer(model, data, Recipe(**{**FAST, "attack_replica": replica, **recipe}), seed=0, masks=masks).fit()


def largest_change(one: TrainResult, other: TrainResult) -> float:
    """The largest difference between the weights of two runs, as a share of each tensor's largest element."""
    mine, theirs = one.selection.state("last"), other.selection.state("last")
    floats = [name for name, tensor in mine.items() if tensor.is_floating_point()]
    return max(float((mine[name] - theirs[name]).abs().max() / mine[name].abs().max()) for name in floats)


@pytest.mark.parametrize("mode", ["eval", "train_frozen"])
@pytest.mark.parametrize(
    "recipe",
    [{}, {"accumulate": 2, "optimizer": "adamw", "lr": 0.01}, {"regime": "fast", "guard": False, "ema_decay": 0.9}],
    ids=["plain", "accumulated", "fast-ema"],
)
def test_a_replica_of_the_same_layout_makes_no_difference_at_all(
    mode: str, recipe: dict[str, Any], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without folding and another memory format it computes with the same operations, so that nothing may differ: it
    # has to be fresh for every batch, running statistics included, and to leave the step's random numbers alone.
    monkeypatch.setattr(crafting, "make_replica", partial(make_replica, fold=False, channels_last=False))
    shared = {"epochs": 2, "attack_mode": mode, **recipe}
    runs = [fit(small(dropout=0.2), digits, choice, **shared) for choice in ("never", "always")]
    assert [run.how["attack"]["replica"] for run in runs] == [False, True]
    assert sha256_state(runs[0].selection.state("last")) == sha256_state(runs[1].selection.state("last"))
    assert [e["train_loss"] for e in runs[0].history] == [e["train_loss"] for e in runs[1].history]


@pytest.mark.parametrize("mode", ["eval", "train_frozen"])
def test_folding_and_channels_last_change_roundings_alone(mode: str, digits: Data) -> None:
    one_step = {"batch_size": len(digits.train), "attack_mode": mode}
    assert largest_change(*(fit(small(), digits, choice, **one_step) for choice in ("never", "always"))) < 1e-4
    # A pixel whose gradient is 0 but for rounding may go the other way, so that an epoch differs by a little more.
    epoch = [fit(small(), digits, choice, attack_mode=mode) for choice in ("never", "always")]
    assert largest_change(*epoch) < 1e-2
    how = epoch[1].how["attack"]
    assert how["channels_last"] and how["precision"] == "fp32" and not how["captured"] and how["mode"] == mode
    assert how["folded"] == (2 if mode == "eval" else 0)


def test_the_attack_takes_no_gradients_of_weights(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    craft, seen = PGD.__call__, list[str]()

    def watched(self: PGD, target: Any, x: Tensor, y: Tensor, **options: Any) -> Tensor:
        def look(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            seen.append(type(layer).__name__)
            assert not any(parameter.requires_grad for parameter in layer.parameters())

        network = target if isinstance(target, nn.Module) else target.module
        handles = [layer.register_forward_hook(look) for layer in network.modules() if not list(layer.children())]
        try:
            return craft(self, target, x, y, **options)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(PGD, "__call__", watched)
    for choice in ("never", "always"):
        seen.clear()
        model = small()
        fit(model, digits, choice, attack_mode="eval")
        assert seen and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"replica": "auto", "regime": "standard"}, "attacks nothing"),
        ({"replica": "auto", "attack_mode": "train"}, "running statistics of the network itself"),
        ({"replica": "never"}, "attack_replica is never"),
    ],
)
def test_why_there_is_none_is_recorded(recipe: dict[str, Any], reason: str, digits: Data) -> None:
    how = fit(small(), digits, **recipe).how["attack"]
    assert not how["replica"] and reason in how["reason"]


def test_a_replica_is_refused_where_there_can_be_none(digits: Data, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match=r"attack_replica is always, but attacks in mode train"):
        fit(small(), digits, "always", attack_mode="train")

    def held() -> nn.Module:
        model = small()
        model.lock = threading.Lock()  # cannot be copied
        return model

    with pytest.raises(UsageError, match=r"attack_replica is always, but the network cannot be copied: .*lock"):
        fit(held(), digits, "always", attack_mode="eval")
    result = fit(held(), digits, "auto", attack_mode="eval")
    assert "cannot be copied" in result.how["attack"]["reason"] and "act on the network itself" in caplog.text
    without = fit(small(), digits, "never", attack_mode="eval")
    assert sha256_state(result.selection.state("last")) == sha256_state(without.selection.state("last"))


class Noise(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images + 0.01 * torch.randn_like(images)


def test_looking_for_a_replica_draws_no_random_numbers_of_the_step(digits: Data) -> None:
    # A resumed run looks at another step than the uninterrupted one did.
    runs = [fit(nn.Sequential(Noise(), small()), digits, choice, attack_mode="eval") for choice in ("never", "auto")]
    assert "gives other logits" in runs[1].how["attack"]["reason"]
    assert sha256_state(runs[0].selection.state("last")) == sha256_state(runs[1].selection.state("last"))


def test_batch_norm_over_ranks_and_attacks_that_would_wait() -> None:
    with pytest.raises(UsageError, match="every pass of the attack would wait"):
        Recipe(regime="adversarial", dist_bn="sync", attack_mode="train_frozen")
    Recipe(regime="adversarial", dist_bn="sync", attack_mode="eval")
    with pytest.raises(UsageError, match="unknown dist_bn"):
        Recipe(dist_bn="local")


def test_synchronised_batch_norm_is_undone_without_loss() -> None:
    from timm.layers import convert_sync_batchnorm

    from sparse_robust.training.devices import put_back

    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.BatchNorm2d(2)))
    original = model[1][0]
    convert_sync_batchnorm(model)
    assert isinstance(model[1][0], nn.SyncBatchNorm)
    with torch.no_grad():
        model[1][0].weight.fill_(3)
        model[1][0].running_mean.fill_(4)
    put_back(model, {"1.0": original})
    assert model[1][0] is original and float(original.weight.detach()[0]) == 3 and float(original.running_mean[1]) == 4

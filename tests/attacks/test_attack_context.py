"""What an attack leaves behind: nothing, but for the running statistics in the mode that says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.attacks import FGSM, MODES, PGD, attack_context
from sparse_robust.errors import UsageError

EPS = 8 / 255
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Mixed(nn.Module):
    """Every kind of state at once: batch and instance norms, dropout, a frozen layer, a part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norms = nn.Sequential(
            nn.BatchNorm2d(4),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.BatchNorm2d(4, momentum=None),
            nn.BatchNorm2d(4, track_running_stats=False),
        )
        self.settled = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.stem.requires_grad_(False)
        self.train()
        self.settled.eval()

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.settled(self.norms(self.stem(x)))
        logits: Tensor = self.head(self.drop(features.mean((2, 3))))
        return logits


def images() -> Tensor:
    return torch.rand(6, 3, 8, 8)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every bit and flag that an attack could change."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "grads": {name: (id(p.grad), p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None},
        "flags": {name: module.training for name, module in model.named_modules()},
        "tracking": {name: getattr(module, "track_running_stats", None) for name, module in model.named_modules()},
    }


def same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return bool(first == second)


def counters(model: nn.Module) -> list[int]:
    return [int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    assert same(snapshot(model), before)


@pytest.mark.acceptance("double-win", "A-19")
@pytest.mark.parametrize("mode", ["eval", "train_frozen"])
@pytest.mark.parametrize("attack", [PGD, FGSM])
def test_an_attack_changes_nothing(attack: type[PGD], mode: str) -> None:
    model = Mixed()
    F.cross_entropy(model(images()), LABELS).backward()  # gradients that must stay as they are
    x = images()
    before = x.clone()
    with unchanged(model):
        x_adv = attack(mode=mode)(model, x, LABELS, eps=EPS)
        result = attack(mode=mode).run(model, x, LABELS, eps=EPS)
    assert torch.equal(x, before)
    for tensor in (x_adv, result.images):
        assert not tensor.requires_grad and tensor.grad_fn is None


@pytest.mark.acceptance("double-win", "A-19")
def test_train_mode_changes_running_statistics_alone() -> None:
    model = Mixed()
    before = snapshot(model)
    PGD(steps=2, mode="train")(model, images(), LABELS, eps=EPS)
    after = snapshot(model)
    changed = {name for name in before["state"] if not torch.equal(before["state"][name], after["state"][name])}
    assert changed and all(name.rpartition(".")[2].startswith(("running_", "num_batches")) for name in changed)
    assert not any(name.startswith("settled") for name in changed)  # its owner put it in eval mode
    del before["state"], after["state"]
    assert same(before, after)


@pytest.mark.acceptance("double-win", "A-19")
def test_everything_comes_back_when_the_model_fails() -> None:
    class Fails(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("out of memory")

    model = Fails()
    for mode in ("eval", "train_frozen"):
        with unchanged(model), pytest.raises(RuntimeError, match="out of memory"):
            PGD(mode=mode)(model, images(), LABELS, eps=EPS)


@pytest.mark.acceptance("double-win", "A-20")
@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize(("attack", "steps"), [(PGD, 10), (PGD, 3), (FGSM, 1)])
def test_batch_norm_counters_of_a_training_step(attack: type[PGD], steps: int, mode: str) -> None:
    """11 updates for PGD-10, 4 for PGD-3 and 2 for FAT if the attack runs in train mode; else the step's own."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).train()
    crafts = attack(mode=mode) if attack is FGSM else attack(steps=steps, mode=mode)
    running = model[1].running_mean.clone()
    x_adv = crafts(model, images(), LABELS, eps=EPS)
    assert torch.equal(model[1].running_mean, running) == (mode != "train")
    F.cross_entropy(model(x_adv), LABELS).backward()
    assert counters(model) == [steps + 1 if mode == "train" else 1]


@pytest.mark.acceptance("double-win", "A-20")
def test_evaluation_leaves_running_statistics_alone() -> None:
    model = Mixed().eval()
    with unchanged(model), torch.no_grad():
        PGD(steps=3, n_restarts=2).run(model, images(), LABELS, eps=EPS)


@pytest.mark.acceptance("double-win", "A-20")
@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_lite0"])
def test_timms_batch_norms_are_frozen_too(name: str) -> None:
    """BatchNormAct2d and its kin override forward."""
    model = timm.create_model(name, num_classes=3).train()
    with unchanged(model):
        PGD(steps=1, mode="train_frozen")(model, torch.rand(6, 3, 32, 32), LABELS, eps=EPS)
    PGD(steps=1, mode="train")(model, torch.rand(6, 3, 32, 32), LABELS, eps=EPS)
    assert counters(model) and set(counters(model)) == {1}


def test_frozen_training_sees_batch_statistics() -> None:
    """train and train_frozen craft the same images, eval others."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = images()
    crafted = {mode: PGD(steps=3, mode=mode)(model, x, LABELS, eps=EPS) for mode in ("eval", "train_frozen", "train")}
    assert torch.equal(crafted["train"], crafted["train_frozen"])
    assert not torch.equal(crafted["train"], crafted["eval"])
    assert not model.training


def test_the_context_itself() -> None:
    model = Mixed()
    model.eval()
    for mode, training in (("eval", False), ("train", True), ("train_frozen", True)):
        with unchanged(model), attack_context(model, mode):
            assert all(module.training == training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
    with unchanged(model), attack_context(model, "train"), attack_context(model, "eval"):
        assert not any(module.training for module in model.modules())
    with pytest.raises(UsageError, match="Did you mean 'train_frozen'"), attack_context(model, "train-frozen"):
        pass


def test_a_plain_function_is_a_model() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with attack_context(network.forward, "train"):
        pass
    x, with_module = images(), PGD(steps=3)
    with unchanged(network):
        assert torch.equal(
            with_module(lambda z: network(z), x, LABELS, eps=EPS), with_module(network, x, LABELS, eps=EPS)
        )

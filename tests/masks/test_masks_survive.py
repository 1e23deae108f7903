"""A masked model stays so when it is copied, averaged, compiled, saved or wrapped; for FSDP2 see tests/distributed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.pruning import Enforcement, enforce, prune


def make(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.Flatten(), nn.Linear(72, 4)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(8, 1, 9, 9, generator=generator), torch.randint(4, (8,), generator=generator)


def optimizer_of(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        optimizer.step()


def masked() -> tuple[nn.Sequential, SGD, Masks, Enforcement]:
    """A model that was trained for a while under masks."""
    model = make()
    masks = prune(model, 0.8)
    optimizer = optimizer_of(model)
    enforcement = enforce(optimizer, model, masks)
    train(model, optimizer)
    return model, optimizer, masks, enforcement


def is_masked(model: nn.Module, masks: Masks) -> bool:
    """Whether what is pruned is +0.0, and what is kept is not all zero."""
    weights = prunable_weights(model)
    pruned = torch.cat([weights[name].detach()[~masks[name]] for name in masks])
    kept = torch.cat([weights[name].detach()[masks[name]] for name in masks])
    return not pruned.view(torch.int32).any() and bool(kept.any())


def test_deepcopy() -> None:
    model, optimizer, masks, _ = masked()
    copied = copy.deepcopy(model)
    assert is_masked(copied, masks) and list(copied.state_dict()) == list(make().state_dict())
    copied_optimizer = optimizer_of(copied)
    copied_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    enforcement = enforce(copied_optimizer, copied, masks)
    train(copied, copied_optimizer)
    train(model, optimizer)
    enforcement.verify()
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("foreach", [True, False])
def test_moving_average(foreach: bool) -> None:
    model, optimizer, masks, _ = masked()
    average = ModelEmaV3(model, decay=0.7, foreach=foreach)
    for step in range(4):
        train(model, optimizer, 1)
        average.update(model, step=step)
    assert is_masked(average.module, masks)
    assert not torch.equal(average.module[0].weight, model[0].weight)
    dense = ModelEmaV3(make(), decay=0.7)  # begun before the masks: they are put on it as the trainer does
    masks.apply_(dense.module)
    dense.update(model, step=3)
    assert is_masked(dense.module, masks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str) -> None:
    torch.compiler.reset()
    model, optimizer, masks, enforcement = masked()
    compiled = torch.compile(model, backend=backend)
    train(compiled, optimizer)
    enforcement.verify()
    reference, plain, _, _ = masked()
    train(reference, plain)
    assert is_masked(compiled, masks) and is_masked(model, masks)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    held = enforce(optimizer_of(compiled), compiled, masks)  # and the wrapper itself may be passed
    held.verify()
    torch.compiler.reset()


def test_state_dict(tmp_path: Path) -> None:
    model, optimizer, masks, _ = masked()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    masks.save(tmp_path / "masks.safetensors")
    again = make(seed=1)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert loaded == masks and is_masked(again, loaded)
    other = optimizer_of(again)
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    enforce(other, again, loaded)
    train(again, other)
    train(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel(group: None) -> None:
    model = make()
    masks = prune(model, 0.8)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(wrapped)
    enforcement = enforce(optimizer, wrapped, masks)
    for _ in range(2):  # the second time with gradients that are views of the wrapper's buckets
        train(wrapped, optimizer)
        enforcement.verify()
    assert is_masked(wrapped, masks) and prune(wrapped, 0.8) == masks
    reference, plain, _, _ = masked()
    train(reference, plain)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))

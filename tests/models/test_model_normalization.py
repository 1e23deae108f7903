"""Normalisation inside the model: the same function as in the transform, and no trace in the state dict."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torchvision.transforms import Normalize

from sparse_robust.errors import UsageError
from sparse_robust.models import create_model, default_normalization, get_normalization, set_normalization

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def tiny(**arguments: object) -> nn.Module:
    return create_model("test_resnet", num_classes=4, **{"mean": MEAN, "std": STD, **arguments}).eval()


def numbers(model: nn.Module) -> tuple[float, ...]:
    mean, std = get_normalization(model) or ((), ())
    return mean + std


def bare(model: nn.Module) -> nn.Module:
    """The same network without its pre-hook."""
    stripped = copy.deepcopy(model)
    stripped._forward_pre_hooks.clear()
    return stripped


@pytest.mark.acceptance("double-win", "A-22")
def test_equals_normalisation_in_the_transform() -> None:
    model, x = tiny(), torch.rand(4, 3, 32, 32)
    inside, outside = model(x), bare(model)(torch.stack([Normalize(MEAN, STD)(image) for image in x]))
    assert (inside - outside).abs().max() <= 1e-5 * outside.abs().max()
    assert not torch.allclose(inside, bare(model)(x), rtol=1e-2)


@pytest.mark.acceptance("double-win", "A-22")
def test_a_pixel_budget_is_eps_over_std_behind_the_normalisation() -> None:
    model, eps, seen = tiny(), 8 / 255, []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.rand(2, 3, 32, 32)
    model(x), model(x + eps)
    expected = (eps / torch.tensor(STD)).view(1, 3, 1, 1).expand_as(x)
    torch.testing.assert_close(seen[1] - seen[0], expected, rtol=1e-4, atol=1e-5)


def test_the_state_dict_does_not_know_it() -> None:
    model = tiny()
    assert not any("input_" in name for name in model.state_dict())
    buffers = dict(model.named_buffers())
    assert buffers["input_mean"].shape == buffers["input_std"].shape == (1, 3, 1, 1)
    model.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)
    assert numbers(model) == pytest.approx(MEAN + STD)


def test_attaching_twice_replaces() -> None:
    model, x = tiny(), torch.rand(2, 3, 32, 32)
    set_normalization(model, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    once = tiny(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert torch.equal(model(x), once(x))
    assert len(model._forward_pre_hooks) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_it_and_are_independent(copied: object) -> None:
    model, x = tiny(), torch.rand(2, 3, 32, 32)
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    set_normalization(twin, (0.0,) * 3, (1.0,) * 3)
    assert numbers(model) == pytest.approx(MEAN + STD)
    assert torch.equal(twin(x), bare(model)(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_moves_with_the_model(dtype: torch.dtype) -> None:
    model = tiny().to(dtype)
    assert model.input_mean.dtype == dtype
    assert model(torch.rand(2, 3, 32, 32, dtype=dtype)).dtype == dtype
    set_normalization(model, MEAN, STD)
    assert model.input_std.dtype == dtype


@pytest.mark.gpu
def test_it_moves_to_the_device() -> None:
    model = tiny().to("cuda")
    x = torch.rand(2, 3, 32, 32)
    assert model.input_mean.is_cuda
    torch.testing.assert_close(model(x.cuda()).cpu(), tiny()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend: str) -> None:
    model, x = tiny(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))


def test_defaults_are_timms_fitted_to_the_channels() -> None:
    model = create_model("resnet18")
    record = model.pretrained_cfg
    assert numbers(model) == pytest.approx(record["mean"] + record["std"])
    assert default_normalization(model, 1)[0] == pytest.approx((sum(record["mean"]) / 3,))
    assert default_normalization(model, 4)[0] == pytest.approx((*record["mean"], record["mean"][0]))
    assert default_normalization(nn.Linear(1, 1), 2) == ((0.5, 0.5), (0.5, 0.5))
    assert get_normalization(create_model("tf_efficientnet_lite0")) == ((0.5,) * 3, (0.5,) * 3)


def test_one_number_serves_all_channels() -> None:
    assert get_normalization(tiny(mean=[0.5], std=[0.25])) == ((0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ((0.5, 0.5), STD, "mean has 2 values, but the model takes 3 channels"),
        (MEAN, (0.1, 0.0, 0.1), "std must be above 0"),
        (MEAN, (0.1, float("nan"), 0.1), "std must be one finite number a channel"),
        ((), STD, "mean must be one finite number a channel"),
    ],
)
def test_values_that_cannot_be_are_refused(mean: tuple[float, ...], std: tuple[float, ...], says: str) -> None:
    model = tiny()
    with pytest.raises(UsageError, match=says):
        set_normalization(model, mean, std)
    assert numbers(model) == pytest.approx(MEAN + STD)


def test_one_number_is_that_of_all_channels() -> None:
    model = create_model("test_resnet", num_classes=4, mean=0.5, std=0.25)
    assert get_normalization(model) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(UsageError, match="std must be above 0"):
        create_model("test_resnet", num_classes=4, std=0)

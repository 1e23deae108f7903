"""The small-image stem of ResNets."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.models import create_model, save_model, use_small_stem

NARROW = {"resnet18": {}, "resnet50": {"channels": (8, 8, 8, 8)}, "resnet10t": {}, "resnet18d": {}, "seresnet18": {}}


@pytest.mark.parametrize("name", NARROW)
def test_the_map_stays_four_times_as_wide(name: str) -> None:
    default, small = (create_model(name, stem=stem, in_chans=1, **NARROW[name]).eval() for stem in ("default", "small"))
    x = torch.rand(1, 1, 32, 32)
    assert default.forward_features(x).shape[-2:] == (1, 1)
    assert small.forward_features(x).shape[-2:] == (4, 4)
    assert small.spec.stem == "small"
    assert [info["reduction"] for info in small.feature_info] == [1, 1, 2, 4, 8]
    assert isinstance(small.maxpool, nn.Identity)


def test_a_plain_stem_becomes_a_3x3_and_nothing_else_changes() -> None:
    default, small = create_model("resnet18", seed=3), create_model("resnet18", stem="small", seed=3)
    assert small.conv1.weight.shape == (64, 3, 3, 3)
    assert small.conv1.stride == (1, 1)
    others = [name for name in default.state_dict() if name != "conv1.weight"]
    assert list(small.state_dict()) == list(default.state_dict())
    assert all(torch.equal(small.state_dict()[name], default.state_dict()[name]) for name in others)
    assert torch.equal(small.conv1.weight, create_model("resnet18", stem="small", seed=3).conv1.weight)
    # He normal, fan out: variance 2 / (64 * 9)
    assert float(small.conv1.weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_a_deep_stem_keeps_its_weights() -> None:
    model = create_model("resnet10t", channels=(8, 8, 8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert use_small_stem(model) == ()
    assert model.conv1[0].stride == (1, 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_it_is_idempotent_and_keeps_device_type_and_random_state() -> None:
    model = create_model("resnet18").double().eval()
    state = torch.random.get_rng_state()
    assert use_small_stem(model) == ("conv1.weight",)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.conv1.weight.dtype == torch.float64
    weight = model.conv1.weight.clone()
    assert use_small_stem(model, seed=7) == ()
    assert torch.equal(model.conv1.weight, weight)
    assert [info["reduction"] for info in model.feature_info] == [1, 1, 2, 4, 8]


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "test_convnext", "mobilenetv3_small_050"])
def test_other_families_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} has no small stem. Families that have it: ResNet"):
        create_model(name, stem="small")


@pytest.mark.acceptance("double-win", "A-40")
def test_loaded_weights_that_the_stem_gives_up_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    narrow = {"channels": (8, 8, 8, 8), "num_classes": 3}
    source = create_model("resnet18", seed=1, **narrow)
    save_model(source, tmp_path / "weights.safetensors")
    timm.models.save_for_hf(source, str(tmp_path / "folder"), safe_serialization=True)
    ways = (
        {"name": "resnet18", "checkpoint": tmp_path / "weights.safetensors", **narrow},
        {"name": f"local-dir:{tmp_path / 'folder'}", "pretrained": True, "num_classes": 3},
    )
    for way in ways:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="sparse_robust"):
            model = create_model(**way, stem="small")
        assert [r.getMessage() for r in caplog.records if "starts conv1.weight afresh" in r.getMessage()]
        assert model.conv1.weight.shape[-1] == 3
        assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)


def test_a_file_with_the_small_stem_is_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = create_model("resnet18", stem="small", channels=(8, 8, 8, 8), seed=1)
    save_model(source, tmp_path / "weights.safetensors")
    model = create_model(
        "resnet18", stem="small", channels=(8, 8, 8, 8), checkpoint=tmp_path / "weights.safetensors", seed=2
    )
    assert torch.equal(model.conv1.weight, source.conv1.weight)
    assert not [r for r in caplog.records if r.name.startswith("sparse_robust") and r.levelno >= logging.WARNING]

"""create_model: timm's networks unchanged, deterministic, and errors that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from sparse_robust.errors import FileError, UsageError
from sparse_robust.models import build_model, create_model, get_normalization, save_model

TINY = "test_resnet"


def test_names_and_state_dict_are_timms() -> None:
    ours, timms = create_model("resnet18", num_classes=10), timm.create_model("resnet18", num_classes=10)
    assert type(ours) is type(timms)
    assert [(n, p.shape) for n, p in ours.named_parameters()] == [(n, p.shape) for n, p in timms.named_parameters()]
    assert list(ours.state_dict()) == list(timms.state_dict())
    timms.load_state_dict(ours.state_dict())
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in get_normalization(ours) or ())
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), timms.eval()((x - mean) / std))


@pytest.mark.acceptance("double-win", "A-41")
def test_a_seed_is_the_initial_state_and_leaves_the_callers() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (create_model(TINY, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    weights = [name for name, p in first.named_parameters() if p.ndim > 1]
    assert not any(torch.equal(first.get_parameter(name), other.get_parameter(name)) for name in weights)


@pytest.mark.parametrize("in_chans", [1, 2, 4])
def test_channels(in_chans: int) -> None:
    model = create_model(TINY, in_chans=in_chans, num_classes=3).eval()
    assert model(torch.rand(2, in_chans, 32, 32)).shape == (2, 3)
    with pytest.raises(UsageError, match=rf"{in_chans}-channel images .* got \[2, 3, 32, 32\]"):
        model(torch.rand(2, 3, 32, 32))


def test_spec_rebuilds_the_architecture() -> None:
    model = create_model("resnet10t", num_classes=5, in_chans=1, stem="small", channels=[8, 8, 16, 16])
    again = build_model(type(model.spec).from_dict(json.loads(json.dumps(model.spec.to_dict()))), seed=3)
    assert again.spec == model.spec
    assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in model.state_dict().items()}
    assert again.conv1[0].stride == (1, 1)


def test_unknown_names_list_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown model 'resnet81'. Did you mean 'resnet18'"):
        create_model("resnet81")
    with pytest.raises(UsageError, match="unknown weights tag of resnet18 'a1_in1'. Did you mean 'a1_in1k'"):
        create_model("resnet18.a1_in1")
    with pytest.raises(UsageError, match="hf-hub:timm/resnet18"):
        create_model("timm/resnet18")


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match=r"csatv2 does not classify 1-channel 512x512 images into 10 classes"):
        create_model("csatv2", in_chans=1)
    with pytest.raises(UsageError, match="test_efficientnet does not classify"):
        create_model("test_efficientnet", global_pool="")
    with pytest.raises(UsageError, match="expected logits .* got list"):
        create_model(TINY, features_only=True)
    with pytest.raises(UsageError, match="timm cannot build test_resnet with in_chans=3, widht=2: TypeError: .*widht"):
        create_model(TINY, widht=2)


def test_weights_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No pretrained weights exist for mobilenetv3_large_075"):
        create_model("mobilenetv3_large_075", pretrained=True)
    with pytest.raises(FileError, match="cannot read test_resnet with its weights.*local-dir:FOLDER"):
        create_model(TINY, pretrained=True)  # the tests have no network
    with pytest.raises(FileError, match="cannot read hf-hub:nobody/nothing"):
        create_model("hf-hub:nobody/nothing")
    with pytest.raises(FileError, match="Config file not found"):
        create_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="JSONDecodeError"):
        create_model(f"local-dir:{tmp_path}")


def test_a_file_is_not_a_name(tmp_path: Path) -> None:
    model = create_model(TINY)
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="this file as checkpoint="):
        create_model(str(tmp_path / "model.safetensors"))
    with pytest.raises(UsageError, match="give one of them"):
        create_model(TINY, pretrained=True, checkpoint=tmp_path / "model.safetensors")
    copy = create_model(TINY, checkpoint=tmp_path / "model.safetensors", seed=9)
    assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))


def folder_of(model: nn.Module, folder: Path) -> str:
    """Write the folder that timm loads with local-dir:."""
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return f"local-dir:{folder}"


def test_local_dir_round_trip(tmp_path: Path) -> None:
    source = timm.create_model("test_vit", num_classes=6, img_size=32, patch_size=8).eval()
    name = folder_of(source, tmp_path / "vit")
    model = create_model(name, num_classes=6, pretrained=True).eval()
    assert all(torch.equal(v, source.state_dict()[n]) for n, v in model.state_dict().items())
    assert (model.spec.name, model.spec.source) == ("test_vit", name)
    save_model(model, tmp_path / "vit.safetensors")
    (tmp_path / "vit" / "config.json").unlink()  # the spec alone rebuilds it
    rebuilt = build_model(model.spec).eval()
    rebuilt.load_state_dict(model.state_dict())
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(rebuilt(x), source(x))


def test_published_weights_get_a_new_head_for_another_class_count(tmp_path: Path) -> None:
    source = timm.create_model(TINY, num_classes=6)
    name = folder_of(source, tmp_path)
    model, again = (create_model(name, num_classes=9, pretrained=True, seed=2) for _ in range(2))
    state = source.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items() if not n.startswith("fc."))
    assert model.fc.weight.shape[0] == model.spec.num_classes == 9
    assert torch.equal(model.fc.weight, again.fc.weight)


def test_a_folder_with_other_weights_is_refused_even_when_the_head_is_new(tmp_path: Path) -> None:
    name = folder_of(timm.create_model(TINY, num_classes=6), tmp_path)
    other = timm.create_model("test_efficientnet", num_classes=6)
    timm.models.save_for_hf(other, str(tmp_path / "other"), safe_serialization=True)
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="(?s)and its weights: RuntimeError.*Missing key"):
        create_model(name, num_classes=9, pretrained=True)


def test_weights_in_a_folder_adapt_to_other_channels(tmp_path: Path) -> None:
    source = timm.create_model(TINY, num_classes=6)
    model = create_model(folder_of(source, tmp_path), num_classes=6, in_chans=1, pretrained=True)
    first = next(n for n, v in source.state_dict().items() if v.ndim == 4)
    assert torch.allclose(model.state_dict()[first], source.state_dict()[first].sum(1, keepdim=True), atol=1e-6)

"""Every family goes through the whole interface unchanged: ResNet, EfficientNet, MobileNet, ConvNeXt and ViT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import prunable_weights
from sparse_robust.models import (
    check_input_size,
    create_model,
    get_normalization,
    head_names,
    load_model,
    min_input_size,
    replace_head,
    save_model,
)

# name, timm arguments, smallest image side, head
FAMILIES: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "ResNet": ("resnet18", {"channels": (4, 4, 8, 8)}, 1, "fc"),
    "ResNet, small stem": ("resnet10t", {"channels": (4, 4, 8, 8), "stem_width": 8, "stem": "small"}, 1, "fc"),
    "EfficientNet": ("test_efficientnet", {}, 1, "classifier"),
    "MobileNetV3": ("mobilenetv3_small_050", {}, 1, "classifier"),
    "ConvNeXt": ("convnext_atto", {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}, 32, "head.fc"),
    "ViT": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2, "depth": 2},
        32,
        "head",
    ),
}
ALL = pytest.mark.parametrize("family", FAMILIES)
SIZE = 32


def build(family: str, seed: int = 0, **options: Any) -> nn.Module:
    name, arguments, _, _ = FAMILIES[family]
    return create_model(name, num_classes=5, in_chans=1, seed=seed, **arguments, **options).eval()


@ALL
def test_forward_and_gradient(family: str) -> None:
    model = build(family).train()
    x = torch.rand(2, 1, SIZE, SIZE, requires_grad=True)
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert x.grad is not None and bool(x.grad.abs().sum() > 0)
    # Residual branches that start at zero (layer scale, zero-initialised norms) still pass gradients to their gates.
    assert all(p.grad is not None for p in model.parameters())


@ALL
def test_prunable_weights_are_layers_without_the_head(family: str) -> None:
    model = build(family)
    weights = prunable_weights(model)
    head = FAMILIES[family][3] + ".weight"
    expected = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    } - {head}
    assert set(weights) == expected
    assert all(weights[name] is model.get_parameter(name) for name in weights)


@ALL
def test_a_new_head_and_nothing_else(family: str) -> None:
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.random.get_rng_state()
    assert replace_head(model, 7, seed=1) is model
    assert torch.equal(torch.random.get_rng_state(), random_state)
    head = FAMILIES[family][3]
    assert head_names(model) == (f"{head}.weight", f"{head}.bias")
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if n not in head_names(model))
    assert model(torch.rand(2, 1, SIZE, SIZE)).shape == (2, 7)
    assert model.spec.num_classes == model.num_classes == 7
    assert not any(module.training for module in model.modules())
    again = replace_head(build(family, seed=5), 7, seed=1)
    assert torch.equal(again.get_parameter(f"{head}.weight"), model.get_parameter(f"{head}.weight"))
    bound = model.get_parameter(f"{head}.weight").shape[1] ** -0.5  # torch's default for a linear layer
    assert 0.5 * bound < float(model.get_parameter(f"{head}.weight").detach().abs().max()) <= bound


@ALL
def test_save_and_load_are_bit_equal(family: str, tmp_path: Path) -> None:
    model = build(family, mean=[0.3], std=[0.7])
    save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(1)
    loaded = load_model(tmp_path / "model.safetensors").eval()
    assert loaded.spec == model.spec
    assert get_normalization(loaded) == get_normalization(model)
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in loaded.state_dict().items())
    x = torch.rand(2, 1, SIZE, SIZE)
    assert torch.equal(loaded(x), model(x))


@ALL
def test_the_smallest_image_is_what_real_forwards_say(family: str) -> None:
    model = build(family)
    smallest = FAMILIES[family][2]
    assert min_input_size(model) == (smallest, smallest)
    for side in (1, 2, 8, 28, 31, 32, 33, 40):
        try:
            accepted = bool(torch.isfinite(model(torch.rand(2, 1, side, side))).all())
        except (RuntimeError, AssertionError):
            accepted = False
        if accepted:
            check_input_size(model, side, side)
        else:
            with pytest.raises(UsageError, match=f"does not take {side}x{side} images"):
                check_input_size(model, side, side)


def test_checking_sizes_touches_nothing() -> None:
    model = build("ResNet").train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check_input_size(model, 28, 28)
    min_input_size(model)
    assert model.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_images_too_small_for_convnext() -> None:
    with pytest.raises(UsageError) as error:
        check_input_size(build("ConvNeXt"), 28, 28)
    message = str(error.value)
    assert message.startswith("convnext_atto does not take 28x28 images: the smallest it takes are 32x32 (")
    assert message.endswith(
        "What can be done: resize the images (resize=32), or choose a network for small images, such as resnet18 with "
        "stem='small'."
    )


def test_images_of_another_size_than_a_vits() -> None:
    model = build("ViT")
    with pytest.raises(UsageError) as error:
        check_input_size(model, 28, 28)
    message = str(error.value)
    assert message.startswith("vit_tiny_patch16_224 does not take 28x28 images: it is built for 32x32 (")
    assert "(resize=32), or build the model for them (img_size=28 and a patch_size that divides it), or " in message
    with pytest.raises(UsageError, match="does not take 64x64 images: it is built for 32x32 .*resize=32"):
        check_input_size(model, 64, 64)
    check_input_size(create_model("vit_tiny_patch16_224", depth=1, img_size=28, patch_size=7), 28, 28)


def test_a_vit_of_any_multiple_of_its_patch() -> None:
    model = create_model("test_vit", dynamic_img_size=True)
    assert min_input_size(model) == (16, 16)
    check_input_size(model, 48, 32)
    with pytest.raises(UsageError, match=r"does not take 40x40 images: the smallest it takes are 16x16 .*resize=48"):
        check_input_size(model, 40, 40)


def test_an_oblong_size() -> None:
    model = create_model("test_vit", img_size=(32, 64), dynamic_img_size=False)
    assert min_input_size(model) == (32, 64)
    check_input_size(model, 32, 64)
    with pytest.raises(UsageError, match="built for 32x64") as error:
        check_input_size(model, 64, 32)
    assert "resize=" not in str(error.value)  # which makes squares


@pytest.mark.parametrize("count", [1, 0, -3, 2.0, True])
def test_heads_that_cannot_be(count: Any) -> None:
    with pytest.raises(UsageError, match="num_classes must be a whole number of 2 or more"):
        replace_head(build("ResNet"), count)
    with pytest.raises(UsageError, match="Linear has no replaceable head"):
        replace_head(nn.Linear(2, 2), 3)


def test_a_head_keeps_device_and_precision_and_frozen_layers() -> None:
    model = build("ResNet").double().train()
    model.bn1.eval()
    replace_head(model, 3)
    assert model.fc.weight.dtype == torch.float64
    assert model.fc.training and not model.bn1.training


def test_a_distilled_transformer_has_two_heads() -> None:
    model = create_model(
        "deit_tiny_distilled_patch16_224", num_classes=4, depth=1, embed_dim=24, num_heads=2, img_size=32
    )
    replace_head(model, 6)
    assert head_names(model) == ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
    assert model.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 6)

"""Which weights are prunable, in every family of backbones, and how layers are excluded."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, fit_stem, prunable_weights, stem_weights


def create(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name, **arguments)
    return model


def numel(weights: dict[str, nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights.values())


@pytest.mark.acceptance("double-win", "A-4")
@pytest.mark.parametrize(
    ("name", "layers", "total", "without_stem"),
    [("resnet18", 20, 11_166_912, 11_157_504), ("resnet50", 53, 23_454_912, 23_445_504)],
)
def test_a_resnet_is_pruned_in_exactly_its_convolutions(name: str, layers: int, total: int, without_stem: int) -> None:
    model = create(name)
    weights = prunable_weights(model)
    convolutions = [f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert list(weights) == convolutions and len(weights) == layers and numel(weights) == total
    assert all(weights[n] is model.get_parameter(n) for n in weights)
    rest = prunable_weights(model, stem=False)
    assert numel(rest) == without_stem and set(weights) - set(rest) == {"conv1.weight"}
    assert set(prunable_weights(model, head=True)) - set(weights) == {"fc.weight"}


@pytest.mark.parametrize(
    ("name", "stem", "head"),
    [
        ("efficientnet_lite0", {"conv_stem.weight"}, {"classifier.weight"}),
        ("mobilenetv3_small_050", {"conv_stem.weight"}, {"classifier.weight"}),
        ("convnext_atto", {"stem.0.weight"}, {"head.fc.weight"}),
        ("vit_tiny_patch16_224", {"patch_embed.proj.weight"}, {"head.weight"}),
        ("deit_tiny_distilled_patch16_224", {"patch_embed.proj.weight"}, {"head.weight", "head_dist.weight"}),
        ("resnet10t", {"conv1.0.weight"}, {"fc.weight"}),
        ("repvgg_a0", {"stem.conv_kxk.conv.weight", "stem.conv_1x1.conv.weight"}, {"head.fc.weight"}),
    ],
)
def test_stem_and_head_of_other_families(name: str, stem: set[str], head: set[str]) -> None:
    model = create(name)
    weights = prunable_weights(model)
    layers = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert set(weights) == layers - head
    assert set(weights) - set(prunable_weights(model, stem=False)) == stem == set(stem_weights(model))
    assert set(prunable_weights(model, head=True)) == layers


def test_a_replaced_stem_is_still_the_stem() -> None:
    model = create("resnet10t")
    model.conv1 = nn.Conv2d(3, 8, 3, device="meta")
    assert stem_weights(model) == ("conv1.weight",)


def test_no_head_means_nothing_to_leave_out() -> None:
    model = create("resnet18", num_classes=0)
    assert len(prunable_weights(model)) == len(prunable_weights(model, head=True)) == 20


def test_plain_modules_leave_out_their_last_linear_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Embedding(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    assert list(prunable_weights(model)) == ["0.weight", "3.weight"]
    assert list(prunable_weights(model, head=True)) == ["0.weight", "3.weight", "4.weight"]
    assert list(prunable_weights(nn.ConvTranspose1d(2, 2, 3))) == ["weight"]
    assert stem_weights(model) == ()


def test_shared_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert list(prunable_weights(model)) == ["0.weight"]
    model[2].weight = model[0].weight  # now the head shares it too
    with pytest.raises(UsageError, match="its 1 layers are all excluded"):
        prunable_weights(model)


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ([], {"conv1", "layer1.0.conv1", "layer1.0.down.0", "layer2.0.conv1"}),
        (["layer1"], {"conv1", "layer2.0.conv1"}),
        ("layer1", {"conv1", "layer2.0.conv1"}),
        (["layer1.0.conv1"], {"conv1", "layer1.0.down.0", "layer2.0.conv1"}),
        (["layer1.0.conv1.weight"], {"conv1", "layer1.0.down.0", "layer2.0.conv1"}),
        (["*.down.*"], {"conv1", "layer1.0.conv1", "layer2.0.conv1"}),
        (["layer[12].*"], {"conv1"}),
        (["fc", "conv1"], {"layer1.0.conv1", "layer1.0.down.0", "layer2.0.conv1"}),
    ],
)
def test_layers_are_excluded_by_name_prefix_or_glob(patterns: list[str] | str, left: set[str]) -> None:
    def block() -> nn.ModuleDict:
        return nn.ModuleDict({"conv1": nn.Conv2d(1, 1, 1)})

    model = nn.ModuleDict({"conv1": nn.Conv2d(1, 1, 1), "layer1": nn.ModuleList([block()])})
    model["layer1"][0]["down"] = nn.ModuleList([nn.Conv2d(1, 1, 1)])
    model.update({"layer2": nn.ModuleList([block()]), "fc": nn.Linear(1, 1)})
    assert set(prunable_weights(model, exclude=patterns)) == {f"{name}.weight" for name in left}


def test_a_pattern_that_matches_nothing_lists_the_layers() -> None:
    with pytest.raises(UsageError, match="unknown layer to exclude 'layer1.0.cnv1'.*mean 'layer1.0.conv1'.*Known"):
        prunable_weights(create("resnet18"), exclude=["layer2", "layer1.0.cnv1"])


def test_a_prefix_ends_at_a_dot() -> None:
    model = nn.Sequential(*[nn.Conv2d(1, 1, 1) for _ in range(12)])
    assert list(prunable_weights(model, exclude=["1"])) == [f"{i}.weight" for i in range(12) if i != 1]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), {"stem": False}, "no convolution"),
        (lambda: nn.Linear(3, 3), {}, "Linear has no prunable weight: its 1 layers are all excluded"),
        (lambda: nn.BatchNorm2d(3), {}, "no convolution or linear layer"),
        (lambda: prune.random_unstructured(nn.Conv2d(1, 1, 3), "weight", 0.5), {}, "computed from other tensors"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(1, 1, 3)), {}, "remove_parametrizations"),
    ],
)
def test_what_cannot_be_pruned_is_said(make: object, arguments: dict[str, bool], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        prunable_weights(make(), **arguments)  # type: ignore[operator]


@pytest.mark.acceptance("double-win", "A-40")
def test_the_mask_of_a_replaced_stem_is_dropped_with_a_warning() -> None:
    masks = Masks.full(create("resnet18"))
    small = create("resnet18")
    small.conv1 = nn.Conv2d(3, 64, 3, device="meta")
    with pytest.warns(UserWarning, match=r"conv1.weight has shape \(64, 3, 3, 3\), its mask \(64, 3, 7, 7\)"):
        fitted = fit_stem(masks, small)
    assert set(masks.names()) - set(fitted.names()) == {"conv1.weight"}
    assert fit_stem(masks, create("resnet18")) is masks
    other = create("resnet50")
    assert fit_stem(masks, other) is masks, "only a stem is excused"
    with pytest.raises(UsageError, match="belong to another model"):
        masks.apply_(other)

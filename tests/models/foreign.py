"""Networks as other programs wrap, normalise and prune them, and checkpoints as they save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from sparse_robust.models import create_model, load_state

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = (tuple(torch.tensor(MEAN).tolist()), tuple(torch.tensor(STD).tolist()))  # as float32
NAME = "test_resnet"
PIXELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def timm_model(name: str = NAME, seed: int = 0, **arguments: Any) -> nn.Module:
    """A network as another program has it: without our normalisation."""
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=6, **arguments).eval()


def ours(name: str = NAME, **arguments: Any) -> nn.Module:
    return create_model(name, num_classes=6, seed=9, **arguments).eval()


def stored(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Write and read the file, so that only what survives it is tested."""
    torch.save(content, folder / "checkpoint.pth.tar")
    return load_state(folder / "checkpoint.pth.tar")


def close(first: Tensor, second: Tensor) -> bool:
    return torch.allclose(first, second, rtol=1e-5, atol=1e-6)


class InputNormalize(nn.Module):
    """As in the robustness library: buffers new_mean and new_std of shape [C, 1, 1]."""

    def __init__(self, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> None:
        super().__init__()
        self.register_buffer("new_mean", torch.tensor(mean)[..., None, None])
        self.register_buffer("new_std", torch.tensor(std)[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.new_mean) / self.new_std


class Attacker(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.normalize, self.model = InputNormalize(), model


class AttackerModel(nn.Module):
    """The robustness library's wrapper: its attacker holds the network a second time."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.normalizer, self.model = InputNormalize(), model
        self.attacker = Attacker(model)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.normalizer(x))


class Normalize(nn.Module):
    """As in advertorch and RobustBench: buffers mean and std."""

    def __init__(self, mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def pruned_by_torch(model: nn.Module, amount: float = 0.7) -> nn.Module:
    layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=amount)
    return model


class SubnetConv(nn.Conv2d):
    """As in HYDRA: a score a weight; all but the lowest int((1 - k) n) of a layer are kept."""

    k = 0.1

    def subnet(self) -> Tensor:
        scores = self.popup_scores.abs().flatten()
        kept = torch.ones_like(scores)
        kept[scores.sort().indices[: int((1 - self.k) * scores.numel())]] = 0
        return self.weight * kept.view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.subnet(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class SubnetLinear(nn.Linear):
    k = 0.1
    subnet = SubnetConv.subnet

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.subnet(), self.bias)


def hydra(name: str = NAME, k: float = 0.1) -> nn.Module:
    model = timm_model(name)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.__class__ = SubnetConv if isinstance(module, nn.Conv2d) else SubnetLinear
            module.popup_scores, module.k = nn.Parameter(torch.randn_like(module.weight)), k
    return model

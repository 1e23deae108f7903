"""The small robust networks that implementations are compared on, their images and their radii."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_robust import create_model
from sparse_robust.data import load_data
from sparse_robust.errors import FileError, unknown
from sparse_robust.seeding import seeded

FOLDER = Path(__file__).resolve().parent / "networks"

Images = tuple[Tensor, Tensor]
"""uint8 [n, 1, 28, 28] and int64 [n]."""


@dataclass(frozen=True)
class Network:
    """A network, its data and how it is trained; and the radii, one a norm, at which it is attacked."""

    name: str
    description: str
    data: str
    """Where the training images are from."""
    test: str
    """Where the attacked images are from."""
    build: Callable[[], nn.Module]
    train_eps: float
    """Linf radius of the training attack."""
    epochs: int
    lr: float
    eps: dict[str, float]
    """Radii for parity, where an attack's own seed moves few verdicts."""
    half_eps: float
    """Linf radius for speed, at which about half of the images withstand."""


@dataclass(frozen=True)
class Subject:
    """A trained network in eval mode with frozen parameters, and its test images in [0, 1]."""

    network: Network
    model: nn.Module
    x: Tensor
    y: Tensor
    available: int
    """Images of the whole test set."""

    def first(self, count: int) -> Subject:
        """Return the subject with ``count`` images, evenly spaced over the test set, in its order."""
        chosen = torch.arange(min(count, len(self.y))) * len(self.y) // min(count, len(self.y))
        return replace(self, x=self.x[chosen], y=self.y[chosen])


def _cnn() -> nn.Module:
    """The small network of Wong and Kolter (Provable defenses, 2018): no batch normalisation."""
    with seeded("parity", "cnn"):
        return nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )


def _cnn_bn() -> nn.Module:
    """The same with batch normalisation after every layer but the last."""
    with seeded("parity", "cnn-bn"):
        return nn.Sequential(
            nn.Conv2d(1, 16, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 100, bias=False),
            nn.BatchNorm1d(100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )


def _mlp() -> nn.Module:
    """Two hidden layers with batch normalisation, no convolution."""
    with seeded("parity", "mlp"):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(28 * 28, 200, bias=False),
            nn.BatchNorm1d(200),
            nn.ReLU(),
            nn.Linear(200, 100, bias=False),
            nn.BatchNorm1d(100),
            nn.ReLU(),
            nn.Linear(100, 10),
        )


def _timm(name: str, channels: tuple[int, ...], stem_width: int = 16, **options: str) -> Callable[[], nn.Module]:
    return lambda: create_model(name, in_chans=1, channels=channels, stem_width=stem_width, **options)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network(
            name="cnn",
            description="2 convolutions, no batch norm",
            data="fashion-mnist-source",
            test="fashion-mnist-source",
            build=_cnn,
            train_eps=0.1,
            epochs=30,
            lr=2e-3,
            eps={"Linf": 0.1, "L2": 1.0, "L1": 3.5},
            half_eps=0.13,
        ),
        Network(
            name="cnn-bn",
            description="2 convolutions, 3 batch norms",
            data="fashion-mnist-source",
            test="fashion-mnist-source",
            build=_cnn_bn,
            train_eps=0.1,
            epochs=30,
            lr=4e-3,
            eps={"Linf": 0.1, "L2": 1.0, "L1": 3.5},
            half_eps=0.13,
        ),
        Network(
            name="mlp",
            description="perceptron, 2 batch norms",
            data="fashion-mnist-source",
            test="fashion-mnist-source",
            build=_mlp,
            train_eps=0.1,
            epochs=30,
            lr=4e-3,
            eps={"Linf": 0.1, "L2": 1.0, "L1": 3.5},
            half_eps=0.13,
        ),
        Network(
            name="resnet10t-thin",
            description="ResNet-10-T with a deep stem, 8 to 64 channels, 14 batch norms",
            data="fashion-mnist-source",
            test="fashion-mnist-source",
            build=_timm("resnet10t", (8, 16, 32, 64), stem_width=8),
            train_eps=0.1,
            epochs=30,
            lr=4e-3,
            eps={"Linf": 0.1, "L2": 0.35, "L1": 0.7},
            half_eps=0.13,
        ),
        Network(
            name="resnet18",
            description="narrow ResNet-18, 20 batch norms",
            data="fashion-mnist-source",
            test="fashion-mnist-source",
            build=_timm("resnet18", (16, 32, 64, 128)),
            train_eps=0.1,
            epochs=20,
            lr=4e-3,
            eps={"Linf": 0.1, "L2": 1.0, "L1": 2.0},
            half_eps=0.15,
        ),
        Network(
            name="resnet10t",
            description="narrow ResNet-10-T with a deep stem, 14 batch norms",
            data="fashion-mnist-source",
            test="fashion-mnist-target",
            build=_timm("resnet10t", (24, 48, 96, 192)),
            train_eps=0.1,
            epochs=20,
            lr=4e-3,
            eps={"Linf": 0.12, "L2": 0.9, "L1": 1.5},
            half_eps=0.135,
        ),
        Network(
            name="resnet18-digits",
            description="narrow ResNet-18 for 8x8 pixels, 20 batch norms",
            data="digits",
            test="digits",
            build=_timm("resnet18", (12, 24, 48, 96), stem="small"),
            train_eps=0.15,
            epochs=40,
            lr=4e-3,
            eps={"Linf": 0.2, "L2": 0.65, "L1": 1.2},
            half_eps=0.2,
        ),
        Network(
            name="resnet10t-digits",
            description="narrow ResNet-10-T for 8x8 pixels, 12 batch norms",
            data="digits",
            test="digits",
            build=_timm("resnet10t", (16, 32, 64, 128), stem="small"),
            train_eps=0.1,
            epochs=40,
            lr=4e-3,
            eps={"Linf": 0.17, "L2": 0.7, "L1": 1.4},
            half_eps=0.15,
        ),
    )
}


def read_images(network: Network) -> tuple[Images, Images]:
    """Return the images to train a network on and those to attack it on."""
    train, test = load_data(network.data).train, load_data(network.test).test
    return (train.pixels, train.labels), (test.pixels, test.labels)


def path_of(network: Network) -> Path:
    """Return the file with the network's weights and test images."""
    return FOLDER / f"{network.name}.safetensors"


def save(network: Network, model: nn.Module, test: Images) -> None:
    """Write a network's file, whole or not at all."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    partial = path_of(network).with_suffix(".partial")
    save_file(tensors | {"x": test[0].contiguous(), "y": test[1].contiguous()}, partial)
    partial.replace(path_of(network))


def load(name: str, device: torch.device | str = "cpu") -> Subject:
    """Return a trained network with its test images.

    Raises:
        UsageError: for an unknown name.
        FileError: if it has not been trained.
    """
    if name not in NETWORKS:
        raise unknown("network", name, NETWORKS)
    network = NETWORKS[name]
    if not path_of(network).exists():
        raise FileError(f"{path_of(network)} does not exist: python -m benchmarks.parity.train makes it.")
    with safe_open(path_of(network), "pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    model = network.build()
    x, y = tensors.pop("x"), tensors.pop("y")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    model.eval().requires_grad_(False).to(device)
    return Subject(network, model, x.to(device).float() / 255, y.to(device), len(y))

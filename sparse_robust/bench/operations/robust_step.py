"""A step of PGD adversarial training: on a replica, captured or not, against plain loops and against no attack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_robust.attacks import PGD
from sparse_robust.attacks.replica import make_replica
from sparse_robust.bench.harness import Case, GateError, operation
from sparse_robust.bench.operations.masked_step import sgd
from sparse_robust.bench.operations.pgd import naive_pgd
from sparse_robust.bench.operations.problem import Problem, of_network
from sparse_robust.models import create_model

STRENGTH = 0.9  # of the loss that the plain loop's images gain, at least: what a lower precision may cost
Craft = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A network, a batch and an attack."""

    network: str
    steps: int
    eps: float
    batch: int
    channels: int
    size: int
    options: tuple[tuple[str, object], ...] = ()

    @property
    def attack(self) -> PGD:
        return PGD(steps=self.steps)

    def problem(self, device: torch.device) -> Problem:
        shape = (self.batch, self.channels, self.size)
        options: dict[str, Any] = dict(self.options)
        network = create_model(self.network, num_classes=10, in_chans=self.channels, seed=0, **options)
        return of_network(device, f"{self.network} PGD-{self.steps}", *shape, network)


RESNET50 = Setting("resnet50", 3, 4 / 255, 256, 3, 224)
RESNET18 = Setting("resnet18", 10, 8 / 255, 128, 3, 32, (("stem", "small"),))
TINY = (("channels", (8, 8, 16, 16)), ("stem_width", 8))
SETTINGS: dict[str, dict[str, tuple[Setting, ...]]] = {
    "quick": dict.fromkeys(("cpu", "cuda"), (Setting("resnet10t", 3, 0.1, 4, 1, 28, TINY),)),
    "full": {"cpu": (replace(RESNET18, steps=3, batch=8),), "cuda": (RESNET18, RESNET50)},
}


class Stack:
    """How a step computes: precision and memory format, the same in attack and training."""

    def __init__(self, device: torch.device, fast: bool) -> None:
        self.device = device
        self.precision = "bf16" if fast and device.type == "cuda" else "fp32"
        self.memory_format = torch.channels_last if fast else torch.contiguous_format

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def step(self, given: Problem, make_craft: Callable[[nn.Module], Craft]) -> Callable[[], Tensor]:
        """Return a function that trains a network of its own by one step, and returns the loss."""
        model = given.copy().to(memory_format=self.memory_format).train()
        optimizer = sgd(model)
        craft: Craft | None = None

        def call() -> Tensor:
            nonlocal craft
            craft = craft or make_craft(model)
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=True):
                images = craft(model, given.x, given.y)
                optimizer.zero_grad(set_to_none=True)
                with self.autocast():
                    loss = functional.cross_entropy(model(images), given.y)
                loss.backward()
                optimizer.step()
            return loss.detach()

        return call


def on_replica(setting: Setting, given: Problem, stack: Stack, capture: bool) -> Callable[[nn.Module], Craft]:
    def make(model: nn.Module) -> Craft:
        replica = make_replica(model, given.x[:8], precision=stack.precision, capture=capture)
        attack = setting.attack

        def craft(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            replica.refresh()
            return attack(replica.target, x, y, eps=setting.eps)

        return craft

    return make


def on_the_model(setting: Setting, stack: Stack) -> Callable[[nn.Module], Craft]:
    attack = setting.attack

    def craft(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with stack.autocast():
            return attack(model, x, y, eps=setting.eps)

    return lambda model: craft


def naive(setting: Setting) -> Callable[[nn.Module], Craft]:
    step_size = setting.attack.resolve_step_size(setting.eps)

    def craft(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        model.eval()
        adversarial = naive_pgd(model, x, y, eps=setting.eps, step_size=step_size, steps=setting.steps)
        model.train()
        return adversarial

    return lambda model: craft


@operation("robust-step", "a step of PGD adversarial training on a replica, captured and not, against plain loops")
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    for setting in SETTINGS[scale][device.type]:
        yield case(setting, setting.problem(device))


def case(setting: Setting, given: Problem) -> Case:
    device = given.x.device
    fast, plain = Stack(device, fast=True), Stack(device, fast=False)
    crafts: dict[str, tuple[Stack, Callable[[nn.Module], Craft]]] = {
        "replica, captured": (fast, on_replica(setting, given, fast, capture=True)),
        "replica": (fast, on_replica(setting, given, fast, capture=False)),
        "on the model": (fast, on_the_model(setting, fast)),
        "naive loop, fp32": (plain, naive(setting)),
        "no attack": (fast, lambda model: lambda model, x, y: x),
    }

    def gate() -> str:
        model = given.copy()
        gains = {}
        for name, (stack, make) in list(crafts.items())[:4]:
            attacked = given.copy().to(memory_format=stack.memory_format).train()
            images = make(attacked)(attacked, given.x, given.y)
            require_within(name, images, given.x, setting.eps)
            gains[name] = loss(model, images, given.y) - loss(model, given.x, given.y)
        naive_gain = gains["naive loop, fp32"]
        for name, gain in gains.items():
            if not gain >= STRENGTH * naive_gain > 0:
                raise GateError(
                    f"images of {name} raise the loss by {gain:.4g}, those of the naive loop by {naive_gain:.4g}"
                )
        return "images within the budget, as strong as the naive loop's: " + ", ".join(
            f"{gain / naive_gain:.3f}" for gain in gains.values()
        )

    return Case(
        name=given.name,
        routes={name: stack.step(given, make) for name, (stack, make) in crafts.items()},
        gate=gate,
        work=len(given.x),
        unit="images",
    )


@torch.no_grad()
def loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the cross-entropy in fp32, in evaluation mode."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return float(functional.cross_entropy(model.eval()(x), y))


def require_within(name: str, images: Tensor, x: Tensor, eps: float) -> None:
    """Raise `GateError` for images outside of the ball or the box."""
    if not bool(((images >= (x - eps).clamp(min=0)) & (images <= (x + eps).clamp(max=1))).all()):
        raise GateError(f"{name}: images lie outside of the budget {eps:.4g} or of [0, 1]")

"""One training step of each regime, against the same step written down plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional

from sparse_robust.attacks import FGSM, PGD
from sparse_robust.bench.gates import reproducible, require_finite, require_same
from sparse_robust.bench.harness import Case, operation
from sparse_robust.bench.operations.masked_step import sgd
from sparse_robust.bench.operations.pgd import naive_pgd
from sparse_robust.bench.operations.problem import EPS, Problem, problem

Craft = Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def _keep(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x


def _ours(attack: Callable[..., torch.Tensor]) -> Craft:
    return lambda model, x, y: attack(model, x, y, eps=EPS)


def _naive(steps: int, step_size: float) -> Craft:
    def craft(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        model.eval()
        adversarial = naive_pgd(model, x, y, eps=EPS, step_size=step_size, steps=steps)
        model.train()
        return adversarial

    return craft


REGIMES: dict[str, tuple[Craft, Craft]] = {
    "standard": (_keep, _keep),
    "fast": (_ours(FGSM(step_size=1.25 * EPS)), _naive(1, 1.25 * EPS)),
    "adversarial": (_ours(PGD(steps=3, step_size=2 * EPS / 3)), _naive(3, 2 * EPS / 3)),
}


def step(given: Problem, craft: Craft) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    """Return a network and a function that trains it by one step on crafted images and returns the loss."""
    model = given.copy().train()
    optimizer = sgd(model)

    def call() -> torch.Tensor:
        images = craft(model, given.x, given.y)
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(images), given.y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, call


@operation(
    "training-step", "standard, fast adversarial (FGSM) and PGD-3 adversarial training, attack in evaluation mode"
)
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    given = problem(device, scale)
    for regime, crafts in REGIMES.items():
        yield case(given, regime, *crafts)


def case(given: Problem, regime: str, ours: Craft, naive: Craft) -> Case:
    def gate() -> str:
        (model, our_step), (expected, their_step) = step(given, ours), step(given, naive)
        with reproducible():
            require_finite("the loss", our_step())
            their_step()
        require_same("state after a step", model.state_dict(), expected.state_dict())
        return "same weights after a step, bit for bit; finite loss"

    routes = {"ours": step(given, ours)[1]}
    if naive is not ours:
        routes["naive loop"] = step(given, naive)[1]
    return Case(name=f"{regime}, {given.name}", routes=routes, gate=gate, work=len(given.x), unit="images")

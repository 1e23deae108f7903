"""PGD-20, as in evaluation, against the loop that one finds in papers' code."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from sparse_robust.attacks import PGD
from sparse_robust.bench.gates import reproducible, require_same
from sparse_robust.bench.harness import Case, operation
from sparse_robust.bench.operations.problem import EPS, problem

STEPS = 20
STEP_SIZE = EPS / 4


def naive_pgd(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, eps: float, step_size: float, steps: int
) -> torch.Tensor:
    """Linf PGD from our random start, written down plainly: `backward` through all parameters of the model."""
    adversarial = PGD(steps=0)(model, x, y, eps=eps).clone()
    for _ in range(steps):
        adversarial.requires_grad_(True)
        model.zero_grad()
        functional.cross_entropy(model(adversarial), y, reduction="sum").backward()
        assert adversarial.grad is not None
        moved = adversarial.detach() + step_size * adversarial.grad.sign()
        adversarial = moved.clamp(x - eps, x + eps).clamp(0, 1)
    return adversarial


@operation("pgd", "PGD-20 on a batch, network in evaluation mode")
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    given = problem(device, scale)
    model = given.network.eval()

    attack = PGD(norm="Linf", steps=STEPS, step_size=STEP_SIZE)

    def ours() -> torch.Tensor:
        return attack(model, given.x, given.y, eps=EPS)

    def naive() -> torch.Tensor:
        return naive_pgd(model, given.x, given.y, eps=EPS, step_size=STEP_SIZE, steps=STEPS)

    def gate() -> str:
        with reproducible():
            require_same("adversarial images", {"x": ours()}, {"x": naive()})
        return "same images, bit for bit"

    yield Case(
        name=given.name,
        routes={"PGD": ours, "naive loop": naive},
        gate=gate,
        work=len(given.x),
        unit="images",
    )

"""One step of an optimizer at 80 % sparsity with a bf16 copy of the weights: in one pass, and in three."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from sparse_robust.bench.gates import require_close, require_same
from sparse_robust.bench.harness import Case, operation
from sparse_robust.bench.operations.select import layers
from sparse_robust.masks import Masks
from sparse_robust.pruning import enforce, prune
from sparse_robust_kernels.optim import MaskedAdamW, MaskedSGD

SPARSITY = 0.8
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "quick": {"cpu": (30_000,), "cuda": (30_000,)},
    "full": {"cpu": (10_000_000,), "cuda": (25_000_000, 300_000_000)},
}
STEPS = 3
TOLERANCE = 1e-5  # between torch's fused AdamW and ours, on a GPU, relative to the largest weight

Step = Callable[[], object]


@operation(
    "optimizer-step", "an optimizer's step at 80 % sparsity with a bf16 copy, against torch.optim, mask and cast"
)
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    for total in SIZES[scale].get(device.type, ()):
        network = layers(total, device)
        masks = prune(network, sparsity=SPARSITY, head=True)
        masks.apply_(network)
        generator = torch.Generator(device).manual_seed(1)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, device=device)
        yield case("SGD", total, network, masks)
        yield case("AdamW", total, network, masks)


def case(kind: str, total: int, network: nn.Module, masks: Masks) -> Case:
    fused = next(network.parameters()).is_cuda or None
    ours: Callable[..., torch.optim.Optimizer]
    theirs: Callable[..., torch.optim.Optimizer]
    if kind == "SGD":
        ours = partial(MaskedSGD, lr=1e-3, momentum=0.9, weight_decay=5e-4)
        theirs = partial(torch.optim.SGD, lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=fused)
    else:
        ours, theirs = partial(MaskedAdamW, lr=1e-3), partial(torch.optim.AdamW, lr=1e-3, fused=fused)

    def one_pass() -> tuple[nn.Module, list[torch.Tensor], Step]:
        model, copies = _twin(network)
        named = dict(zip(dict(model.named_parameters()), copies, strict=True))
        return model, copies, ours(model.named_parameters(), masks=masks, copies=named).step

    def three_passes() -> tuple[nn.Module, list[torch.Tensor], Step]:
        model, copies = _twin(network)
        parameters: list[torch.Tensor] = list(model.parameters())
        optimizer = theirs(parameters)
        enforce(optimizer, model, masks)

        def step() -> None:
            optimizer.step()
            with torch.no_grad():
                torch._foreach_copy_(copies, parameters)

        return model, copies, step

    def gate() -> str:
        (model, copies, step), (other, other_copies, other_step) = one_pass(), three_passes()
        for _ in range(STEPS):
            step()
            other_step()
        found, expected = model.state_dict(), other.state_dict()
        if not fused:
            require_same("weights after three steps", found, expected)
            require_same("copies", _named(copies), _named(other_copies))
            return "same weights and copies as torch.optim with masks after three steps, bit for bit"
        require_close("weights after three steps", found, expected, TOLERANCE)
        return f"same weights as torch.optim with masks after three steps, within {TOLERANCE:.0e} of the largest"

    return Case(
        name=f"{kind}, {total:,} weights",
        routes={
            f"Masked{kind}": one_pass()[2],
            "torch.optim, enforce, cast": three_passes()[2],
            "torch.optim alone": theirs(_twin(network)[0].parameters()).step,
        },
        gate=gate,
        work=total,
        unit="weights",
    )


def _named(copies: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"copy {index}": tensor for index, tensor in enumerate(copies)}


def _twin(network: nn.Module) -> tuple[nn.Module, list[torch.Tensor]]:
    """An independent network with the same weights and gradients, and room for a bf16 copy of its weights."""
    twin = copy.deepcopy(network)
    for parameter, original in zip(twin.parameters(), network.parameters(), strict=True):
        parameter.grad = None if original.grad is None else original.grad.clone()
    return twin, [torch.zeros_like(parameter, dtype=torch.bfloat16) for parameter in twin.parameters()]

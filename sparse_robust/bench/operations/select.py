"""Exact global selection: which weights of all layers together are the smallest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparse_robust.bench.gates import require_same
from sparse_robust.bench.harness import Case, GateError, operation
from sparse_robust.masks import Masks
from sparse_robust.pruning import prune

RATE = 0.2
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "quick": {"cpu": (30_000,), "cuda": (30_000,)},
    "full": {"cpu": (1_000_000, 10_000_000), "cuda": (25_000_000, 100_000_000)},
}


def layers(total: int, device: torch.device) -> nn.Sequential:
    """Linear layers without biases that hold ``total`` weights, the sizes falling by halves as in a real network."""
    generator = torch.Generator(device).manual_seed(0)
    sizes, left = [], total
    while left > 1000:
        sizes.append(left // 2 + 1)
        left -= sizes[-1]
    network = nn.Sequential()
    for size in [*sizes, left]:
        layer = nn.Linear(size, 1, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.randn(1, size, generator=generator, device=device))
        network.append(layer)
    return network


def by_sorting(weights: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The same masks the slow way: sort a concatenated copy; a stable sort breaks ties as we do."""
    magnitude = torch.cat([weight.abs().flatten() for weight in weights])
    keep = torch.ones_like(magnitude, dtype=torch.bool)
    keep[torch.sort(magnitude, stable=True).indices[:count]] = False
    return list(keep.split([weight.numel() for weight in weights]))


def by_torch(weights: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """The masks of ``torch.nn.utils.prune.global_unstructured``, on fresh modules that share the weights' memory."""
    holders = []
    for weight in weights:
        holder = nn.Module()
        holder.weight = nn.Parameter(weight)
        holders.append(holder)
    targets = [(holder, "weight") for holder in holders]
    torch_prune.global_unstructured(targets, torch_prune.L1Unstructured, amount=count)
    return [holder.get_buffer("weight_mask").bool().flatten() for holder in holders]


@operation("select", "the 20 % smallest weights over all layers, exactly")
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    for total in SIZES[scale].get(device.type, ()):
        yield case(total, device)


def case(total: int, device: torch.device) -> Case:
    network = layers(total, device)
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    count = round(RATE * total)

    def ours() -> Masks:
        return prune(network, count=total - count, head=True)

    def gate() -> str:
        masks = ours()
        found = {name: masks[name].flatten().cpu() for name in weights}
        sorted_out = dict(zip(weights, by_sorting(list(weights.values()), count), strict=True))
        require_same("masks against a stable sort", found, sorted_out)
        removed = torch.cat([weights[name].flatten().cpu()[~keep] for name, keep in found.items()])
        threshold = removed.abs().max()
        for (name, keep), other in zip(found.items(), by_torch(list(weights.values()), count), strict=True):
            disputed = weights[name].flatten().cpu()[keep != other.cpu()]
            if not bool((disputed.abs() == threshold).all()):
                raise GateError(
                    f"masks against torch.nn.utils.prune: {name} differs away from the threshold {threshold}"
                )
        return "same masks as a stable sort, and as torch.nn.utils.prune but for ties"

    return Case(
        name=f"{total:,} weights",
        routes={
            "prune": ours,
            "torch.nn.utils.prune": lambda: by_torch(list(weights.values()), count),
            "torch.sort": lambda: by_sorting(list(weights.values()), count),
        },
        gate=gate,
        work=total,
        unit="weights",
    )

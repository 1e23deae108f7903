"""Exact global selection: which weights of all layers together are the smallest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparse_robust.bench.gates import require_same
from sparse_robust.bench.harness import Case, GateError, operation
from sparse_robust.bench.operations.memory import extra_peak
from sparse_robust.masks import Masks, cut
from sparse_robust.pruning import prune

RATE = 0.2
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "quick": {"cpu": (30_000,), "cuda": (30_000,)},
    "full": {"cpu": (1_000_000, 10_000_000), "cuda": (25_000_000, 100_000_000)},
}
LARGE = {"quick": 100_000, "full": 100_000_000}
LAYERS = 50
MEMORY = 0.10  # of the extra memory of torch.nn.utils.prune, at most
MEASURABLE = 10_000_000  # weights; with fewer, a process grows for other reasons


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
    yield large(LARGE[scale], device)


def large(total: int, device: torch.device) -> Case:
    """Many weights in equal layers, and the memory that it takes; too many for sorting to be a rival on a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (total // LAYERS // 1000, 1000)
    weights = {f"layer{i}": torch.randn(shape, generator=generator, device=device) for i in range(LAYERS)}
    count = round(RATE * total)

    def ours() -> Masks:
        return cut(weights, count, magnitude=True)

    def theirs() -> list[torch.Tensor]:
        return by_torch(list(weights.values()), count)

    memory: dict[str, float] = {}

    def gate() -> str:
        used, compared = extra_peak(ours, device), extra_peak(theirs, device)
        memory.update(
            {name: size for name, size in (("cut", used), ("torch.nn.utils.prune", compared)) if size is not None}
        )
        masks = ours()
        kept = {name: masks.on(name, device).flatten() for name in weights}
        threshold = require_largest_kept(weights, kept, count)
        require_same_but_for_ties(weights, kept, theirs(), threshold)
        if used is None or compared is None or total < MEASURABLE:
            return "same masks as torch.nn.utils.prune but for ties"
        if used > MEMORY * compared:
            raise GateError(
                f"needs {used / 1e6:.0f} MB, more than {MEMORY:.0%} of the {compared / 1e6:.0f} MB of torch"
            )
        return f"same masks as torch.nn.utils.prune but for ties, in {used / 1e6:.0f} of its {compared / 1e6:.0f} MB"

    return Case(
        name=f"{total:,} weights in {LAYERS} layers",
        routes={"cut": ours, "torch.nn.utils.prune": theirs},
        gate=gate,
        work=total,
        unit="weights",
        memory=memory,
    )


def require_largest_kept(weights: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor], count: int) -> float:
    """Raise unless exactly ``count`` are removed, none larger than one that is kept; return the largest of them."""
    removed = sum(int((~keep).sum()) for keep in kept.values())
    if removed != count:
        raise GateError(f"removed {removed} weights instead of {count}")
    largest = max(float(weights[name].flatten()[~keep].abs().max()) for name, keep in kept.items() if not keep.all())
    smallest = min(float(weights[name].flatten()[keep].abs().min()) for name, keep in kept.items() if keep.any())
    if largest > smallest:
        raise GateError(f"removed a weight of magnitude {largest} and kept one of {smallest}")
    return largest


def require_same_but_for_ties(
    weights: Mapping[str, torch.Tensor],
    kept: Mapping[str, torch.Tensor],
    others: Sequence[torch.Tensor],
    threshold: float,
) -> None:
    """Raise unless masks differ only among weights whose magnitude is the threshold."""
    for (name, keep), other in zip(kept.items(), others, strict=True):
        disputed = weights[name].flatten()[keep != other.to(keep.device)]
        if not bool((disputed.abs() == threshold).all()):
            raise GateError(f"masks against torch.nn.utils.prune: {name} differs away from the threshold {threshold}")


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
        flat = {name: weight.cpu() for name, weight in weights.items()}
        threshold = require_largest_kept(flat, found, count)
        require_same_but_for_ties(flat, found, by_torch(list(weights.values()), count), threshold)
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

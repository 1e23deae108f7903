"""Bringing an attack replica up to date: one masked copy of all tensors, against a copy layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from sparse_robust.attacks.folding import as_column, folded
from sparse_robust.attacks.refresh import named_tensors
from sparse_robust.attacks.replica import Replica, make_replica
from sparse_robust.bench.gates import require_same
from sparse_robust.bench.harness import Case, GateError, operation
from sparse_robust.bench.operations.problem import Problem, of_network, problem
from sparse_robust.models import create_model


def resnet50(device: torch.device) -> Problem:
    """Return a ResNet-50 with two images, which a replica is checked on; its refresh does not depend on them."""
    return of_network(device, "resnet50", 2, 3, 64, create_model("resnet50", num_classes=10, seed=0))


@operation("replica-refresh", "weights and batch norms into the frozen copy that attacks use: weights a second")
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    for given in [problem(device, scale), *([resnet50(device)] if scale == "full" else [])]:
        for precision in ("fp32", "bf16"):
            yield case(given, precision)


def case(given: Problem, precision: str) -> Case:
    model = given.copy().to(memory_format=torch.channels_last).eval()
    ours, theirs = (make_replica(model, given.x, precision=precision) for _ in range(2))
    one_by_one = layer_by_layer(model, theirs)

    def gate() -> str:
        if ours.module is None or theirs.module is None or not ours.folded:
            raise GateError(f"no batch norm is folded: {ours.reason}")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        ours.refresh()
        one_by_one()
        require_same("the copy", dict(named_tensors(ours.module)), dict(named_tensors(theirs.module)))
        return "the same bits in every tensor of the copy"

    return Case(
        name=f"{given.name.split()[0]}, {precision}",
        routes={"one masked copy": ours.refresh, "layer by layer": one_by_one},
        gate=gate,
        work=sum(parameter.numel() for parameter in model.parameters()),
        unit="weights",
    )


def layer_by_layer(model: nn.Module, replica: Replica) -> Callable[[], None]:
    """Return the plain way: each batch norm is folded by itself, each tensor copied by itself."""

    @torch.no_grad()
    def refresh() -> None:
        assert replica.module is not None
        sources = dict(named_tensors(model))
        for pair in replica.folded:
            layer = model.get_submodule(pair.layer)
            (scale,), (bias,) = folded([layer], [model.get_submodule(pair.norm)])
            weight = sources[f"{pair.layer}.weight"]
            sources |= {f"{pair.layer}.weight": weight * as_column(scale, weight), f"{pair.layer}.bias": bias}
        for name, tensor in named_tensors(replica.module):
            tensor.copy_(sources[name])

    return refresh

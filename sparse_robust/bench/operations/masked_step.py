"""One step of SGD on a masked network: kept at zero in place, against reparametrisation and against no mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune as torch_prune

from sparse_robust.bench.gates import reproducible, require_close, require_same
from sparse_robust.bench.harness import Case, operation
from sparse_robust.bench.operations.problem import Problem, perceptron, problem, small_resnet18
from sparse_robust.masks import Masks
from sparse_robust.pruning import enforce, prune
from sparse_robust_kernels.optim import MaskedSGD

SPARSITY = 0.8
OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}
TOLERANCE = 1e-5  # of torch's fused SGD and of kernels, relative to the largest weight of a layer

Step = Callable[[], torch.Tensor]
Made = tuple[nn.Module, Step]


def sgd(model: nn.Module, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **OPTIONS, **more)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, given: Problem) -> Step:
    """Return a function that makes one step of standard training and returns the loss."""

    def call() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(given.x), given.y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def dense(given: Problem, masks: Masks, **more: Any) -> Made:
    model = given.copy().train()
    return model, step(model, sgd(model, **more), given)


def fused(given: Problem, masks: Masks) -> Made:
    model = given.copy().train()
    optimizer = MaskedSGD(model.named_parameters(), masks=masks, **OPTIONS)
    return model, step(model, optimizer, given)


def enforced(given: Problem, masks: Masks, **more: Any) -> Made:
    model = given.copy().train()
    masks.apply_(model)
    optimizer = sgd(model, **more)
    enforce(optimizer, model, masks)
    return model, step(model, optimizer, given)


def reparametrised(given: Problem, masks: Masks) -> Made:
    model = given.copy().train()
    for name in masks.names():
        path, _, parameter = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(path), parameter, masks[name].to(given.x.device))
    return model, step(model, sgd(model), given)


ROUTES: dict[str, Callable[[Problem, Masks], Made]] = {
    "MaskedSGD": fused,
    "enforce, fused SGD": partial(enforced, fused=True),
    "enforce": enforced,
    "dense": dense,
    "dense, fused SGD": partial(dense, fused=True),
    "torch.nn.utils.prune": reparametrised,
}


@operation("masked-step", "a step of SGD at 80 % sparsity against the dense step and torch.nn.utils.prune")
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    for make in (perceptron, problem, *([small_resnet18] if scale == "full" else [])):
        yield case(make(device, scale))


def case(given: Problem) -> Case:
    masks = prune(given.network, sparsity=SPARSITY)

    def gate() -> str:
        expected = after_three_steps(reparametrised(given, masks))
        for name in masks.names():
            expected[name] = expected.pop(f"{name}_orig") * expected.pop(f"{name}_mask")
        exact = given.x.device.type == "cpu"
        for route in ("MaskedSGD", "enforce", "enforce, fused SGD"):
            found = after_three_steps(ROUTES[route](given, masks))
            what = f"state after three steps of {route}"
            if exact and "fused" not in route:
                require_same(what, found, {name: expected[name] for name in found})
            else:
                require_close(what, found, {name: expected[name] for name in found}, TOLERANCE)
        how = "bit for bit" if exact else f"within {TOLERANCE:.0e} of the largest"
        return f"same weights as torch.nn.utils.prune after three steps, {how}"

    return Case(
        name=given.name,
        routes={route: make(given, masks)[1] for route, make in ROUTES.items()},
        gate=gate,
        work=len(given.x),
        unit="images",
    )


def after_three_steps(made: Made) -> dict[str, torch.Tensor]:
    model, call = made
    with reproducible():
        for _ in range(3):
            call()
    state: Mapping[str, torch.Tensor] = model.state_dict()
    return dict(state)

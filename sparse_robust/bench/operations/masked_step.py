"""One step of SGD on a masked network: kept at zero in place, against reparametrisation and against no mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune as torch_prune

from sparse_robust.bench.gates import reproducible, require_same
from sparse_robust.bench.harness import Case, operation
from sparse_robust.bench.operations.problem import Problem, problem
from sparse_robust.masks import Masks
from sparse_robust.pruning import enforce, prune

SPARSITY = 0.8


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, given: Problem) -> Callable[[], torch.Tensor]:
    """Return a function that makes one step of standard training and returns the loss."""

    def call() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(given.x), given.y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return call


def dense(given: Problem) -> Callable[[], torch.Tensor]:
    model = given.copy().train()
    return step(model, sgd(model), given)


def enforced(given: Problem, masks: Masks) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = given.copy().train()
    masks.apply_(model)
    optimizer = sgd(model)
    enforce(optimizer, model, masks)
    return model, step(model, optimizer, given)


def reparametrised(given: Problem, masks: Masks) -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = given.copy().train()
    for name in masks.names():
        path, _, parameter = name.rpartition(".")
        torch_prune.custom_from_mask(model.get_submodule(path), parameter, masks[name].to(given.x.device))
    return model, step(model, sgd(model), given)


@operation("masked-step", "a step of SGD at 80 % sparsity against the dense step")
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    given = problem(device, scale)
    masks = prune(given.network, sparsity=SPARSITY)

    def gate() -> str:
        (ours, our_step), (theirs, their_step) = enforced(given, masks), reparametrised(given, masks)
        with reproducible():
            for _ in range(3):
                our_step()
                their_step()
        found, expected = ours.state_dict(), theirs.state_dict()
        for name in masks.names():
            expected[name] = expected.pop(f"{name}_orig") * expected.pop(f"{name}_mask")
        require_same("state after three steps", found, {name: expected[name] for name in found})
        return "same weights as torch.nn.utils.prune after three steps, bit for bit"

    yield Case(
        name=given.name,
        routes={
            "enforce": enforced(given, masks)[1],
            "dense": dense(given),
            "torch.nn.utils.prune": reparametrised(given, masks)[1],
        },
        gate=gate,
        work=len(given.x),
        unit="images",
    )

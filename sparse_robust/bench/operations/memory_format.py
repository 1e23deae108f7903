"""A step of standard training with channels last, as the trainer lays convolutions out, and without."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparse_robust.bench.gates import reproducible, require_close
from sparse_robust.bench.harness import Case, operation
from sparse_robust.bench.operations.masked_step import OPTIONS, Step, sgd, step
from sparse_robust.bench.operations.problem import Problem, problem, small_resnet18
from sparse_robust.training.devices import lay_out

TOLERANCE = 1e-3  # of a layer's largest weight, after one step: convolutions of another layout round differently
FORMATS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}


@operation("memory-format", "a training step with the weights of convolutions channels last, and contiguous")
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    for make in (problem, *([small_resnet18] if scale == "full" else [])):
        yield case(make(device, scale))


def case(given: Problem) -> Case:
    def make(memory_format: torch.memory_format) -> tuple[torch.nn.Module, Step]:
        model = given.copy().train()
        lay_out(model, memory_format)
        return model, step(model, sgd(model), given)

    def gate() -> str:
        states = []
        for memory_format in FORMATS.values():
            model, call = make(memory_format)
            with reproducible():
                call()
            states.append(model.state_dict())
        require_close("state after a step", states[0], states[1], TOLERANCE, least=OPTIONS["lr"])
        return f"the same weights after a step within {TOLERANCE:.0e} of the largest, or of the learning rate"

    return Case(
        name=given.name,
        routes={name: make(memory_format)[1] for name, memory_format in FORMATS.items()},
        gate=gate,
        work=len(given.x),
        unit="images",
    )

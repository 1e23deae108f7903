"""A step of standard training with channels last, as the trainer lays convolutions out, and without."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparse_robust.bench.gates import reproducible, require_close
from sparse_robust.bench.harness import Case, GateError, operation
from sparse_robust.bench.operations.masked_step import Step, sgd, step
from sparse_robust.bench.operations.problem import Problem, problem, small_resnet18
from sparse_robust.training.devices import lay_out

# Convolutions of another layout round differently. In the gradient of all weights together, because a ReLU that flips
# for it changes that of a small bias by percents; and of the largest of each running statistic.
TOLERANCE = 1e-2
STATISTICS = 1e-3
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
        gradients, statistics = [], []
        for memory_format in FORMATS.values():
            model, call = make(memory_format)
            with reproducible():
                call()
            given_to = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            gradients.append(torch.cat([gradient.double().flatten() for gradient in given_to]))
            statistics.append(dict(model.named_buffers()))
        require_close("statistics after a step", statistics[0], statistics[1], STATISTICS)
        error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        if not error <= TOLERANCE:
            raise GateError(f"the gradients differ by {error:.2g} of their norm, more than {TOLERANCE:.0e}")
        return f"the same gradient, off by {error:.1e} of its norm"

    return Case(
        name=given.name,
        routes={name: make(memory_format)[1] for name, memory_format in FORMATS.items()},
        gate=gate,
        work=len(given.x),
        unit="images",
    )

"""What a study will cost, from arithmetic alone: image passes, and hours at a given throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_robust.models import ModelSpec, build_model, check_input_size
from sparse_robust.objectives import REGIMES
from sparse_robust.study.cells import Cell, FindCell, TransferCell
from sparse_robust.study.config import StudyConfig
from sparse_robust.training import Recipe


@dataclass(frozen=True)
class Cost:
    """Forward+backward passes of single images; a robust training step of k attack steps costs k + 1."""

    train: int
    evaluation: int

    @property
    def passes(self) -> int:
        """All of them."""
        return self.train + self.evaluation


def passes_per_image(recipe: Recipe) -> int:
    """Return the forward+backward passes that one training image costs in one epoch."""
    return REGIMES[recipe.regime].passes(recipe.steps, awp=recipe.awp > 0)


def training_cost(recipe: Recipe, images: int, validation: int) -> Cost:
    """Return the cost of a run on ``images`` training and ``validation`` validation images."""
    checks = 0
    if recipe.validate_every:
        span = max(recipe.epochs - recipe.validate_from, 1)
        checks = max(span // recipe.validate_every, 1)
    robust = recipe.validation_steps if recipe.regime != "standard" else 0
    return Cost(recipe.epochs * images * passes_per_image(recipe), checks * validation * (robust + 1))


def cell_cost(cell: Cell, train: int, validation: int, test: int) -> Cost:
    """Return the cost of a cell, given the sizes of its data set's splits."""
    limit = None if isinstance(cell, FindCell) else cell.evaluation.images
    evaluation = (cell_evaluation(cell) + 1) * min(test, limit or test)
    if isinstance(cell, FindCell):
        if not cell.config.trains or cell.config.recipe is None:
            return Cost(0, 0)
        one = training_cost(cell.config.recipe, train, validation)
        # ticket 1 of IMP needs no training; of masks that change while training each ticket is a run of its own
        rounds = cell.config.rounds - (cell.config.method == "imp")
        return Cost(one.train * rounds, one.evaluation * rounds)
    recipe = cell.recipe if isinstance(cell, TransferCell) else cell.config.recipe
    if recipe is None:
        return Cost(0, evaluation)
    one = training_cost(recipe, train, validation)
    reported = 2 if isinstance(cell, TransferCell) and recipe.validate_every else 1  # the best weights and the last
    return Cost(one.train, one.evaluation + reported * evaluation)


def cell_evaluation(cell: Cell) -> int:
    """Return the attack steps of a cell's final evaluation, of images that withstand it; a gradient is one step."""
    if isinstance(cell, FindCell):
        return 0
    return round(sum(attack.passes(10) for attack in cell.evaluation.build()) / 3)


def pass_flops(model: ModelSpec, image: Sequence[int]) -> int:
    """Return the floating-point operations of a forward and a backward pass of one image [C, H, W].

    A product and its sum are two; a backward pass counts as two forward ones.

    Raises:
        UsageError: if the network does not take such images.
    """
    with torch.device("meta"):
        network = build_model(replace(model, in_chans=image[0])).eval()
        check_input_size(network, *image[1:])
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, *image))
    return 3 * int(counter.get_total_flops())


def parameter_count(config: StudyConfig) -> int:
    """Return the number of parameters of the study's network, without allocating them."""
    return _parameters(config.model.spec())


@lru_cache(maxsize=8)
def _parameters(spec: ModelSpec) -> int:
    with torch.device("meta"):
        model = build_model(spec)
    return sum(parameter.numel() for parameter in model.parameters())

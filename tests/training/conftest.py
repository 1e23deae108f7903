"""A network and a data set that train in a blink."""

from collections.abc import Callable

import pytest
from torch import nn

from sparse_robust.data import Data, DataSpec, load_data
from sparse_robust.models import create_model

TINY = {"channels": (4, 6, 8, 10), "stem_width": 4}


@pytest.fixture(scope="session")
def digits() -> Data:
    return load_data(DataSpec(name="digits", resize=28, fraction=0.1, validation=60))


@pytest.fixture(scope="session")
def tiny(digits: Data) -> Callable[..., nn.Module]:
    def make(seed: int = 0) -> nn.Module:
        return create_model(
            "resnet10t", num_classes=10, in_chans=1, mean=digits.mean, std=digits.std, seed=seed, **TINY
        )

    return make

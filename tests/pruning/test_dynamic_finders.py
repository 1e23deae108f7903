"""The finders of a study: rewinding to a step, to the initial network and of the learning rate; changing masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from sparse_robust.data import DataSpec
from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks
from sparse_robust.models import ModelSpec, load_model, save_model
from sparse_robust.pruning import survivors
from sparse_robust.seeding import derive_seed
from sparse_robust.study.cells import describe
from sparse_robust.study.config import FinderConfig
from sparse_robust.study.context import Context
from sparse_robust.study.estimate import passes_per_image
from sparse_robust.study.stages import find, network_for, remove_checkpoints
from sparse_robust.tickets import Ticket
from sparse_robust.training import Recipe

REWINDS = ("pretrained", "initial", "step:2", "lr")
DATA = DataSpec(name="digits", resize=28, fraction=0.05, validation=60)
SPEC = ModelSpec(name="resnet10t", kwargs={"channels": (4, 6, 8, 10), "stem_width": 4})
RECIPE = Recipe(epochs=1, batch_size=32, lr=0.05, validate_every=0)


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(Accelerator(cpu=True), checkpoint_seconds=1e9)


@pytest.fixture(scope="module")
def weights(context: Context, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("theta") / "weights.safetensors"
    save_model(network_for(SPEC, context.data(DATA), seed=5), file)
    return file


def tickets(folder: Path, rounds: int) -> list[Masks]:
    return [Ticket.load(folder / "tickets" / f"k{k:02d}.safetensors").masks for k in range(1, rounds + 1)]


def search(weights: Path, folder: Path, context: Context, **config: Any) -> tuple[dict[str, Any], list[Masks]]:
    finder = FinderConfig(**{"rounds": 3, "rate": 0.4, "recipe": RECIPE, **config})
    row = find(weights, DATA, finder, seed=0, folder=folder, context=context, label="tried")
    return row, tickets(folder, finder.rounds)


@pytest.fixture(scope="module")
def rewound(weights: Path, context: Context, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Masks]]:
    """The tickets of whole searches, by what they rewind to."""
    found = {}
    for rewind in REWINDS:
        row, found[rewind] = search(weights, tmp_path_factory.mktemp("whole"), context, rewind=rewind)
        assert row["regime"] == "standard" and [trained["k"] for trained in row["rounds"]] == [1, 2]
    return found


@pytest.mark.parametrize("rewind", REWINDS)
def test_an_interrupted_search_ends_with_the_same_tickets(
    rewind: str,
    weights: Path,
    context: Context,
    rewound: dict[str, list[Masks]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = rewound[rewind]
    assert [masks.count() for masks in whole] == [survivors(whole[0].numel(), 0.4, k) for k in (1, 2, 3)]

    save, left = Ticket.save, [2]

    def die(ticket: Ticket, path: Path) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        save(ticket, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Ticket, "save", die)
        search(weights, tmp_path / "parts", context, rewind=rewind)
    _, again = search(weights, tmp_path / "parts", context, rewind=rewind)
    assert again == whole
    search(weights, tmp_path / "parts", context, rewind=rewind)  # finished: nothing is done, nothing is missing
    remove_checkpoints(tmp_path / "parts")
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"tickets", "rounds"}


def test_each_way_to_rewind_finds_other_tickets(rewound: dict[str, list[Masks]]) -> None:
    first, last = ({masks[k] for masks in rewound.values()} for k in (0, 2))
    assert len(first) == 1, "ticket 1 is cut from theta, whatever is rewound to later"
    assert len(last) == 4


def test_step_k_is_the_weights_after_k_updates(weights: Path, context: Context, tmp_path: Path) -> None:
    # the rate is constant, so a run of one epoch does what the first epoch of two does
    recipe = {"batch_size": 32, "lr": 0.05, "validate_every": 0, "schedule": "constant"}
    data = context.data(DATA)
    epoch = -(-len(data.train) // 32)
    search(weights, tmp_path, context, rewind=f"step:{epoch}", rounds=2, recipe=Recipe(epochs=2, **recipe))
    kept = load_file(tmp_path / "round-00" / "state.safetensors")
    model = load_model(weights)
    seed = derive_seed("imp", 0, 0)
    context.train(model, data, Recipe(epochs=1, **recipe), seed=seed, masks=None, folder=tmp_path / "one", name="one")
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    with pytest.raises(UsageError, match=f"step:{2 * epoch + 1}, and the recipe makes fewer updates"):
        search(weights, tmp_path / "far", context, rewind=f"step:{2 * epoch + 1}")


@pytest.mark.parametrize("method", ["gradual", "set", "rigl", "granet"])
def test_tickets_of_changing_masks(method: str, weights: Path, context: Context, tmp_path: Path) -> None:
    row, found = search(weights, tmp_path, context, method=method, every=2, rounds=2, window=(0.0, 0.9))
    assert row["method"] == method and row["regime"] == "standard" and [r["k"] for r in row["rounds"]] == [1, 2]
    assert [masks.count() for masks in found] == [survivors(found[0].numel(), 0.4, k) for k in (1, 2)]
    if method == "set":  # the one that draws at random
        again = search(weights, tmp_path / "again", context, method=method, every=2, rounds=2, window=(0.0, 0.9))[1]
        assert again == found


def test_new_options_rename_no_finder_that_was_there() -> None:
    assert describe(FinderConfig(method="oneshot")) == {"method": "oneshot"}
    assert set(describe(FinderConfig(recipe=RECIPE))) == {"recipe"}
    assert set(describe(RECIPE)) == {"epochs", "batch_size", "lr", "validate_every"}
    assert describe(FinderConfig(rewind="step:7", recipe=RECIPE))["rewind"] == "step:7"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rewind": "step:0"}, "unknown find.rewind 'step:0'"),
        ({"rewind": "later"}, "unknown find.rewind 'later'.*initial"),
        ({"method": "oneshot", "rewind": "lr"}, "find.rewind is for method imp; oneshot rewinds nothing"),
        ({"method": "rigl", "recipe": None}, "rigl needs a recipe"),
        ({"method": "rigl", "score": "snip"}, "prunes single weights by magnitude"),
        ({"method": "oneshot", "every": 5}, "oneshot has no use for them"),
        ({"method": "rigl", "start_density": 0.5}, "rigl keeps its number of weights"),
    ],
)
def test_what_a_finder_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        FinderConfig(**{"recipe": RECIPE, **config})


def test_what_a_regime_costs() -> None:
    costs = {
        regime: passes_per_image(Recipe(regime=regime, steps=10))
        for regime in ("standard", "fast", "n-fgsm", "adversarial", "rgd", "free", "trades", "mart")
    }
    assert costs == {
        "standard": 1,
        "fast": 2,
        "n-fgsm": 2,
        "adversarial": 11,
        "rgd": 11,
        "free": 1,
        "trades": 12,
        "mart": 12,
    }
    assert passes_per_image(Recipe(regime="adversarial", steps=10, awp=0.01)) == 12
    assert passes_per_image(Recipe(regime="trades", steps=10, awp=0.005)) == 14

"""Which epochs are kept."""

import pytest
import torch

from sparse_robust.training.guard import CatastrophicOverfittingGuard
from sparse_robust.training.selection import Selection


def _state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.tensor([value])}


@pytest.mark.acceptance("double-win", "A-30")
def test_best_sa_best_ra_and_last_are_kept_and_ties_keep_the_earlier_epoch() -> None:
    selection = Selection()
    curve = [(70.0, 40.0), (75.0, 45.0), (75.0, 44.0), (74.0, 45.0), (73.0, 43.0)]
    for epoch, (sa, ra) in enumerate(curve):
        selection.offer(epoch, _state(epoch), val_sa=sa, val_ra=ra, last=epoch == 4)
    assert {name: chosen.epoch for name, chosen in selection.chosen.items()} == {"best_sa": 1, "best_ra": 1, "last": 4}
    assert selection.state("best_ra")["w"].item() == 1 and selection.state("last")["w"].item() == 4
    assert set(selection.states) == {1, 4}


@pytest.mark.acceptance("double-win", "A-30")
def test_different_epochs_for_sa_and_ra() -> None:
    selection = Selection()
    for epoch, (sa, ra) in enumerate([(70.0, 50.0), (80.0, 45.0)]):
        selection.offer(epoch, _state(epoch), val_sa=sa, val_ra=ra, last=epoch == 1)
    assert selection.chosen["best_ra"].epoch == 0 and selection.chosen["best_sa"].epoch == 1


@pytest.mark.acceptance("double-win", "A-29")
def test_epochs_without_validation_are_never_the_best() -> None:
    selection = Selection()
    selection.offer(0, _state(0))
    selection.offer(1, _state(1), val_sa=0.0, last=True)
    assert "best_ra" not in selection.chosen
    assert selection.chosen["best_sa"].epoch == 1 and set(selection.states) == {1}


def test_states_are_copies() -> None:
    weight, selection = torch.ones(1), Selection()
    selection.offer(0, {"w": weight}, val_sa=1.0)
    weight.zero_()
    assert selection.state("best_sa")["w"].item() == 1


@pytest.mark.acceptance("double-win", "A-26")
def test_guard_trips_on_a_fall_of_more_than_a_fifth() -> None:
    guard = CatastrophicOverfittingGuard(0.20)
    assert not guard.trips(0.45)
    assert guard.trips(0.20)
    guard = CatastrophicOverfittingGuard(0.20)
    assert not guard.trips(0.45)
    assert not guard.trips(0.30)

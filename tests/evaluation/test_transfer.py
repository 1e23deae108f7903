"""Transfer: every model under the images of every other, counted over all images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks import PGD
from sparse_robust.errors import UsageError
from sparse_robust.evaluation.transfer import transfer_matrix


class Slope(nn.Module):
    """Two classes by whether w.x exceeds one half; images are pairs of pixels."""

    def __init__(self, *weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.norm = nn.BatchNorm2d(1)  # only for its mode and its buffers

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        score = x.flatten(1) @ self.weight - 0.5
        return torch.stack([-score, score], 1)


class Shards(list[Any]):
    world = 2


def data() -> tuple[Tensor, Tensor]:
    """Pairs (a, b): the class is whether a > 1/2; b repeats a half of the time."""
    first = torch.tensor([0.1, 0.3, 0.45, 0.55, 0.7, 0.9])
    second = torch.tensor([0.1, 0.7, 0.45, 0.55, 0.3, 0.9])
    return torch.stack([first, second], 1).view(-1, 1, 1, 2), (first > 0.5).long()


@pytest.fixture
def models() -> dict[str, nn.Module]:
    return {"first": Slope(1.0, 0.0), "mean": Slope(0.5, 0.5), "second": Slope(0.0, 1.0)}


ATTACK = PGD(steps=4, keep="last", random_start=False)


def test_entries_are_shares_of_all_images(models: dict[str, nn.Module]) -> None:
    x, y = data()
    matrix = transfer_matrix(models, [(x, y)], ATTACK, "0.1")
    assert matrix.names == ("first", "mean", "second") and len(matrix) == 6
    # By the mean, images 1 and 4 are ties: at exactly one half, class 0.
    torch.testing.assert_close(matrix.clean, torch.tensor([6, 5, 4]).double() / 6)
    # White box: what is 0.1 or nearer to one half falls, a tie to class 0 stays.
    assert matrix.get("first", "first") == pytest.approx(4 / 6)
    # Images for "first" change the first pixel alone, as far as its gradient goes: nothing for "second".
    assert matrix.get("first", "second") == pytest.approx(float(matrix.clean[2]))
    assert matrix.get("mean", "first") == pytest.approx(4 / 6)
    for s, t in ((0, 1), (1, 1), (1, 2)):
        assert matrix.accuracy[s, t] <= matrix.clean[t]


def test_per_image_results_make_up_the_accuracies(models: dict[str, nn.Module]) -> None:
    x, y = data()
    matrix = transfer_matrix(models, [(x, y)], ATTACK, 0.1)
    assert matrix.correct.shape == (3, 3, 6) and matrix.correct.dtype == torch.bool
    torch.testing.assert_close(matrix.correct.double().mean(2), matrix.accuracy)
    torch.testing.assert_close(matrix.clean_correct.double().mean(1), matrix.clean)
    assert matrix.correct[0, 0].tolist() == [True, True, False, False, True, True]
    assert matrix.success[0, 0].tolist() == [False, False, True, True, False, False]
    assert not matrix.success[:, 2, 1].any()  # "second" is wrong there without an attack


def test_the_diagonal_is_the_white_box_attack(models: dict[str, nn.Module]) -> None:
    x, y = data()
    matrix = transfer_matrix(models, [(x, y)], PGD(steps=4), 0.1)
    for index, model in enumerate(models.values()):
        verdict = PGD(steps=4).run(model, x, y, eps=0.1).success
        assert torch.equal(matrix.correct[index, index], ~verdict)


def test_batches_and_order_do_not_matter(models: dict[str, nn.Module]) -> None:
    x, y = data()
    ids = torch.arange(6) + 10
    whole = transfer_matrix(models, [(x, y, ids)], ATTACK, 0.1)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    parts = transfer_matrix(models, [(x[o], y[o], ids[o]) for o in order.split(4)], ATTACK, 0.1)
    assert torch.equal(whole.correct, parts.correct) and torch.equal(parts.ids, ids)


def test_models_come_back_as_they_were(models: dict[str, nn.Module]) -> None:
    x, y = data()
    for model in models.values():
        model.train()
    transfer_matrix(models, [(x, y)], ATTACK, 0.1)
    assert all(model.training and model.norm.training for model in models.values())
    assert all(model.weight.requires_grad and model.weight.grad is None for model in models.values())


def test_it_is_written_by_source_and_target(models: dict[str, nn.Module]) -> None:
    x, y = data()
    matrix = transfer_matrix(models, [(x, y)], ATTACK, "25/255")
    written = matrix.to_dict()
    assert written["accuracy"]["first"]["second"] == matrix.get("first", "second")
    assert written["attack"] == "pgd-4" and written["eps"] == pytest.approx(25 / 255) and written["images"] == 6


def test_shards_are_merged_by_id(models: dict[str, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    ids = torch.arange(6)
    shards = [Shards([(x[rank::2], y[rank::2], ids[rank::2])]) for rank in (0, 1)]
    sent: list[Any] = []

    def gather(into: list[Any], part: Any) -> None:
        sent.append(part)
        into[:] = [*sent, *([] if len(sent) == 2 else [[]])]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    transfer_matrix(models, shards[1], ATTACK, 0.1)
    merged = transfer_matrix(models, shards[0], ATTACK, 0.1)
    monkeypatch.undo()
    assert torch.equal(merged.correct, transfer_matrix(models, [(x, y, ids)], ATTACK, 0.1).correct)


def test_a_shard_without_a_process_group_is_an_error(models: dict[str, nn.Module]) -> None:
    with pytest.raises(UsageError, match="accelerate launch"):
        transfer_matrix(models, Shards([data()]), ATTACK, 0.1)


def empty() -> Iterator[tuple[Tensor, Tensor]]:
    yield from ()


def test_nothing_to_do_is_an_error(models: dict[str, nn.Module]) -> None:
    with pytest.raises(UsageError, match="at least one model"):
        transfer_matrix({}, [data()], ATTACK, 0.1)
    with pytest.raises(UsageError, match="yields no batch"):
        transfer_matrix(models, empty(), ATTACK, 0.1)
    x, y = data()
    with pytest.raises(UsageError, match=r"labels must be in 0\.\.1"):
        transfer_matrix(models, [(x, y + 1)], ATTACK, 0.1)

"""Evaluation: every image once, attacks only where they matter, nothing changed in the model."""

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks import PGD
from sparse_robust.data import DataSpec, eval_loader, load_data
from sparse_robust.errors import UsageError
from sparse_robust.evaluation import evaluate
from sparse_robust.models import create_model

TINY = {"channels": (4, 6, 8, 10), "stem_width": 4}


class Threshold(nn.Module):
    """Two classes by the mean brightness: robust exactly as far as the mean is from one half."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def _images(means: list[float]) -> tuple[Tensor, Tensor]:
    x = torch.tensor(means).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return x, (torch.tensor(means) > 0.5).long()


@pytest.mark.acceptance("double-win", "A-31")
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_seven_images_count_as_seven_and_the_accuracies_are_exact(batch: int) -> None:
    x, y = _images([0.1, 0.3, 0.45, 0.55, 0.6, 0.7, 0.9])
    y[0] = 1  # wrong without any attack
    loader = [(x[i : i + batch], y[i : i + batch]) for i in range(0, 7, batch)]
    result = evaluate(Threshold(), loader, [PGD(steps=5)], eps="0.12", check=False)
    assert len(result) == 7
    assert result.clean == pytest.approx(6 / 7)
    assert result.robust == pytest.approx(3 / 7)  # 0.3, 0.7 and 0.9 are more than 0.12 from 0.5
    assert result.per_image.robust_correct.tolist() == [False, True, False, False, False, True, True]
    assert result.per_image.broken_by.tolist() == [-2, -1, 0, 0, 0, -1, -1]


@pytest.mark.acceptance("double-win", "A-31")
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_change_the_verdicts(batch_size: int) -> None:
    data = load_data(DataSpec(name="digits", resize=28))
    model = create_model("resnet10t", num_classes=10, in_chans=1, mean=data.mean, std=data.std, **TINY).eval()
    reference = evaluate(model, eval_loader(data.test, 33, limit=40), [PGD(steps=3)], eps=0.05, check=False)
    result = evaluate(model, eval_loader(data.test, batch_size, limit=40), [PGD(steps=3)], eps=0.05, check=False)
    assert torch.equal(result.per_image.id, reference.per_image.id)
    assert torch.equal(result.per_image.clean_prediction, reference.per_image.clean_prediction)
    assert torch.equal(result.per_image.broken_by, reference.per_image.broken_by)


@pytest.mark.acceptance("double-win", "A-23")
def test_zero_radius_is_clean_accuracy_and_more_attacks_never_help() -> None:
    x, y = _images([0.2, 0.45, 0.52, 0.8])
    assert evaluate(Threshold(), [(x, y)], [PGD(steps=3)], eps=0).robust == evaluate(Threshold(), [(x, y)]).clean
    result = evaluate(Threshold(), [(x, y)], [PGD(steps=1, step_size=0.01, random_start=False), PGD(steps=5)], eps=0.1)
    assert result.robust_after == (1.0, 0.5) and result.robust == 0.5


def test_counts_are_those_of_the_images_attacked() -> None:
    x, y = _images([0.2, 0.45, 0.8])
    y[2] = 0  # wrong from the start: never attacked
    result = evaluate(Threshold(), [(x, y)], [PGD(steps=4)], eps=0.01)
    assert result.counts["backward"] == 2 * 4


def test_the_model_comes_back_as_it_was() -> None:
    model = create_model("resnet10t", num_classes=10, in_chans=1, **TINY).train()
    model.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(
        model, [(torch.rand(4, 1, 28, 28), torch.zeros(4, dtype=torch.long))], [PGD(steps=2)], eps=0.1, check=False
    )
    assert model.training and not model.bn1.training and model.layer1.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_plain_function_will_do() -> None:
    x, y = _images([0.2, 0.8])
    assert evaluate(Threshold().forward, [(x, y)], [PGD(steps=2)], eps=0.1).robust == 1.0


def test_an_empty_loader_is_an_error() -> None:
    with pytest.raises(UsageError, match="no batch"):
        evaluate(Threshold(), [])


def test_an_empty_list_of_attacks_is_an_error() -> None:
    with pytest.raises(UsageError, match="empty list of attacks"):
        evaluate(Threshold(), [_images([0.2, 0.8])], attacks=[], eps=0.1)

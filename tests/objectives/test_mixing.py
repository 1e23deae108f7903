"""Mixup and CutMix: timm's, as a function of seed and sample ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparse_robust.errors import UsageError
from sparse_robust.objectives import build_objective
from sparse_robust.objectives.mixing import Mixing

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 1, 2, 3, 0, 1])
IDS = torch.arange(40, 46)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=["mixup", "cutmix", "both"])
def test_a_batch_is_mixed_by_one_ratio(mixup: float, cutmix: float) -> None:
    mix, state = Mixing(mixup, cutmix, 4), np.random.get_state()[1].copy()
    seen = []
    for seed in range(8):
        mixed, labels = mix(X, Y, IDS, seed)
        assert np.array_equal(np.random.get_state()[1], state), "numpy's own stream is left alone"
        torch.testing.assert_close(labels.sum(1), torch.ones(6))
        share = labels[0, 0].item()  # of image 0 (class 0); the rest is image 5 (class 1)
        assert labels[0, 1].item() == pytest.approx(1 - share, abs=1e-6)
        pasted = ((mixed == X) | (mixed == X.flip(0))).all()
        if pasted:
            # pixels of the image itself, except where both happen to be equal
            assert (mixed[0] == X[0]).float().mean().item() == pytest.approx(share, abs=1e-6)
        else:
            torch.testing.assert_close(mixed, share * X + (1 - share) * X.flip(0))
        seen.append((bool(pasted), share))
        again, same = mix(X, Y, IDS, seed)
        assert torch.equal(mixed, again) and torch.equal(labels, same)
    assert len({share for _, share in seen}) > 4
    assert {pasted for pasted, _ in seen} >= ({True} if cutmix else set()) | ({False} if mixup else set())


def test_draws_depend_on_the_ids_and_inputs_are_left_alone() -> None:
    before = X.clone()
    one, _ = Mixing(1.0, 0.0, 4)(X, Y, IDS, 0)
    other, _ = Mixing(1.0, 0.0, 4)(X, Y, IDS + 1, 0)
    assert not torch.equal(one, other) and torch.equal(X, before)


def test_the_last_of_an_odd_batch_stays_pure() -> None:
    mixed, labels = Mixing(1.0, 0.0, 4)(X[:5], Y[:5], IDS[:5], 0)
    assert torch.equal(mixed[4], X[4]) and labels[4].tolist() == [1, 0, 0, 0]
    assert not torch.equal(mixed[:4], X[:4])


def test_the_loss_is_that_of_the_mixed_labels() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    objective = build_objective("standard", eps=0.1, mixup=0.5, num_classes=4, label_smoothing=0.1)
    loss, logits = objective(net, net, X, Y, IDS, seed=2)
    mixed, labels = Mixing(0.5, 0.0, 4)(X, Y, IDS, 2)
    smooth = 0.9 * labels + 0.1 / 4
    expected: Tensor = -(smooth * net(mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert torch.equal(logits, net(mixed))


def test_the_number_of_classes_is_needed() -> None:
    net = nn.Flatten()
    with pytest.raises(UsageError, match="needs the number of classes"):
        build_objective("standard", eps=0.1, mixup=0.5)(net, net, X, Y, IDS, seed=0)

"""On a GPU: nothing waits for it, noise has the same bits as on the CPU, and verdicts agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_robust.attacks import FGSM, LOSSES, PGD
from sparse_robust_kernels.rng import philox_uniform

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_gpu(trained: Any) -> Any:
    model, x, y, ids = trained
    return model.cuda(), x.cuda(), y.cuda(), ids.cuda()


@pytest.mark.parametrize("mode", ["eval", "train", "train_frozen"])
@pytest.mark.parametrize("attack", [PGD, FGSM])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 8 / 255), ("L2", 0.3)])
def test_an_attack_never_waits(on_gpu: Any, attack: type[PGD], norm: str, eps: float, mode: str) -> None:
    model, x, y, ids = on_gpu
    for loss in LOSSES:
        crafts = attack(norm=norm, mode=mode, loss=loss)
        crafts(model, x, y, eps=eps, ids=ids)  # libraries initialise themselves, and may wait then
        torch.cuda.set_sync_debug_mode("error")
        try:
            x_adv = crafts(model, x, y, eps=eps, ids=ids)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (x_adv != x).flatten(1).any(1).all()


def test_random_numbers_have_the_bits_of_the_cpu() -> None:
    ids = torch.tensor([0, 1, 2**33 + 5, -1])
    on_gpu = philox_uniform(ids.cuda(), 1001, key=2**63 + 9, stream=3)
    assert torch.equal(on_gpu.cpu(), philox_uniform(ids, 1001, key=2**63 + 9, stream=3))


def test_the_start_has_the_bits_of_the_cpu(on_gpu: Any) -> None:
    model, x, y, ids = on_gpu
    start = PGD(steps=0)
    expected = start(model, x.cpu(), y.cpu(), eps=8 / 255, ids=ids.cpu())
    assert torch.equal(start(model, x, y, eps=8 / 255, ids=ids).cpu(), expected)


def test_verdicts_agree_with_the_cpu(on_gpu: Any, trained: Any) -> None:
    model, x, y, ids = on_gpu
    on_device = PGD(steps=10, n_restarts=2).run(model, x, y, eps=8 / 255, ids=ids)
    assert on_device.success.is_cuda and on_device.counts.forward.is_cuda
    model, x, y, ids = model.cpu(), x.cpu(), y.cpu(), ids.cpu()
    on_cpu = PGD(steps=10, n_restarts=2).run(model, x, y, eps=8 / 255, ids=ids)
    assert int((on_cpu.success != on_device.success.cpu()).sum()) <= 4  # of 200: convolutions round differently

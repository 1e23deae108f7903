"""Every score gives the same masks on one process and on two, round after round."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_robust.attacks import PGD
from sparse_robust.masks import Masks
from sparse_robust.pruning import SCORES, imp, prune

QUICK = {"hydra": {"options": {"epochs": 2, "lr": 5.0}}, "synflow": {"steps": 5}}
TESTS = Path(__file__).resolve().parent.parent


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 4),
    )  # fmt: skip


def digests(wrapped: bool) -> dict[str, list[str]]:
    """The masks of each score, on clean and on adversarial batches, and of three rounds of pruning."""
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.rand(6, 3, 8, 8, generator=generator), torch.randint(4, (6,), generator=generator)) for _ in range(2)
    ]
    model = nn.parallel.DistributedDataParallel(network()) if wrapped else network()
    found: dict[str, list[str]] = {}
    warnings.simplefilter("ignore")
    for name, score in SCORES.items():
        how = {"score": name, "batches": batches, "head": True, "scope": "erk", "pattern": "2:4", **QUICK.get(name, {})}
        kinds = ["clean", partial(PGD(steps=2), eps=0.3)] if score.needs == "data" else ["clean"]
        masks = [prune(model, 0.7, on=on, **how) for on in kinds]  # type: ignore[arg-type]
        found[name] = [mask.digest() for mask in masks]

    def shift(network: nn.Module, masks: Masks, k: int) -> None:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1 + 0.1 * k).add_(0.01)

    theta = {name: tensor.clone() for name, tensor in network().state_dict().items()}
    for name in SCORES:
        rounds = imp(
            model, theta, shift, rounds=3, score=name, batches=batches, options=QUICK.get(name, {}).get("options")
        )  # type: ignore[arg-type]
        found[f"imp {name}"] = [masks.digest() for _, masks in rounds]
    return found


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.acceptance("double-win", "A-38")
def test_masks_of_every_score_are_the_same_on_one_and_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from test_scores_ranks import digests\n"
        "torch.set_num_threads(1); dist.init_process_group('gloo')\n"
        f"torch.save(digests(wrapped=True), {str(tmp_path)!r} + f'/{{dist.get_rank()}}.pt')\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join([str(TESTS / "distributed"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(torchrun, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with warnings.catch_warnings():
        expected = digests(wrapped=False)
    assert torch.load(tmp_path / "0.pt") == torch.load(tmp_path / "1.pt") == expected
    assert len(expected) == 2 * len(SCORES) and all(len(set(each)) == len(each) for each in expected.values())

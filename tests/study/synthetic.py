"""A study folder with made-up numbers, shaped as the runner writes it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparse_robust.masks import Masks
from sparse_robust.study.results import StudyResults
from sparse_robust.study.rows import TransferRow

SHAPES = {
    "conv1.weight": (16, 1, 3, 3),
    "layer1.0.conv1.weight": (32, 16, 3, 3),
    "layer1.0.conv2.weight": (32, 32, 3, 3),
    "layer2.0.conv1.weight": (64, 32, 3, 3),
    "layer2.0.downsample.weight": (64, 32, 1, 1),
    "layer3.0.conv1.weight": (96, 64, 3, 3),
}
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
ROBUST = {"STD": 38.0, "FAT": 52.0, "AT": 58.0}  # dense RA after adversarial transfer

# (metric, theta, finder, k, target, regime) -> accuracy in percent
Law = Callable[[str, str, str, int, str, str], float]


def expected(metric: str, theta: str, finder: str, k: int, target: str, regime: str) -> float:
    """Like a real study: robust pre-training keeps robustness; IMP beats random masks on "fashion", not on "digits"."""
    robust = ROBUST[theta]
    if metric == "sa":
        dense = 84.0 - (0.12 * (robust - 38) if regime == "ST" else 5.0 - 0.03 * (robust - 38))
    else:
        dense = robust if regime == "AT" else max(0.4, 1.9 * (robust - 38) + 0.4)
    fall = {"random": 1.15, "oneshot": 0.6}.get(finder, 0.22)
    if target == "digits":
        dense, fall = dense + (8 if metric == "sa" else -8 * (dense > 10)), 0.3
    return max(0.0, dense - fall * k * (1.0 if dense > 10 else 0.02))


@dataclass
class Synthetic:
    """What the made-up study consists of."""

    thetas: Sequence[str] = ("STD", "FAT", "AT")
    finders: Sequence[str] = ("imp-st", "random")
    rounds: Sequence[int] = (4, 8, 12)
    targets: Sequence[str] = ("fashion", "digits")
    fractions: Sequence[float] = (1.0,)
    regimes: Sequence[str] = ("ST", "AT")
    seeds: Sequence[int] = (0,)
    test_images: int | None = 1000
    examples: bool = True
    noise: float = 0.4
    law: Law = expected
    config: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the whole folder and return it."""
        cells = {}
        for name, row in self._rows(folder):
            cells[name] = row
            path = folder / "cells" / name / "result.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"cell": name, **row}))
        config = {
            "name": "synthetic",
            "description": "Made-up numbers that look like a small study.",
            "model": {"name": "resnet10t", "in_chans": 1, "stem": "small"},
            "find": {f: {"method": f.split("-")[0], "rounds": max(self.rounds), "rate": 0.2} for f in self.finders},
            "rounds": list(self.rounds),
            "evaluation": {"eps": 0.1, "norm": "Linf", "steps": 10, "step_size": "0.025", "n_restarts": 1, "seed": 0},
            "seeds": list(self.seeds),
            **self.config,
        }
        machine = {"cpu": "2 cores", "python": "3.11", "torch": "2.11.0", "timm": "1.0.31"}
        classes = {"fashion": FASHION, "digits": [str(i) for i in range(10)]}
        study = {"name": "synthetic", "config": config, "machine": machine, "cells": list(cells), "notes": []}
        (folder / "study.json").write_text(json.dumps({**study, "classes": classes}))
        return folder

    def _rows(self, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
        for index, theta in enumerate(self.thetas):
            robust = ROBUST.get(theta, 38.0)
            regime = {"STD": "standard", "FAT": "fast"}.get(theta, "adversarial")
            yield f"pretrain-{theta}", {
                "kind": "pretrain", "theta": theta, "regime": regime,
                "sa": 86.3 - 0.5 * (robust - 38), "ra": 0.2 if theta == "STD" else robust + 2, "epochs": 4 + index % 2,
                "seconds": 11.0 + 8 * index, "sha256": f"{index}" * 64, "history": [],
                "stopped_by_guard": theta == "FAT", "test_images": self.test_images,
            }  # fmt: skip
        masks: dict[tuple[str, str, int], Masks] = {}
        for theta in self.thetas:
            for finder in self.finders:
                yield f"find-{theta}-{finder}", self._find(folder, theta, finder, masks)
        for seed in self.seeds:
            for target in self.targets:
                for fraction in self.fractions:
                    for theta in self.thetas:
                        tickets = [("dense", 0), *((f, k) for f in self.finders for k in self.rounds)]
                        for finder, k in tickets:
                            for regime in self.regimes:
                                mask = masks.get((theta, finder, k))
                                yield self._transfer(folder, theta, finder, k, target, fraction, regime, seed, mask)

    def _find(self, folder: Path, theta: str, finder: str, masks: dict[tuple[str, str, int], Masks]) -> dict[str, Any]:
        tickets = []
        for k in range(1, max(self.rounds) + 1):
            mask = mask_of(theta, finder, k)
            masks[theta, finder, k] = mask
            file = f"cells/find-{theta}-{finder}/tickets/k{k:02d}.safetensors"
            mask.save(folder / file)
            layers = [
                {"name": n, "shape": list(s), "kept": kept, "numel": numel} for n, s, kept, numel in mask.layers()
            ]
            tickets.append(
                {"k": k, "sparsity": 100 * mask.sparsity, "count": mask.count(), "numel": mask.numel(),
                 "digest": mask.digest(), "file": file, "layers": layers}
            )  # fmt: skip
        regime = {"imp-st": "standard", "imp-at": "adversarial"}.get(finder)
        return {"kind": "find", "theta": theta, "finder": finder, "regime": regime, "tickets": tickets, "seconds": 7.0}

    def _transfer(
        self, folder: Path, theta: str, finder: str, k: int, target: str, fraction: float, regime: str, seed: int,
        mask: Masks | None,
    ) -> tuple[str, dict[str, Any]]:  # fmt: skip
        name = f"transfer-{theta}-{finder}-k{k:02d}-{target}-{fraction:g}-{regime}-s{seed}"
        generator = torch.Generator().manual_seed(sum(map(ord, name)) * 31 + seed)
        wobble = (torch.randn(2, generator=generator) * self.noise).tolist()
        few = 1.0 if fraction == 1 else 0.93
        sa = min(100.0, few * self.law("sa", theta, finder, k, target, regime) + wobble[0])
        ra = min(sa, max(0.0, few * self.law("ra", theta, finder, k, target, regime) + wobble[1]))
        row = {
            "kind": "transfer", "theta": theta, "finder": finder, "k": k,
            "sparsity": 100 * mask.sparsity if mask else 0.0, "target": target, "fraction": fraction,
            "regime": regime, "seed": seed, "sa": sa, "ra": ra,
            "checkpoints": {"last": {"epoch": 5, "sa": sa, "ra": ra}}, "epochs": 6,
            "seconds": 1.1 if regime == "ST" else 4.2,
            "mask_digest": mask.digest() if mask else None, "survivors": mask.count() if mask else None, "history": [],
            "train_images": round(600 * fraction), "test_images": self.test_images,
        }  # fmt: skip
        if self.examples and seed == self.seeds[0] and fraction == 1:
            save_examples(folder / "cells" / name, theta, regime)
        return name, row


@functools.cache
def mask_of(theta: str, finder: str, k: int) -> Masks:
    """Make a ticket of round ``k``: magnitude masks of pre-trainings with a shared part of their weights, or random."""
    shared = torch.Generator().manual_seed(7)
    own = torch.Generator().manual_seed(sum(map(ord, theta)))
    chance = torch.Generator().manual_seed(1000 * k + sum(map(ord, theta)) if finder == "random" else 5)
    scores = {}
    for name, shape in SHAPES.items():
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        weight = torch.randn(shape, generator=shared) + 0.7 * torch.randn(shape, generator=own)
        if finder == "imp-at":
            weight = weight + 0.5 * torch.randn(shape, generator=chance)
        scores[name] = weight.abs() * scale
    flat = torch.cat([s.flatten() for s in scores.values()])
    cut = flat.sort().values[round(len(flat) * (1 - 0.8**k))]
    kept = {name: s >= cut for name, s in scores.items()}
    if finder == "random":
        for name, mask in kept.items():
            order = torch.rand(mask.numel(), generator=chance).argsort()
            kept[name] = (order < mask.sum()).reshape(mask.shape)
    return Masks.from_bools(kept)


def save_examples(folder: Path, theta: str, regime: str) -> None:
    """Write eight small pictures and what a network might say about them."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    labels = torch.tensor([9, 2, 1, 1, 6, 1, 4, 6])
    clean = torch.stack([((rows**2 + (columns * (1 + 0.15 * i)) ** 2) < 0.3 + 0.08 * i) * 200 for i in labels.tolist()])
    clean = clean.to(torch.uint8)[:, None]
    generator = torch.Generator().manual_seed(3 + len(theta))
    noise = 0.1 * torch.randn(clean.shape, generator=generator).sign()
    robust = {"STD": 1, "FAT": 5, "AT": 6}.get(theta, 3) if regime == "AT" else 1
    after = labels.clone()
    after[robust:] = (after[robust:] + 3) % 10
    tensors = {
        "clean": clean, "adversarial": (clean.float() / 255 + noise).clamp(0, 1), "labels": labels,
        "clean_prediction": labels.clone(), "adversarial_prediction": after, "ids": torch.arange(8) + 10_000,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "examples.safetensors")


def transfer_row(theta: str, k: int, regime: str, sa: float | None, ra: float | None, **other: Any) -> TransferRow:
    """Make one transfer: IMP ticket ``k`` (for 0 the dense model) on target "t", seed 0, unless ``other`` says else."""
    values: dict[str, Any] = {
        "cell": f"{theta}-{k}-{regime}-{other}", "theta": theta, "finder": "imp" if k else "dense", "k": k,
        "sparsity": 100 * (1 - 0.8**k), "target": "t", "fraction": 1.0, "regime": regime, "seed": 0, "sa": sa, "ra": ra,
        "epochs": 1, "seconds": 1.0, "mask_digest": None, "survivors": None, "train_images": None, "test_images": None,
        "stopped_by_guard": False, "classes": (), "checkpoints": {}, "history": (),
    }  # fmt: skip
    return TransferRow(**{**values, **other})


def study_of(rows: Sequence[TransferRow]) -> StudyResults:
    """Make a study that consists of these transfers."""
    return StudyResults(
        name="made up", config={}, machine={}, pretrain=(), find=(), transfer=tuple(rows), pending=(),
        seconds=float(len(rows)), folder=Path("nowhere"),
    )  # fmt: skip

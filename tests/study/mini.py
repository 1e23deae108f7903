"""Studies of seconds, and what makes two study folders the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from benchmarks.soak import cell_differences, differences, report, rows

__all__ = ["MINI", "TINY", "cell_differences", "differences", "report", "rows", "write_config", "write_mini"]

MINI: dict[str, Any] = {
    "name": "mini",
    "model": {"name": "resnet10t", "kwargs": {"channels": [4, 6, 8, 10], "stem_width": 4}},
    "source": {"name": "digits", "resize": 28, "fraction": 0.2, "validation": 50},
    "pretrain": {
        "STD": {"recipe": {"regime": "standard", "epochs": 2, "eps": 0.1, "validate_every": 0}},
        "AT": {"recipe": {"regime": "adversarial", "epochs": 2, "eps": 0.1, "steps": 2, "validation_steps": 2}},
    },
    "find": {
        "imp-st": {"method": "imp", "rounds": 3, "recipe": {"epochs": 1, "lr": 0.02, "validate_every": 0}},
        "imp-at": {
            "method": "imp",
            "rounds": 2,
            "recipe": {"regime": "adversarial", "steps": 1, "eps": 0.1, "epochs": 1, "lr": 0.02, "validate_every": 0},
        },
        "oneshot": {"method": "oneshot", "rounds": 2},
        "random": {"method": "random", "rounds": 3, "like": "imp-st"},
    },
    "targets": {
        "fashion": {
            "data": {"name": "fashion-mnist-target", "fraction": 0.1, "validation": 50},
            "rounds": {"oneshot": [], "imp-at": []},
            "recipes": {
                "ST": {"regime": "standard", "epochs": 2, "lr": 0.05, "eps": 0.1},
                "AT": {"regime": "adversarial", "epochs": 2, "lr": 0.05, "eps": 0.1, "steps": 1, "validation_steps": 1},
            },
        }
    },
    "rounds": [2, 3],
    "seeds": [0],
    "evaluation": {"eps": 0.1, "steps": 2, "images": 60},
    "checkpoint_seconds": 0.3,
}


def write_mini(folder: Path) -> Path:
    file = folder / "mini.yaml"
    file.write_text(yaml.safe_dump(MINI))
    return file


TINY: dict[str, Any] = {
    **MINI,
    "name": "tiny",
    "pretrain": {"STD": {"recipe": {"regime": "standard", "epochs": 2, "eps": 0.1, "validate_every": 0}}},
    "find": {"imp-st": {"method": "imp", "rounds": 2, "recipe": {"epochs": 1, "lr": 0.02, "validate_every": 0}}},
    "targets": {"fashion": {**MINI["targets"]["fashion"], "rounds": {}}},
    "rounds": [2],
}
"""Six cells: a pre-training, a search, and four transfers."""


def write_config(folder: Path, config: dict[str, Any], **changes: Any) -> Path:
    file = folder / f"{config['name']}.yaml"
    file.write_text(yaml.safe_dump({**config, **changes}))
    return file

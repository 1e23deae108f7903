"""Adversarial examples, side by side for the pre-trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparse_robust.study.report.style import RIGHT, WRONG, Picture, bare, colour, picture
from sparse_robust.study.report.words import finder_name, regime_name
from sparse_robust.study.results import StudyResults
from sparse_robust.study.rows import TransferRow

FILE = "examples.safetensors"
SHOWN = 5  # images a picture
_KEYS = ("clean", "adversarial", "labels", "clean_prediction", "adversarial_prediction", "ids")


@dataclass(frozen=True)
class Examples:
    """The example images of one transfer: two stacks [n, C, H, W] in 0..1, and labels and predictions of length n."""

    row: TransferRow
    clean: torch.Tensor
    adversarial: torch.Tensor
    labels: list[int]
    clean_prediction: list[int]
    adversarial_prediction: list[int]
    ids: list[int]


def choose(results: StudyResults, target: str) -> tuple[list[Examples], list[str]]:
    """Return the examples of one setting that has most pre-trainings, and a warning for every file that is damaged.

    Of equal ones: adversarial transfer first, then the main finder's tickets, then the sparsest, then all of the data.
    """
    groups: dict[tuple[object, ...], list[TransferRow]] = {}
    for row in results.transfer:
        if row.target == target and (results.folder / "cells" / row.cell / FILE).exists():
            key = (
                row.regime == "AT",
                row.finder == results.main_finder(),
                row.k,
                row.fraction,
                -row.seed,
                row.regime,
                row.finder,
            )
            groups.setdefault(key, []).append(row)
    warnings: list[str] = []
    best: list[Examples] = []
    for _, rows in sorted(groups.items(), key=lambda item: (len(item[1]), item[0]), reverse=True):
        loaded = [_load(results.folder / "cells" / row.cell / FILE, row, warnings) for row in rows]
        readable = [e for e in loaded if e is not None]
        if readable:
            order = results.thetas()
            best = sorted(readable, key=lambda e: order.index(e.row.theta))
            break
    return best, warnings


def _load(path: Path, row: TransferRow, warnings: list[str]) -> Examples | None:
    try:
        tensors = load_file(path)
        missing = [key for key in _KEYS if key not in tensors]
        if missing:
            raise KeyError(", ".join(missing))
    except (SafetensorError, OSError, KeyError) as error:
        warnings.append(f"cells/{row.cell}/{FILE} cannot be read and is not shown ({error}).")
        return None
    return Examples(
        row=row,
        clean=tensors["clean"].float() / 255,
        adversarial=tensors["adversarial"].float(),
        labels=tensors["labels"].tolist(),
        clean_prediction=tensors["clean_prediction"].tolist(),
        adversarial_prediction=tensors["adversarial_prediction"].tolist(),
        ids=tensors["ids"].tolist(),
    )


def describe(results: StudyResults, shown: Sequence[Examples]) -> list[dict[str, Any]]:
    """Return what the picture says, as data."""
    target = shown[0].row.target if shown else ""
    return [
        {
            "cell": e.row.cell,
            "theta": e.row.theta,
            "finder": e.row.finder,
            "k": e.row.k,
            "target": target,
            "regime": e.row.regime,
            "images": [
                {
                    "id": e.ids[i],
                    "label": results.class_name(target, e.labels[i]),
                    "clean_prediction": results.class_name(target, e.clean_prediction[i]),
                    "adversarial_prediction": results.class_name(target, e.adversarial_prediction[i]),
                    "largest_change": float((e.adversarial[i] - e.clean[i]).abs().max()),
                }
                for i in _indices(e, shown)
            ],
        }
        for e in shown
    ]


def example_picture(results: StudyResults, shown: Sequence[Examples], thetas: list[str]) -> Picture | None:
    """Draw image, adversarial image and magnified difference of the same test images, a block for each pre-training."""
    if not shown:
        return None
    row = shown[0].row
    common = _common(shown)[:SHOWN]
    if not common:
        return None
    scale = max(float((e.adversarial - e.clean).abs().max()) for e in shown) or 1.0
    widths = [w for _ in shown for w in (1, 1, 1, 0.12)][:-1]  # three pictures a block, and a gap between blocks
    wide, high = 1.2 + 1.3 * sum(widths), 0.9 + 1.52 * len(common)
    edges = {"left": 1.2 / wide, "right": 1.0, "top": 1 - 0.62 / high, "bottom": 0.28 / high}
    figure = Figure(figsize=(wide, high))
    grid = figure.subplots(
        len(common), len(widths), squeeze=False,
        gridspec_kw={"width_ratios": widths, "wspace": 0.08, "hspace": 0.24, **edges},
    )  # fmt: skip
    for gap in grid[:, 3::4].flat:
        gap.set_visible(False)
    for index, one in enumerate(shown):
        _block(grid[:, 4 * index : 4 * index + 3], one, common, scale, results)
        header = {"color": colour(one.row.theta, thetas), "fontweight": "bold", "fontsize": 12.5, "ha": "center"}
        place = {"xycoords": "axes fraction", "textcoords": "offset points"}
        grid[0][4 * index + 1].annotate(f"{one.row.theta} pre-training", (0.5, 1), (0, 24), **place, **header)
    for y, sample in enumerate(common):
        name = results.class_name(row.target, shown[0].labels[shown[0].ids.index(sample)])
        grid[y][0].set_ylabel(name, fontsize=9.5, rotation=0, ha="right", va="center", labelpad=8)
    ticket = (
        "dense models"
        if row.k == 0
        else f"{finder_name(row.finder)} tickets, {row.sparsity:.2f} % sparse (k = {row.k})"
    )
    caption = (
        f"{row.target} after {regime_name(row.regime)}, {ticket}: test image, attacked image and their difference "
        f"(magnified {0.5 / scale:.1f} times, grey = unchanged) with the network's answers; true classes at the left."
    )
    return picture(figure, f"examples-{_slug(row.target)}", f"Adversarial examples: {row.target}", caption)


def _block(grid: np.ndarray, one: Examples, ids: list[int], scale: float, results: StudyResults) -> None:
    """Draw one pre-training's rows of three pictures."""
    for y, sample in enumerate(ids):
        i = one.ids.index(sample)
        answers = ((one.clean[i], one.clean_prediction[i]), (one.adversarial[i], one.adversarial_prediction[i]))
        for x, (image, answer) in enumerate(answers):
            _show(grid[y][x], image)
            mark, tone = ("✓", RIGHT) if answer == one.labels[i] else ("✗", WRONG)
            name = results.class_name(one.row.target, answer)
            grid[y][x].set_title(f"{mark} {name}", color=tone, fontsize=9, pad=3, fontweight="bold")
        _show(grid[y][2], 0.5 + 0.5 * (one.adversarial[i] - one.clean[i]) / scale)
    for x, name in enumerate(("test image", "attacked", "difference")):
        grid[-1][x].set_xlabel(name, fontsize=9.5)


def _show(axes: Axes, image: torch.Tensor) -> None:
    pixels = image.clamp(0, 1).permute(1, 2, 0).numpy()
    grey = pixels.shape[2] != 3
    shown = np.asarray(pixels[:, :, 0] if grey else pixels)
    axes.imshow(shown, cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    bare(axes)


def _common(shown: Sequence[Examples]) -> list[int]:
    """Return the sample ids that all blocks have, in the first one's order."""
    return [i for i in shown[0].ids if all(i in e.ids for e in shown)]


def _indices(one: Examples, shown: Sequence[Examples]) -> list[int]:
    return [one.ids.index(i) for i in _common(shown)[:SHOWN]]


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-") or "target"

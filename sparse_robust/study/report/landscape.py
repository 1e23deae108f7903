"""Contours of the loss around final weights, with the path of training: one panel a run."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sparse_robust.study.report.style import FAINT, INK, Picture, drawing, picture

LEVELS = 18
"""Contours of a panel, evenly spaced in the logarithm of the loss."""


def landscape_picture(panels: list[dict[str, Any]], columns: int) -> Picture:
    """Draw panels in reading order; all share their levels, so that heights can be compared."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    losses = np.concatenate([np.ravel(panel["losses"]) for panel in panels])
    finite = losses[np.isfinite(losses) & (losses > 0)]
    low, high = (finite.min(), finite.max()) if len(finite) else (1.0, 1.0)
    levels = np.geomspace(low, max(high, low * 1.01), LEVELS)
    with drawing():
        figure = Figure(figsize=(0.9 + 3.4 * columns, 0.4 + 3.2 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            shown = _panel(axes, panel, levels)
        bar = figure.colorbar(shown, ax=grid, shrink=0.7, label="clean loss (cross-entropy)")
        ticks = levels[:: max(1, LEVELS // 6)]
        bar.set_ticks(list(ticks), labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()
        return picture(
            figure,
            "landscape",
            "The loss around the final weights",
            f"Clean loss of {panels[0]['images']} test images in a plane of weights; the line is the path of training, "
            "a dot an epoch, the star the final weights.",
        )


def _panel(axes: Axes, panel: dict[str, Any], levels: np.ndarray) -> Any:
    losses = np.clip(
        np.nan_to_num(np.asarray(panel["losses"]), nan=levels[-1], posinf=levels[-1]), levels[0], levels[-1]
    )
    shown = axes.contourf(
        panel["x"], panel["y"], losses, levels=levels, norm=LogNorm(levels[0], levels[-1]), cmap="cividis"
    )
    axes.contour(panel["x"], panel["y"], losses, levels=levels, colors=INK, linewidths=0.4, alpha=0.5)
    if panel["path"]:
        path = np.asarray(panel["path"])
        axes.plot(path[:, 0], path[:, 1], "-o", color="white", linewidth=1.4, markersize=3.0)
    axes.plot(0, 0, "*", color="#d55e00", markersize=11, markeredgecolor="white")
    axes.set_title(panel["title"])
    axes.grid(False)
    shares = panel["explained"]
    for name, share in zip("xy", shares or (None, None), strict=True):
        text = f"direction {'xy'.index(name) + 1}" + (
            f" ({100 * share:.0f} % of the path)" if share is not None else ""
        )
        getattr(axes, f"set_{name}label")(text, color=FAINT, fontsize=9)
    return shown

"""The density of every layer as a picture."""

from __future__ import annotations

from pathlib import Path

from sparse_robust.errors import UsageError
from sparse_robust.files import atomic_write
from sparse_robust.masks import Masks
from sparse_robust.tickets.card import printable

ENDINGS = (".png", ".svg", ".pdf")
BAR, AVERAGE = "#0072b2", "#b34700"


def draw_density(masks: Masks, path: str | Path, title: str = "") -> None:
    """Write a bar for each masked weight, in layer order: the share that is kept, and the share of all together.

    Args:
        path: its ending says the format: .png, .svg or .pdf.
        title: above the picture.

    Raises:
        UsageError: for another ending.
        FileError: if the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"a picture's ending is one of {', '.join(ENDINGS)}; got {path.name!r}.")
    names = [name if len(name) <= 60 else f"...{name[-57:]}" for name in map(printable, masks.names())]
    shares = [100 * kept / max(numel, 1) for _, _, kept, numel in masks.layers()]
    places = range(len(names))
    with matplotlib.rc_context({"svg.hashsalt": "sparse-robust", "text.usetex": False, "text.parse_math": False}):
        figure = Figure(figsize=(8, min(1.2 + 0.2 * len(names), 300)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(places, shares, color=BAR, height=0.8)
        axes.axvline(100 * masks.density, color=AVERAGE, linewidth=1, linestyle="--")
        axes.set_yticks(places, names, fontsize=7)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"kept weights (%); dashed: all layers together, {100 * masks.density:.2f} %")
        axes.spines[["top", "right"]].set_visible(False)
        if title:
            axes.set_title(printable(title), fontsize=10, loc="left")
        about = {"Date": None} if path.suffix.lower() == ".svg" else {}
        form = path.suffix.lower()[1:]
        atomic_write(path, lambda file: figure.savefig(file, format=form, dpi=150, metadata=about))

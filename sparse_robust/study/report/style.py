"""One look for all pictures, and pictures whose bytes depend on nothing but what they show."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.typing import ColorType, LineStyleType

# Okabe and Ito's palette, which colour-blind readers can tell apart; the three main hues also differ in lightness.
COLOURS = {"STD": "#5b5b5b", "FAT": "#e08a00", "AT": "#0072b2"}
MORE_COLOURS = ("#009e73", "#cc79a7", "#d55e00", "#56b4e9")
WIN, LOSS, DEEP_LOSS, OPEN = "#0072b2", "#faeee1", "#d9822b", "#eeeeee"
RIGHT, WRONG = "#00664b", "#b34700"
INK, FAINT = "#222222", "#8a8a8a"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.labelsize": 10.5,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": INK,
    "lines.linewidth": 1.9,
    "lines.markersize": 5.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "sparse-robust",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Picture:
    """A figure as files: ``name`` without ending, one-sentence ``caption``, and the bytes of both formats."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style, whatever the user's own matplotlib settings are; these come back afterwards."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def picture(figure: Figure, name: str, title: str, caption: str) -> Picture:
    """Save ``figure`` as PNG and SVG without dates or version stamps."""
    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": _STYLE["svg.hashsalt"], "svg.fonttype": "path"}):
        figure.savefig(png, format="png", dpi=130, bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})
        figure.savefig(
            svg, format="svg", bbox_inches="tight", pad_inches=0.12, metadata={"Date": None, "Creator": None}
        )
    return Picture(name, title, caption, png.getvalue(), svg.getvalue().encode())


def colour(theta: str, thetas: list[str]) -> str:
    """Return the colour of a pre-training; it is the same in every picture."""
    others = [t for t in thetas if t not in COLOURS]
    return COLOURS.get(theta) or MORE_COLOURS[others.index(theta) % len(MORE_COLOURS)]


def ink_on(face: ColorType) -> str:
    """Return the text colour, dark or white, that is legible on ``face``."""
    red, green, blue, _ = to_rgba(face)
    return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.52 else "white"


def bare(axes: Axes) -> None:
    """Take grid, ticks and frame away."""
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def line(method: str, variant: int) -> tuple[LineStyleType, str, float]:
    """Return line style, marker and width of the ``variant``-th finder of a method: IMP solid, random masks dashed."""
    if method == "random":
        return (0, (3, 2)), "x", 1.5
    if method == "oneshot":
        return (0, (5, 1, 1, 1)), "^", 1.5
    return ("-", "o", 2.1) if variant == 0 else ((0, (9, 1)), "Ds^"[(variant - 1) % 3], 1.5)

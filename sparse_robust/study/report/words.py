"""How the report names things, so that every sentence, table and picture uses the same words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

REGIMES = {"ST": "standard transfer", "AT": "adversarial transfer"}
FINDERS = {
    "imp": "IMP",
    "dense": "dense",
    "imp-st": "IMP",
    "imp-at": "adversarial IMP",
    "oneshot": "one-shot",
    "random": "random masks",
    "gradual": "gradual pruning",
    "set": "SET",
    "rigl": "RigL",
    "granet": "GraNet",
}
THETAS = {"STD": "standard", "FAT": "fast adversarial", "AT": "PGD adversarial"}


def regime_name(regime: str) -> str:
    """Return "standard transfer" for ST, "adversarial transfer" for AT, the name itself for others."""
    return REGIMES.get(regime, f"{regime} transfer")


def finder_name(finder: str) -> str:
    """Return the name of a ticket finder in words."""
    return FINDERS.get(finder, finder)


def target_name(target: str, fraction: float) -> str:
    """Return the target, with the share of its training images where it is not all of them."""
    return target if fraction == 1 else f"{target} ({100 * fraction:g} % of its data)"


def listed(items: Iterable[object]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    words = [str(i) for i in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else "nothing"


def rounds_text(rounds: Sequence[int]) -> str:
    """Return the rounds as text; k = 0 is the dense model."""
    sparse = [k for k in rounds if k > 0]
    named = f"k = {', '.join(map(str, sparse))}" if sparse else ""
    dense = "the dense model" if 0 in rounds else ""
    return " and ".join(part for part in (dense, named) if part) or "no round"


def plural(number: int, noun: str) -> str:
    """Return "1 cell", "2 cells"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a time as "4.1 s", "5 min 20 s" or "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"

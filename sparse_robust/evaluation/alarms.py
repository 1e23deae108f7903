"""Signs that a robust accuracy is not to be believed: each with its number and a plain sentence.

A model may resist an attack because its gradients mislead, not because it is robust. The signs are those of Athalye et
al., Obfuscated gradients give a false sense of security (2018), Carlini et al., On evaluating adversarial robustness
(2019), and the flags of AutoAttack (Croce and Hein, 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_robust.attacks import PGD, Attack, Budget, Model, Square, parse_eps
from sparse_robust.errors import UsageError
from sparse_robust.evaluation.evaluate import Evaluation, evaluate
from sparse_robust.evaluation.streaming import batches, device_of, merge, predict
from sparse_robust.evaluation.surface import DIRECTIONS, PASSES, Surface, probe_surface

# Points of accuracy unless said otherwise. What each is set by:

# Adversarially trained networks lose 2 to 6 points from PGD-20 to AutoAttack; defences broken later lost 10 and more.
GAP = 8.0
# AutoAttack contains the losses of PGD, so PGD hardly ever does better (double-win, A-24).
REVERSE_GAP = 0.1
# At a radius at which every image can become grey an attack that works leaves nothing; 5 % for one not quite done.
LARGE_EPS = 5.0
# From the hundredth to the two hundredth step an attack that has converged gains nothing (Carlini et al., 4.3).
LATE_STEPS = 1.0
# Whoever sees the gradients also sees what a black-box attack sees (Athalye et al., 3.1; double-win, A-24).
BLACK_BOX = 0.0
# Where Square finds more than this after the others, AutoAttack says that they may have failed.
SQUARE = 0.2
# AutoAttack points out every image without a gradient.
ZERO_GRADIENTS = 0.0
# Trained networks, robust or not, stayed at 0 to 5 % in our measurements; one that resists FGSM alone had 26 to 88 %.
RANDOM_WINS = 10.0
# A share. Trained networks gained 1.0 to 4.4 times what the slope promises; one that resists FGSM alone 0 to 0.3, a
# shattered gradient 0.01 to 0.1.
REALISED = 1 / 3
# Distance between logits scaled to length one; AutoAttack's limit for a model without randomness.
SPREAD = 1e-4
# The best published networks stay below these robust accuracies (Linf, 8/255): more has always been gradient masking.
IMPLAUSIBLE = {"svhn": 70.0}

# Effort of the measurements made here.
STEPS = (20, 100, 200)
LARGE_EPS_STEPS = 50
N_QUERIES = 500

# Half the width of the box, in every pixel: from any image that far reaches plain grey.
WIDE: dict[str, Callable[[int], float]] = {
    "Linf": lambda elements: 0.5,
    "L2": lambda elements: 0.5 * elements**0.5,
    "L1": lambda elements: 0.5 * elements,
}


@dataclass(frozen=True)
class Alarm:
    """One sign looked for.

    Attributes:
        name: the same in every report: ``pgd-autoattack-gap``, ``large-eps``, ...
        values: the numbers it goes by; the first one is compared with the threshold.
        threshold: in the units of that number.
        raised: whether the robust accuracy is in doubt.
        sentence: what was found, with its number; if raised, what it means.
    """

    name: str
    values: dict[str, float]
    threshold: float
    raised: bool
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values; what is not finite becomes None."""
        values = {name: value if math.isfinite(value) else None for name, value in self.values.items()}
        return {
            "name": self.name,
            "raised": self.raised,
            "values": values,
            "threshold": self.threshold,
            "sentence": self.sentence,
        }


def robust_at(evaluation: Evaluation, eps: float, *, without: str = "") -> dict[int, bool]:
    """Return by sample id whether an image withstands the attacks of an evaluation up to a radius.

    Args:
        without: name of an attack that is left out: what it broke counts as withstood.
    """
    broken = [
        stage
        for stage, (name, radius) in enumerate(evaluation.stages)
        if radius <= eps * (1 + 1e-6) and name != without
    ]
    rows = evaluation.per_image
    robust = rows.clean_correct & ~torch.isin(rows.broken_by, torch.tensor(broken, dtype=torch.int64))
    return dict(zip(rows.id.tolist(), robust.tolist(), strict=True))


def percent(flags: Tensor | list[bool]) -> float:
    """Return the share of true entries in percent."""
    return 100 * float(torch.as_tensor(flags).double().mean())


def gap_alarm(pgd: Mapping[int, bool], autoattack: Mapping[int, bool]) -> Alarm | None:
    """Compare robust accuracy under PGD and under AutoAttack, on the images in both; None if there is none."""
    ids = [i for i in pgd if i in autoattack]
    if not ids:
        return None
    weak, strong = percent([pgd[i] for i in ids]), percent([autoattack[i] for i in ids])
    gap = weak - strong
    told = f"robust accuracy is {weak:.1f} % under PGD and {strong:.1f} % under AutoAttack ({len(ids)} images)"
    if gap > GAP:
        told += f": PGD misses {gap:.1f} points, so its gradients mislead; do not report its number."
    elif gap < -REVERSE_GAP:
        told += f": AutoAttack is {-gap:.1f} points weaker than PGD, so it has failed; its number is too high."
    else:
        told += f", {gap:.1f} points apart, as honest networks have it."
    raised = not -REVERSE_GAP <= gap <= GAP
    return Alarm("pgd-autoattack-gap", {"gap": gap, "pgd": weak, "autoattack": strong}, GAP, raised, told)


def large_eps_alarm(robust: float, *, eps: float, norm: str, classes: int) -> Alarm:
    """Judge robust accuracy, in percent, at a radius at which every image can be turned into any other or into grey."""
    limit = min(LARGE_EPS, 100 / classes)
    told = f"at {norm} eps = {eps:g}, where every image can become plain grey, robust accuracy is {robust:.1f} %"
    told += (
        f" instead of 0: the attack does not find what must be there (limit {limit:.1f} %)."
        if robust > limit
        else ", as it has to be."
    )
    return Alarm("large-eps", {"robust": robust, "eps": eps}, limit, robust > limit, told)


def steps_alarm(robust: Mapping[int, float]) -> Alarm:
    """Judge robust accuracies, in percent, by steps of PGD: what the last doubling still gains."""
    steps = sorted(robust)
    gain = robust[steps[-2]] - robust[steps[-1]]
    numbers = ", ".join(f"{robust[count]:.1f} % after {count}" for count in steps)
    told = f"robust accuracy under PGD is {numbers} steps: steps {steps[-2]} to {steps[-1]} gain {gain:.1f} points"
    told += ". The attack has not converged, more steps would lower it further." if gain > LATE_STEPS else "."
    values = {"gain": gain, **{f"steps_{count}": robust[count] for count in steps}}
    return Alarm("more-steps", values, LATE_STEPS, gain > LATE_STEPS, told)


def black_box_alarm(white: Tensor, black: Tensor, *, name: str, what: str, limit: float = BLACK_BOX) -> Alarm:
    """Compare what withstands the white-box attacks with what withstands one without the model's gradients.

    Args:
        white, black: bool [n], for the same images.
        name: of the alarm; ``what``: the attack without gradients, in words.
    """
    weak, strong = percent(black), percent(white)
    alone = int((white & ~black).sum())
    ahead = strong - weak
    told = (
        f"robust accuracy is {weak:.1f} % under {what} and {strong:.1f} % under white-box attacks; {alone} of "
        f"{len(white)} images fall to it alone"
    )
    told += ". An attack that sees less does better: the gradients mislead." if ahead > limit else ", as it should be."
    values = {"ahead": ahead, "black_box": weak, "white_box": strong, "alone": float(alone)}
    return Alarm(name, values, limit, ahead > limit, told)


def square_alarm(autoattack: Evaluation, eps: float) -> Alarm | None:
    """Count the images that only Square broke in an AutoAttack evaluation.

    None if Square was not the last of several attacks there: what it broke, others might have broken too.
    """
    at_eps = [name for name, radius in autoattack.stages if radius <= eps * (1 + 1e-6)]
    if len(set(at_eps)) < 2 or at_eps[-1] != "square":
        return None
    everyone, others = robust_at(autoattack, eps), robust_at(autoattack, eps, without="square")
    broken = sum(others[i] and not everyone[i] for i in everyone)
    share = 100 * broken / len(everyone)
    told = (
        f"Square, which sees no gradient, broke {broken} of {len(everyone)} images ({share:.1f} %) that were left to it"
    )
    told += ": the attacks with gradients fail on them; try Square with more queries and an adaptive attack."
    if share <= SQUARE:
        told = told[: told.index(": ")] + "."
    return Alarm("square-wins", {"share": share, "images": float(broken)}, SQUARE, share > SQUARE, told)


def zero_gradient_alarm(surface: Surface) -> Alarm:
    """Count the images whose input gradient of the cross-entropy is exactly zero."""
    share, elements = percent(surface.zero_gradient), 100 * float(surface.zero_elements.mean())
    told = (
        f"the gradient is exactly zero on {share:.1f} % of {len(surface.ids)} images ({elements:.1f} % of all elements)"
    )
    told += ": attacks along it stand still there. Is there rounding, or is the softmax saturated?" if share else "."
    return Alarm(
        "zero-gradients", {"images": share, "elements": elements}, ZERO_GRADIENTS, share > ZERO_GRADIENTS, told
    )


def direction_alarm(surface: Surface) -> Alarm:
    """Ask whether a step along the gradient raises the loss more than random steps of the same size."""
    share = percent(surface.random_wins)
    told = (
        f"on {share:.1f} % of {len(surface.ids)} images one of {DIRECTIONS} random steps of size eps raises the loss "
        "more than a step along the gradient"
    )
    told += ": the gradient does not show the way up." if share > RANDOM_WINS else "."
    return Alarm("gradient-direction", {"random_wins": share}, RANDOM_WINS, share > RANDOM_WINS, told)


def linearity_alarm(surface: Surface) -> Alarm:
    """Ask how much of what the first-order expansion promises a step along the gradient gains."""
    realised, error = surface.realised, surface.first_order_error
    raised = realised < REALISED
    if math.isnan(realised):
        told = "the loss has no slope at all, so its linearity cannot be judged; see zero-gradients."
    else:
        told = (
            f"a step of size eps along the gradient raises the loss {realised:.2f} times as much as its slope promises "
            f"(error of the first-order expansion {error:.2f} nats)"
        )
        told += ": the surface bends back at once, and gradients say little about it." if raised else "."
    return Alarm("loss-linearity", {"realised": realised, "first_order_error": error}, REALISED, raised, told)


def stochastic_alarm(surface: Surface) -> Alarm:
    """Ask whether repeated passes over the same images differ."""
    spread, flips = float(surface.spread.max()), percent(surface.flips)
    raised = spread > SPREAD or flips > 0
    told = f"{PASSES} passes over the same images differ by up to {spread:.1e} and change {flips:.1f} % of predictions"
    told += ": the model draws random numbers; attack it with averaged gradients (eot_iter)." if raised else "."
    return Alarm("stochastic", {"spread": spread, "flips": flips}, SPREAD, raised, told)


def implausible_alarm(robust: float, data: str, *, eps: float, norm: str) -> Alarm | None:
    """Compare a robust accuracy, in percent, with what can be believed on a data set; None where nothing is known.

    What is known is for Linf at 8/255, so it holds there and beyond.
    """
    known = [limit for name, limit in IMPLAUSIBLE.items() if name in data.lower()]
    if not known or norm != "Linf" or eps < 8 / 255 * (1 - 1e-6):
        return None
    told = f"robust accuracy on {data} is {robust:.1f} % at Linf eps = {eps:.3g}"
    told += f": above {known[0]:.0f} % it has always been gradient masking." if robust > known[0] else "."
    return Alarm("implausible", {"robust": robust}, known[0], robust > known[0], told)


# --- measuring


def run_alarms(
    model: Model,
    loader: Iterable[Any],
    eps: str | float,
    *,
    norm: str = "Linf",
    dense_parent: Model | None = None,
    autoattack: Evaluation | None = None,
    pgd: Evaluation | None = None,
    images: int = 200,
    data: str = "",
    seed: int = 0,
) -> tuple[Alarm, ...]:
    """Look for signs that the robust accuracy of a model is not to be believed.

    Everything is measured anew on the first images of the loader, with the model itself: the loss around each image,
    PGD with 200 steps, PGD at a very large radius, and Square with 500 queries. On a loader that is sorted by class,
    take images from all over it (``eval_loader(..., limit=...)``). Results that are at hand are compared with these.

    Args:
        model: maps images [n, C, H, W] in [0, 1] to logits, with a gradient.
        loader: yields (x, y) or (x, y, ids); ids tell which images are those of the results given.
        eps: radius of the evaluation, above 0: a number, or text such as ``8/255``.
        norm: ``Linf``, ``L2`` or ``L1``.
        dense_parent: the network a sparse one comes from; its adversarial images are shown to the model.
        autoattack, pgd: evaluations of this model in this norm.
        images: how many to measure on, over all ranks.
        data: name of the data set, for what is known about it.
        seed: any integer.

    Returns:
        Alarms, raised or not, in a fixed order: pgd-autoattack-gap and square-wins (with ``autoattack``), large-eps,
        more-steps, black-box, transfer (with ``dense_parent``), zero-gradients, gradient-direction, loss-linearity,
        stochastic, implausible (for data sets something is known of).

    Raises:
        UsageError: for a model without a gradient, an eps of 0, and a loader that yields nothing.
    """
    budget = Budget(norm, parse_eps(eps))
    if not budget.eps > 0 or images < 1:
        raise UsageError(f"alarms need eps above 0 and at least 1 image, got eps {eps!r} and {images} images.")
    held = _Held(loader, images, device_of(model))
    surface = probe_surface(model, held, budget, seed=seed)

    def measure(attack: PGD | Square, radius: float = budget.eps) -> Evaluation:
        return evaluate(model, held, [attack], radius, replica=False, check=False)

    climb = measure(PGD(norm=norm, steps=STEPS[-1], step_size=budget.eps / 4, seed=seed))
    wide = WIDE[norm](int(surface.elements.max()))
    far = measure(PGD(norm=norm, steps=LARGE_EPS_STEPS, seed=seed), wide)
    search = measure(Square(norm=norm, n_queries=N_QUERIES, seed=seed))

    ids = surface.ids.tolist()
    by_steps = {count: _after(climb, count) for count in STEPS}
    quick = dict(zip(ids, by_steps[STEPS[0]].tolist(), strict=True))
    results = {
        "pgd": pgd and robust_at(pgd, budget.eps),
        "autoattack": autoattack and robust_at(autoattack, budget.eps),
    }
    white = by_steps[STEPS[-1]]
    gradient = [robust_at(result, budget.eps, without="square") for result in (pgd, autoattack) if result]
    white = white & torch.tensor([all(known.get(i, True) for known in gradient) for i in ids])
    robust = [percent(by_steps[STEPS[0]]), *(percent(list(known.values())) for known in results.values() if known)]

    found = [
        gap_alarm(results["pgd"] or quick, results["autoattack"]) if results["autoattack"] else None,
        square_alarm(autoattack, budget.eps) if autoattack else None,
        large_eps_alarm(100 * far.robust, eps=wide, norm=norm, classes=int(surface.classes.max())),
        steps_alarm({count: percent(flags) for count, flags in by_steps.items()}),
        black_box_alarm(
            white, search.per_image.robust_correct, name="black-box", what=f"Square with {N_QUERIES} queries"
        ),
        _transfer_alarm(model, dense_parent, held, budget, white, seed) if dense_parent else None,
        zero_gradient_alarm(surface),
        direction_alarm(surface),
        linearity_alarm(surface),
        stochastic_alarm(surface),
        implausible_alarm(max(robust), data, eps=budget.eps, norm=norm),
    ]
    return tuple(alarm for alarm in found if alarm is not None)


class _Held(list[tuple[Tensor, Tensor, Tensor]]):
    """The first images of a loader, on the model's device; a shard of them where the loader is one."""

    def __init__(self, loader: Iterable[Any], images: int, device: torch.device | None) -> None:
        super().__init__()
        self.world = getattr(loader, "world", 1)
        wanted = -(-images // self.world)
        for x, y, ids in batches(loader, device):
            self.append((x[:wanted], y[:wanted], ids[:wanted]))
            wanted -= len(self[-1][1])
            if not wanted:
                break


def _after(evaluation: Evaluation, steps: int) -> Tensor:
    """Return bool [n], in the order of the ids: whether an image withstands so many steps of the one attack."""
    rows = evaluation.per_image
    return rows.clean_correct & (rows.robust_correct | (rows.step > steps))


def _transfer_alarm(model: Model, parent: Model, held: _Held, budget: Budget, white: Tensor, seed: int) -> Alarm:
    attack: Attack = PGD(norm=budget.norm, steps=STEPS[0], keep="last", seed=seed)
    rows = []
    for x, y, ids in held:
        device = device_of(parent) or x.device
        crafted = attack.run(parent, x.to(device), y.to(device), eps=budget.eps, ids=ids.to(device)).images
        robust = (predict(model, x, y) == y) & (predict(model, crafted.to(x.device)) == y)
        rows.append({"ids": ids, "robust": robust})
    robust = merge(rows, held, "run_alarms")["robust"]
    return black_box_alarm(white, robust, name="transfer", what="images made on its dense parent")

"""Time robust evaluation beside pyautoattack, torchattacks and foolbox: python -m benchmarks.parity.speed.

Same models, same images, same process, the routes in turn. What they find is compared before a time is written down.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.parity import networks, sides
from benchmarks.parity.networks import NETWORKS, Subject
from benchmarks.parity.sides import NotThereError, Task, Took
from sparse_robust import bench
from sparse_robust.bench import GateError, Record
from sparse_robust.errors import SparseRobustError

RECORD = Path(__file__).resolve().parent.parent / "results" / "speed.csv"
WITH_BATCH_NORM = ("resnet18", "resnet10t")
TARGETS = {"autoattack": 0.75, "pgd-20": 0.6}
"""Largest share of the rivals' time that is aimed at."""
POINTS = {"autoattack": 0.5, "pgd-20": 1.0}
"""How far the robust accuracies of the routes may lie apart, in points; PGD's random starts differ."""
STEPS = 20

Route = Callable[[int], Tensor]
"""Number of the round -> bool [n], whether each image of that round withstands."""


@dataclass(frozen=True)
class Trial:
    """Routes that do the same work, ours first, in so many rounds of so many images."""

    operation: str
    case: str
    routes: Mapping[str, Route]
    rounds: int
    work: int
    warm: bool = False
    """Whether an unmeasured round comes first."""


def agreement(found: dict[str, Tensor], points: float) -> str:
    """Return what the verdicts (bool [n] each, robust or not; ours first) have in common.

    Raises:
        GateError: if the robust accuracy of a route is more than ``points`` from ours.
    """
    (first, mine), *others = found.items()
    count = len(mine)
    parts = [f"{first} {100 * int(mine.sum()) / count:.1f} % robust"]
    for name, theirs in others:
        apart, differ = abs(int(mine.sum()) - int(theirs.sum())), int((mine != theirs).sum())
        parts.append(f"{name} {100 * int(theirs.sum()) / count:.1f} % ({differ} of {count} verdicts differ)")
        if 100 * apart > points * count:
            raise GateError(f"{'; '.join(parts)}: at most {points} points apart are allowed")
    return "; ".join(parts)


def radius(subject: Subject, norm: str) -> float:
    """Return the radius that is timed: the one at which half of the images withstand, or that of the parity run."""
    return subject.network.half_eps if norm == "Linf" else subject.network.eps[norm]


def autoattack(subject: Subject, norm: str, *, block: int, queries: int = sides.QUERIES) -> Trial:
    """AutoAttack standard, ours and pyautoattack's, one block of images a round, each with its default batch size.

    Raises:
        NotThereError: if this version has no AutoAttack.
    """
    eps = radius(subject, norm)
    blocks = list(zip(subject.x.split(block), subject.y.split(block), strict=True))
    mine = our_autoattack(subject, norm, queries)
    theirs = sides.reference_attacker(subject.model, Task(norm, eps, sides.ENSEMBLE, queries=queries), subject.x.device)

    def ours(number: int) -> Tensor:
        x, y = blocks[number]
        return _right(subject, mine.run_standard_evaluation(x, y), y)

    def reference(number: int) -> Tensor:
        x, y = blocks[number]
        return _right(subject, theirs.run_standard_evaluation(x, y)[0], y)

    case = f"{subject.network.name} {norm} {eps:g}, {len(blocks)} blocks of {block} images"
    case += "" if queries == sides.QUERIES else f", short: {queries} queries"
    routes = {"ours": ours, f"pyautoattack {sides.version_of('pyautoattack')}": reference}
    return Trial("autoattack", case, routes, len(blocks), block)


def our_autoattack(subject: Subject, norm: str, queries: int) -> Any:
    """Return our AutoAttack, as its users make it."""
    try:
        from sparse_robust.attacks import AutoAttack
    except ImportError as error:
        raise NotThereError("sparse_robust.attacks has no AutoAttack: there is nothing to time.") from error
    attacker = AutoAttack(
        subject.model, norm=norm, eps=radius(subject, norm), version="standard", seed=0, verbose=False
    )
    if queries != sides.QUERIES:
        attacker.square.n_queries = queries
    return attacker


def pgd(subject: Subject, *, batch: int, rounds: int) -> Trial:
    """A PGD-20 evaluation: the share of images still classified correctly, by each package.

    All take the same step size and a uniform random start. Ours leaves out what is wrong without an attack; so does
    the route "correct images only", which is torchattacks used with care.
    """
    import foolbox
    import torchattacks

    model, x, y, eps = subject.model, subject.x, subject.y, radius(subject, "Linf")
    alpha = 2.5 * eps / STEPS
    parts = list(zip(x.split(batch), y.split(batch), strict=True))
    attack = torchattacks.PGD(model, eps=eps, alpha=alpha, steps=STEPS, random_start=True)
    fool = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=STEPS, random_start=True)
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=x.device)
    ours = our_pgd(subject, batch)

    def all_images(_: int) -> Tensor:
        return torch.cat([_right(subject, attack(images, labels), labels) for images, labels in parts])

    def correct_only(_: int) -> Tensor:
        found = []
        for images, labels in parts:
            right = _right(subject, images, labels)
            right[right.clone()] = _right(subject, attack(images[right], labels[right]), labels[right])
            found.append(right)
        return torch.cat(found)

    def of_foolbox(_: int) -> Tensor:
        return torch.cat([~fool(wrapped, images, labels, epsilons=eps)[2] for images, labels in parts])

    name = f"torchattacks {sides.version_of('torchattacks')}"
    routes: dict[str, Route] = {
        "ours": lambda _: ours(),
        name: all_images,
        f"{name}, correct images only": correct_only,
        f"foolbox {sides.version_of('foolbox')}": of_foolbox,
    }
    case = f"{subject.network.name} Linf {eps:g}, {len(y)} images, batch {batch}"
    return Trial("pgd-20", case, routes, rounds, len(y), warm=True)


def our_pgd(subject: Subject, batch: int) -> Callable[[], Tensor]:
    """Return our route of `pgd`."""
    from sparse_robust.attacks import PGD
    from sparse_robust.evaluation import evaluate

    eps, ids = radius(subject, "Linf"), torch.arange(len(subject.y), device=subject.y.device)
    attack = PGD(norm="Linf", steps=STEPS, step_size=2.5 * eps / STEPS, random_start=True, seed=0)
    loader = list(zip(*(part.split(batch) for part in (subject.x, subject.y, ids)), strict=True))
    return lambda: evaluate(subject.model, loader, attacks=[attack], eps=eps).per_image.robust_correct


def run(trial: Trial, device: torch.device, say: Callable[[str], None]) -> list[Record]:
    """Take the routes in turn, round by round and in both orders, and return their records: wall and processor time.

    Raises:
        GateError: if what they found over all rounds disagrees.
    """
    load = os.getloadavg()[0]
    times: dict[str, list[Took]] = {name: [] for name in trial.routes}
    found: dict[str, list[Tensor]] = {name: [] for name in trial.routes}
    torch.manual_seed(0)  # of the rivals' random starts; ours has its own
    if trial.warm:
        for route in trial.routes.values():
            route(0)
    for number in range(trial.rounds):
        for name in list(trial.routes)[:: 1 if number % 2 == 0 else -1]:
            with sides.timing(device) as took:
                verdicts = trial.routes[name](number)
            times[name].append(took)
            found[name].append(verdicts.cpu())
        shown = ", ".join(f"{name} {took[-1].cpu_seconds:.1f} s" for name, took in times.items())
        say(f"{trial.operation}, {trial.case}, round {number + 1}/{trial.rounds}, CPU time: {shown}")
    gate = agreement({name: torch.cat(parts) for name, parts in found.items()}, POINTS[trial.operation])
    clocks = ("seconds", "cpu_seconds") if device.type == "cpu" else ("seconds",)
    return [record for clock in clocks for record in _records(trial, times, clock, gate, load, device)]


def _records(
    trial: Trial, times: dict[str, list[Took]], clock: str, gate: str, load: float, device: torch.device
) -> list[Record]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    taken = {name: [getattr(took, clock) for took in each] for name, each in times.items()}
    ours = float(np.median(taken[next(iter(taken))]))
    records = []
    for route, seconds in taken.items():
        low, median, high = (float(value) for value in np.quantile(seconds, [0.2, 0.5, 0.8]))
        records.append(
            Record(
                time=now,
                operation=trial.operation,
                case=trial.case + ("" if clock == "seconds" else ", processor time"),
                route=route,
                device=device.type,
                samples=len(seconds),
                calls=1,
                median_s=median,
                q20_s=low,
                q80_s=high,
                relative=median / ours,
                per_second=trial.work / median,
                unit="images",
                gate=gate,
                load=round(load, 2),
                **asdict(bench.machine(device)),
            )
        )
    return records


def shares(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each rival and clock: our share of its time, and whether that is within the target."""
    for record in records:
        if record.route != "ours":
            share, target = 1 / record.relative, TARGETS[record.operation]
            held = "within" if share <= target else "ABOVE"
            yield f"{record.operation}, {record.case}: {share:.2f} of the time of {record.route}, {held} {target:g}"


def profile(subject: Subject, operation: str, given: argparse.Namespace) -> str:
    """Return where our time goes, operation by operation."""
    from torch.profiler import ProfilerActivity

    if operation == "autoattack":
        attacker = our_autoattack(subject, given.norm, given.square_queries)
        x, y = subject.x[: given.block], subject.y[: given.block]
        call: Callable[[], Any] = lambda: attacker.run_standard_evaluation(x, y)  # noqa: E731
    else:
        call = our_pgd(subject, given.batch)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45)


def _right(subject: Subject, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return subject.model(images).argmax(1) == labels


def main() -> int:
    given = _parse()
    torch.set_num_threads(given.threads)
    console = Console(width=None if sys.stdout.isatty() else 180, markup=False, highlight=False)
    console.print(bench.machine_line(bench.machine(given.device)))
    status = 0
    try:
        for name in given.networks:
            subject = networks.load(name, given.device).first(given.images)
            for operation in given.only:
                if given.profile:
                    console.print(profile(subject, operation, given))
                else:
                    status |= _time(console, operation, subject, given)
    except SparseRobustError as error:
        console.print(f"error: {error}", style="red")
        return 2
    return status


def _time(console: Console, operation: str, subject: Subject, given: argparse.Namespace) -> int:
    """Time one operation on one network, show and record it; return 1 if the routes disagree."""
    if operation == "autoattack":
        trial = autoattack(subject, given.norm, block=given.block, queries=given.square_queries)
    else:
        trial = pgd(subject, batch=given.batch, rounds=given.samples)
    try:
        records = run(trial, subject.x.device, console.print)
    except GateError as error:
        console.print(f"{operation}, {trial.case}: NOT RECORDED, {error}", style="red")
        return 1
    bench.append(given.out, records)
    console.print(bench.table(records))
    console.print(records[0].gate)
    for line in shares(records):
        console.print(line)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time robust evaluation beside other packages.")
    add = parser.add_argument
    add("--only", nargs="+", default=tuple(TARGETS), choices=tuple(TARGETS), help="default: both")
    add(
        "--networks", nargs="+", default=WITH_BATCH_NORM, choices=tuple(NETWORKS), help="default: those with batch norm"
    )
    add("--norm", default="Linf", choices=("Linf", "L2", "L1"), help="of AutoAttack; default: %(default)s")
    add("--images", type=int, default=1000, help="default: %(default)s")
    add("--block", type=int, default=250, help="images of a block of AutoAttack; default: %(default)s")
    add("--batch", type=int, default=250, help="images of a batch of PGD, all routes; default: %(default)s")
    add("--square-queries", type=int, default=sides.QUERIES, help="default: %(default)s")
    add("--samples", type=int, default=10, help="rounds of PGD; default: %(default)s")
    add("--threads", type=int, default=1, help="of torch; default: %(default)s")
    add("--device", default="cpu")
    add("--profile", action="store_true", help="show where our time goes, and time nothing")
    add("--out", type=Path, default=RECORD, help="default: benchmarks/results/speed.csv")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

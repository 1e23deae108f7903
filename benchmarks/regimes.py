"""Train the same network by several regimes and record robust accuracy beside the time each takes.

    python benchmarks/regimes.py [--regimes NAME ...] [--seeds N] [--epochs N] [--eps 0.1] [--no-guard] [--out FILE]
    python benchmarks/regimes.py --show      # the newest record as a table, and nothing else

On the embedded real images: 5,400 of Fashion-MNIST train, 1,000 others test, a ResNet-10-T of 80 thousand parameters,
Linf. The default compares the two single-step regimes with PGD-AT, in under six minutes of one core. A record holds
the seconds of training, by the clock and of the processor, and, in the place of a gate, clean, PGD-20 and APGD accuracy
in percent. The table compares processor seconds, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from sparse_robust.attacks import APGD, PGD
from sparse_robust.bench import Record, append, last_run, machine, machine_line, read
from sparse_robust.data import Data, DataSpec, eval_loader, load_data
from sparse_robust.evaluation import evaluate
from sparse_robust.models import create_model
from sparse_robust.objectives import REGIMES
from sparse_robust.training import Recipe, Trainer

RECORD = Path(__file__).resolve().parent / "results" / "regimes.csv"
STEPS = 7
"""Of PGD-AT, TRADES and MART, as in Madry et al. (2018)."""
ATTACKS = {"PGD-20": PGD(steps=20), "APGD": APGD(steps=50)}


@dataclass(frozen=True)
class Run:
    """One training: seconds by the clock and of the processor, and accuracies in percent."""

    seconds: float
    cpu: float
    accuracies: dict[str, float]


def make_network(data: Data, seed: int) -> nn.Module:
    """Return the network that every regime trains."""
    return create_model(
        "resnet10t", num_classes=data.num_classes, in_chans=data.in_chans, mean=data.mean, std=data.std, seed=seed,
        channels=(8, 16, 32, 64), stem_width=8,
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all regimes have in common; the guard watches single-step ones."""

    epochs: int
    eps: str
    guard: bool

    def recipe(self, regime: str) -> Recipe:
        """Return the recipe, in which regimes differ by their name alone."""
        return Recipe(
            regime=regime, epochs=self.epochs, lr=0.1, eps=self.eps, steps=STEPS, attack_mode="eval", validate_every=0,
            guard=self.guard,
        )  # fmt: skip

    @property
    def case(self) -> str:
        """Name in the record."""
        watched = "" if self.guard else ", no guard"
        return f"fashion-mnist, resnet10t 8-64, Linf {self.eps}, {self.epochs} epochs, PGD-{STEPS}{watched}"


def train_and_measure(regime: str, data: Data, setting: Setting, *, seed: int) -> Run:
    """Train once, by the clock, and measure the last weights on all test images."""
    model = make_network(data, seed)
    began, busy = time.perf_counter(), time.process_time()
    result = Trainer(model, data, setting.recipe(regime), seed=seed).fit()
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    model.load_state_dict(result.selection.state("last"))
    loader = eval_loader(data.test, 500)
    accuracies: dict[str, float] = {}
    for name, attack in ATTACKS.items():
        found = evaluate(model, loader, [attack], setting.eps, check=False)
        accuracies |= {"clean": found.sa, name: found.ra}
    return Run(seconds, cpu, accuracies)


def summary(runs: Sequence[Run], data: Data) -> str:
    """Say what was measured: mean and standard deviation over the seeds, in percent."""
    parts = []
    for name in ("clean", *ATTACKS):
        values = [run.accuracies[name] for run in runs]
        spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        parts.append(f"{name} {statistics.mean(values):.1f}{spread}")
    return f"{', '.join(parts)} % of {len(data.test)} test images"


def records_of(measured: dict[str, list[Run]], data: Data, setting: Setting, load: float) -> list[Record]:
    """Return one record a regime; times are relative to the first."""
    now, where = datetime.now(UTC).isoformat(timespec="seconds"), asdict(machine())
    medians = {regime: statistics.median(run.seconds for run in runs) for regime, runs in measured.items()}
    records = []
    for regime, runs in measured.items():
        seconds = sorted(run.seconds for run in runs)
        low, high = (seconds[round(share * (len(seconds) - 1))] for share in (0.2, 0.8))
        records.append(
            Record(
                time=now, operation="regime", route=regime, device="cpu", samples=len(runs), calls=1,
                case=setting.case,
                median_s=medians[regime], q20_s=low, q80_s=high,
                relative=medians[regime] / next(iter(medians.values())),
                per_second=setting.epochs * len(data.train) / medians[regime], unit="images",
                gate=summary(runs, data), load=load, **where,
                cpu_s=statistics.median(run.cpu for run in runs),
            )
        )  # fmt: skip
    return records


def show(records: Sequence[Record]) -> str:
    """Return the records as a table in Markdown, under the line that says where they were made."""
    lines = [
        f"Recorded {records[-1].time[:10]}: {records[-1].case}; {records[-1].samples} seed(s).",
        "",
        f"| regime | clean | PGD-20 | APGD | seconds of training (CPU) | beside {records[0].route} |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        found = re.fullmatch(r"clean (.*?), PGD-20 (.*?), APGD (.*?) % of .*", record.gate)
        cells = found.groups() if found else (record.gate, "", "")
        seconds, first = (r.cpu_s or r.median_s for r in (record, records[0]))
        lines.append(f"| {record.route} | {' | '.join(cells)} | {seconds:.1f} | {seconds / first:.2f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--regimes", nargs="+", default=["adversarial", "n-fgsm", "fast"], choices=list(REGIMES), metavar="NAME",
        help=f"of {', '.join(REGIMES)}; the first is what times are compared with; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument(
        "--eps", default="0.1", help="radius of training and attacks, such as 8/255; default: %(default)s"
    )
    parser.add_argument("--no-guard", action="store_true", help="let single-step regimes collapse")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record to add to; default: %(default)s")
    parser.add_argument("--show", action="store_true", help="print the newest run of the record, and measure nothing")
    given = parser.parse_args()
    if not given.show:
        torch.set_num_threads(1)
        setting = Setting(given.epochs, given.eps, not given.no_guard)
        data = load_data(DataSpec(name="fashion-mnist-source", augment="none"))
        print(machine_line(machine()))
        measured: dict[str, list[Run]] = {regime: [] for regime in given.regimes}
        load = round(os.getloadavg()[0], 2)
        for seed in range(given.seeds):
            for regime in given.regimes:
                run = train_and_measure(regime, data, setting, seed=seed)
                measured[regime].append(run)
                print(
                    f"{regime}, seed {seed}: {run.seconds:.1f} s ({run.cpu:.1f} s CPU), {summary([run], data)}",
                    flush=True,
                )
        append(given.out, records_of(measured, data, setting, load))
    print(show(last_run(read(given.out))))
    return 0


if __name__ == "__main__":
    sys.exit(main())

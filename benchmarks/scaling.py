"""Throughput of robust training on 1, 2, ... processes: python -m benchmarks.scaling [--ranks 1 2] [--steps N]

One machine, the global batch fixed (strong scaling): every process takes its part of the same batches, through the same
trainer. Each line says images per second by the clock, and processor seconds per image, which other work on the machine
does not change much; the time of the gradients' all-reduce alone; and the efficiency against one process.
The CPU is used unless --device cuda. Lines are appended to benchmarks/results/scaling.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "scaling.csv"


def main() -> int:
    parser = argparse.ArgumentParser(description="Throughput of robust training by the number of processes.")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after two others; default: %(default)s")
    parser.add_argument("--batch", type=int, default=256, help="images a step over all processes; default: %(default)s")
    parser.add_argument("--attack-steps", type=int, default=3, help="steps of PGD; default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        measure(given)
        return 0
    rows = [launch(given, ranks) for ranks in given.ranks]
    alone = rows[0]["images_per_second"] / rows[0]["ranks"]
    for row in rows:
        row["efficiency"] = round(row["images_per_second"] / row["ranks"] / alone, 3)
        print(json.dumps(row))
    append(given.out, rows)
    return 0


def launch(given: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Measure in processes of their own, as many as asked for."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        options = ["--steps", given.steps, "--batch", given.batch, "--attack-steps", given.attack_steps]
        words = ["-m", "benchmarks.scaling", *map(str, options), "--device", given.device, "--worker", str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
        if given.device == "cpu":
            environment["ACCELERATE_USE_CPU"] = "true"
        subprocess.run([*torchrun, *words], check=True, cwd=ROOT, env=environment)
        row: dict[str, Any] = json.loads(result.read_text())
        return row


def measure(given: argparse.Namespace) -> None:
    """Take the steps on this process, and let the first one write what all of them took."""
    import torch
    from accelerate import Accelerator

    from sparse_robust.data import DataSpec, load_data
    from sparse_robust.models import create_model
    from sparse_robust.pruning import prune
    from sparse_robust.training import Recipe, Trainer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    accelerator = Accelerator()
    data = load_data(DataSpec(name="digits", resize=28))
    wide = {"channels": (16, 32, 64, 128), "stem_width": 16}
    model = create_model("resnet10t", num_classes=10, in_chans=1, mean=data.mean, std=data.std, seed=0, **wide)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    recipe = Recipe(regime="adversarial", eps=0.1, steps=given.attack_steps, batch_size=given.batch, epochs=1)
    trainer = Trainer(model, data, recipe, seed=0, masks=prune(model, 0.9), accelerator=accelerator)
    trainer.trainee.model.train()
    wall, processor = [], 0.0
    for step, batch in enumerate(trainer.train_batches.epoch(0)):
        if step == 2 + given.steps:
            break
        accelerator.wait_for_everyone()
        began, used = time.perf_counter(), processor_seconds()
        trainer.stepper(batch, epoch=0, step=step, seed=0)
        accelerator.wait_for_everyone()
        if step >= 2:
            wall.append(time.perf_counter() - began)
            processor += processor_seconds() - used
    reduced = all_reduce_seconds(accelerator, parameters)
    total = float(accelerator.reduce(torch.tensor(processor, device=accelerator.device), "sum"))
    if accelerator.is_main_process:
        row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": accelerator.device.type,
            "torch": torch.__version__,
            "ranks": accelerator.num_processes,
            "batch": given.batch,
            "attack_steps": given.attack_steps,
            "parameters": parameters,
            "images_per_second": round(given.batch / statistics.median(wall), 2),
            "processor_ms_per_image": round(1e3 * total / given.batch / len(wall), 3),
            "all_reduce_ms": round(1e3 * reduced, 3),
            "step_ms": round(1e3 * statistics.median(wall), 1),
            "load": round(os.getloadavg()[0], 1),
        }
        given.worker.write_text(json.dumps(row))
    accelerator.end_training()


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def all_reduce_seconds(accelerator: Any, parameters: int) -> float:
    """The median time of one all-reduce as large as all gradients; 0 on one process."""
    import torch

    if accelerator.num_processes == 1:
        return 0.0
    gradients, taken = torch.zeros(parameters, device=accelerator.device), []
    for _ in range(10):
        accelerator.wait_for_everyone()
        began = time.perf_counter()
        torch.distributed.all_reduce(gradients)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(main())

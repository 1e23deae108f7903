"""Time operations and append the record: python benchmarks/run.py [--only NAME ...] [--device cuda] [--out FILE].

Needs torch, timm and rich alone, so that it runs where the package is not installed:
PYTHONPATH=.:kernels python benchmarks/run.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from sparse_robust import bench
from sparse_robust.errors import SparseRobustError

RECORD = Path(__file__).resolve().parent / "results" / "records.csv"


def main() -> int:
    parser = argparse.ArgumentParser(description="Time operations, each after its correctness gate.")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help=f"of: {', '.join(bench.OPERATIONS)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--scale", default="full", choices=bench.SCALES, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=12, help="rounds of timing; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RECORD, help="the record to add to; default: %(default)s")
    parser.add_argument("--show", action="store_true", help="show the last run in the record, and time nothing")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if given.show:
            console.print(bench.table(bench.last_run(bench.read(given.out))))
            return 0
        return bench.command(
            given.only, csv=given.out, device=given.device, scale=given.scale, samples=given.samples, console=console
        )
    except SparseRobustError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())

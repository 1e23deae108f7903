"""Time operations and append the record: python benchmarks/run.py [--only NAME ...] [--device cuda] [--out FILE].

    --claims        time what the project's claims rest on, then say which hold
    --base REF      time our routes against those of another git revision, in turn
    --plot FOLDER   draw the record; --show: the last run of it as a table; --show --claims: what it says of the claims

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
    parser.add_argument(
        "--samples", type=int, default=12, help="rounds of timing, 0: gates alone; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, help=f"the record to add to; default: {RECORD}")
    parser.add_argument("--show", action="store_true", help="show the last run in the record, and time nothing")
    parser.add_argument("--claims", action="store_true", help="run what the claims rest on, and say which of them hold")
    parser.add_argument("--since", default="", metavar="TIME", help="with --show: only runs from this time on, UTC")
    parser.add_argument("--base", metavar="REF", help="compare with this git revision; adds nothing to the record")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the record into this folder; times nothing")
    given = parser.parse_args()
    record = None if given.base else RECORD  # a comparison adds nothing to it
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        return bench.command(
            given.only, csv=given.out or record, device=given.device, scale=given.scale, samples=given.samples,
            base=given.base, claims=given.claims, plot=given.plot, show=given.show, since=given.since, console=console,
        )  # fmt: skip
    except SparseRobustError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


if __name__ == "__main__":
    sys.exit(main())

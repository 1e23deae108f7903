"""Timing of operations: each is first shown to be right, then timed beside its rivals, then written down.

``run`` does it, case by case; ``OPERATIONS`` says what there is; ``command`` and ``report`` show it on a console;
``read`` and ``table`` bring back what was recorded, ``plot`` draws it, ``CLAIMS`` are held against it; ``compare``
times the working tree against another revision.
"""

from sparse_robust.bench import operations as _operations  # noqa: F401  registers them
from sparse_robust.bench.base import Comparison, compare
from sparse_robust.bench.claimed import CLAIMS
from sparse_robust.bench.claims import Claim, Figure, claim_table, verdicts
from sparse_robust.bench.harness import OPERATIONS, SCALES, Case, GateError, Operation, Outcome, operation, run
from sparse_robust.bench.machines import machine, machine_line
from sparse_robust.bench.plots import plot
from sparse_robust.bench.records import Record, append, last_run, read, table
from sparse_robust.bench.report import command, report

__all__ = [
    "CLAIMS",
    "OPERATIONS",
    "SCALES",
    "Case",
    "Claim",
    "Comparison",
    "Figure",
    "GateError",
    "Operation",
    "Outcome",
    "Record",
    "append",
    "claim_table",
    "command",
    "compare",
    "last_run",
    "machine",
    "machine_line",
    "operation",
    "plot",
    "read",
    "report",
    "run",
    "table",
    "verdicts",
]

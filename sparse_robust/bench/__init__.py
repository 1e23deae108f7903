"""Timing of operations: each is first shown to be right, then timed beside its rivals, then written down.

``run`` does it, case by case; ``OPERATIONS`` says what there is; ``command`` and ``report`` show it on a console;
``read`` and ``table`` bring back what was recorded.
"""

from sparse_robust.bench import operations as _operations  # noqa: F401  registers them
from sparse_robust.bench.harness import OPERATIONS, SCALES, Case, GateError, Operation, Outcome, operation, run
from sparse_robust.bench.machines import machine, machine_line
from sparse_robust.bench.records import Record, append, last_run, read, table
from sparse_robust.bench.report import command, report

__all__ = [
    "OPERATIONS",
    "SCALES",
    "Case",
    "GateError",
    "Operation",
    "Outcome",
    "Record",
    "append",
    "command",
    "last_run",
    "machine",
    "machine_line",
    "operation",
    "read",
    "report",
    "run",
    "table",
]

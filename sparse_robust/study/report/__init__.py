"""The report of a study: a page a person reads, and a twin a program reads."""

from __future__ import annotations

from sparse_robust.study.report.render import write_report

__all__ = ["write_report"]

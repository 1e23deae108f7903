"""Files that are damaged, made up or hostile, built anew from good ones each time, and always the same."""

from __future__ import annotations

from pathlib import Path

from tests.bad_files.checkpoints import checkpoints, models
from tests.bad_files.damage import Case
from tests.bad_files.texts import configurations, studies, verdict_files
from tests.bad_files.tickets import tickets


def corpus(folder: Path) -> list[Case]:
    """Return every case. ``folder`` takes the good files they are made from."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = (checkpoints, models, tickets, configurations, verdict_files, studies)
    cases = [case for maker in makers for case in maker(folder)]
    assert len({(case.kind, case.name) for case in cases}) == len(cases)
    return cases

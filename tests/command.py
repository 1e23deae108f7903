"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from sparse_robust.cli import main


class Answer(NamedTuple):
    """What a command returned and printed."""

    status: int
    out: str
    err: str


Run = Callable[..., Answer]


def command_line(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a command of these words."""

    def call(*arguments: str) -> Answer:
        status = main(arguments)
        captured = capsys.readouterr()
        return Answer(status, captured.out, captured.err)

    return call

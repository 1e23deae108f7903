"""The Python of docs/training.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_code_of_the_training_page_runs() -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["result"].how["ranks"] == 1  # type: ignore[attr-defined]
    assert len(set(names["hook"].counts)) == 1  # type: ignore[attr-defined]

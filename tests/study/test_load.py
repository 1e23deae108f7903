"""Configuration files: what is refused while they are read."""

from pathlib import Path

import pytest

from sparse_robust.errors import UsageError
from sparse_robust.study.load import presets, read_config


def written(folder: Path, text: str) -> Path:
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("seeds: [0]\nname: a\nseeds: [1]\n", "seeds", (1, 3)),
        ("model:\n  name: a\n  'name': b\n", "name", (2, 3)),
        ("a: {x: 1,\n  x: 2}\n", "x", (1, 2)),
        ("list:\n  - {y: 1}\n  - {y: 1,\n     y: 1}\n", "y", (3, 4)),
        ("1: a\n1: b\n", "1", (1, 2)),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, key: str, lines: tuple[int, int]) -> None:
    first, second = lines
    with pytest.raises(UsageError, match=rf"mine\.yaml.* key '{key}' twice, on lines {first} and {second}: keep one"):
        read_config(written(tmp_path, text))


def test_an_override_with_a_key_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="model.kwargs"):
        read_config(None, ["model.kwargs={a: 1, a: 2}"])


def test_merged_keys_may_be_set_anew(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\nd: {<<: *b}\n"
    values = read_config(written(tmp_path, text))
    assert [values[key] for key in "bcd"] == [{"x": 2, "y": 1}, {"x": 3, "y": 1}, {"x": 2, "y": 1}]
    assert all(read_config(name)["name"] == name for name in presets())

"""Typed configurations from presets, YAML files and dotted overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from sparse_robust.errors import FileError, UsageError, unknown
from sparse_robust.files import canonical_json

T = TypeVar("T")


def presets() -> dict[str, Path]:
    """Return the configurations that come with the package, by name."""
    folder = Path(str(resources.files("sparse_robust") / "presets"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_config(source: str | Path | None, overrides: Sequence[str] = (), *, study: bool = True) -> dict[str, Any]:
    """Return the plain values of a preset or a YAML file with ``key.sub=value`` overrides applied; values are YAML.

    Presets are studies: without ``study``, the configuration is that of a single run, and only a file will do.

    Raises:
        UsageError: for an unknown preset, a file that is not a YAML mapping, or an override without ``=``.
    """
    values: dict[str, Any] = {}
    if source is not None:
        file = Path(source)
        if not (file.suffix in (".yaml", ".yml") or file.exists()):
            if not study:
                raise UsageError(_no_file(str(source)))
            if str(source) not in presets():
                raise unknown("preset", str(source), [*presets(), "FILE.yaml"])
            file = presets()[str(source)]
        values = _read_yaml(file)
    values = to_plain(values)  # anchors of the file become copies, so that an override changes one place
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UsageError(f"expected key=value, such as recipe.epochs=5, got {override!r}.")
        _set(values, key, text)
    return values


def _no_file(source: str) -> str:
    if source in presets():
        return f"{source} is a study's preset: use `sparse-robust study run --config {source}`, or give a YAML file."
    return f"there is no file {source}: --config takes a YAML file with the keys of this verb."


def read_spec(file: Path) -> dict[str, Any]:
    """Return what the ``spec.yaml`` of a run says.

    Raises:
        FileError: if it cannot be read, or is not what a run writes.
    """
    try:
        there = _parse(file.read_text(encoding="utf-8"))
        canonical_json(there)
    except OSError as error:
        raise FileError(f"cannot read {file}: {error.strerror or error}.") from error
    except (TypeError, ValueError) as error:
        raise FileError(f"{file} is damaged ({error}). Choose another --out, or delete {file.parent}.") from error
    if not isinstance(there, dict):
        raise FileError(
            f"{file} is damaged: expected the keys of a run, got {there!r:.80}. Choose another --out, or delete "
            f"{file.parent}."
        )
    return there


def build(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Make a configuration dataclass from plain values: unknown keys and wrong types are refused, naming the key.

    Raises:
        UsageError: saying which key, what was expected and what came.
    """
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    where = f" in {path}" if path else ""
    if not isinstance(values, Mapping):
        raise UsageError(f"{path} takes keys ({', '.join(known)}), got {values!r}.")
    for key in values:
        if key not in known:
            raise unknown(f"key{where}", str(key), known)
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise UsageError(f"the configuration lacks {', '.join(_join(path, name) for name in missing)}.")
    arguments = {key: _value(hints[key], value, _join(path, key)) for key, value in values.items()}
    try:
        return cls(**arguments)
    except UsageError as error:
        raise UsageError(f"{path}: {error}" if path else str(error)) from error


def _value(annotation: Any, value: Any, path: str) -> Any:
    """Return one value in the type of its field; structures are ours, the leaves are jsonargparse's."""
    origin, choices = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType) and any(map(is_dataclass, choices)):
        return None if value is None else _value(next(filter(is_dataclass, choices)), value, path)
    if is_dataclass(annotation) and isinstance(annotation, type):
        return build(annotation, value, path)
    if origin is dict and is_dataclass(choices[1]):
        if not isinstance(value, Mapping):
            raise UsageError(f"{path} takes entries by name, got {value!r}.")
        return {str(name): _value(choices[1], entry, _join(path, str(name))) for name, entry in value.items()}
    return _leaf(annotation, value, path)


def _leaf(annotation: Any, value: Any, path: str) -> Any:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=annotation)
    try:
        return parser.parse_object({"value": value}).value
    except ArgumentError as error:
        expected = getattr(annotation, "__name__", None) if isinstance(annotation, type) else str(annotation)
        raise UsageError(f"{path} must be of type {expected}, got {value!r}.") from error


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def to_plain(value: Any) -> Any:
    """Return a configuration as dicts, lists and scalars, complete with its defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        size = file.stat().st_size
        if size > LARGEST:
            raise UsageError(f"{file} is {size / 1e6:.0f} MB large, which no configuration is: check the name.")
        values = _parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the configuration {file}: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} must hold a mapping of keys to values, got {type(values).__name__}.")
    return values


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which would let the last of two equal keys win, without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                line, name = key.start_mark.line + 1, (key.tag, key.value)
                if name in lines:
                    raise ValueError(f"it has the key {key.value!r} twice, on lines {lines[name]} and {line}: keep one")
                lines[name] = line
        return node


LARGEST, MOST_VALUES, DEEPEST = 1 << 22, 100_000, 50
"""Bytes of a configuration file; values in it, every use of an anchor counted; levels of nesting."""


def _parse(text: str) -> Any:
    """Return the value of a YAML text that may come from anywhere.

    Raises:
        ValueError: if it is not YAML, has a key twice, asks for Python objects, or is larger or deeper than a
            configuration, which a few anchors that use each other can be.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(str(error)) from error
    waiting, seen = [(value, 0)], 0
    while waiting:
        item, depth = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ValueError(f"it has more than {MOST_VALUES} values or {DEEPEST} levels, anchors written out")
        if isinstance(item, (dict, list, tuple, set)):
            below = item.values() if isinstance(item, dict) else item
            waiting.extend((entry, depth + 1) for entry in below)
    return value


def _set(values: dict[str, Any], key: str, text: str) -> None:
    try:
        value = _parse(text)
    except ValueError as error:
        raise UsageError(f"the value of {key} is not valid YAML: {text!r}.") from error
    *parents, last = key.split(".")
    at = values
    for depth, parent in enumerate(parents):
        below = at.setdefault(parent, {})
        if not isinstance(below, dict):
            raise UsageError(f"{'.'.join(parents[: depth + 1])} is a single value, so {key} cannot be set below it.")
        at = below
    at[last] = value

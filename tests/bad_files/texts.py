"""Bad configurations, verdict files and study folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from sparse_robust.evaluation.verdicts import UNBROKEN, VerdictFile, Verdicts
from sparse_robust.study.load import presets
from tests.bad_files.damage import SENTINEL, Case, cut, flipped, shuffled, strangers


def configurations(folder: Path) -> Iterator[Case]:
    good = presets()["quickstart"].read_bytes()
    plain = yaml.safe_load(good)
    for what, spoiled in [*cut(good, 8), *flipped(good, 12), *shuffled(good, 6)]:
        yield Case("configuration", what, spoiled, sound=None)
    for what, content in strangers().items():
        yield Case("configuration", what, content)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    merges = ["b0: &b0 {x: 1}"] + [f"b{i}: &b{i} {{<<: [{', '.join([f'*b{i - 1}'] * 9)}]}}" for i in range(1, 6)]
    texts = {
        "ten thousand million laughs": "\n".join(lines),
        "merged mappings of merged mappings": "\n".join(merges),
        "a list in itself": "name: &a [*a]",
        "a mapping in itself": "&a\nname: *a",
        "a mapping as its own key": "? &a {*a : 1}\n: 2",
        "a deep list": "name: " + "[" * 20_000,
        "a deep mapping": "{a: " * 20_000,
        "os.system by a tag": f"name: !!python/object/apply:os.system ['mkdir {SENTINEL}']",
        "eval by a tag": f"name: !!python/object/apply:builtins.eval [\"__import__('os').mkdir('{SENTINEL}')\"]",
        "a new object by a tag": "name: !!python/object/new:type {args: [x, [], {}]}",
        "a module by a tag": "name: !!python/module:os",
        "a name by a tag": "name: !!python/name:os.system",
        "a date that is none": "name: 2024-99-99",
        "an unknown anchor": "name: *nothing",
        "a binary that is none": "name: !!binary '@@@'",
        "two documents": "name: a\n---\nname: b",
        "a tab": "name:\n\t- x",
        "a null byte": "name: \0",
        "a number of a million digits": "seeds: [" + "9" * 1_000_000 + "]",
        "a float that is none": "checkpoint_seconds: !!float abc",
        "an integer that is none": "seeds: !!int abc",
        "a list for a key": "? [a, b]\n: 1",
    }
    for what, text in texts.items():
        yield Case("configuration", what, text.encode())
    target = next(iter(plain["targets"].values()))
    theta = next(iter(plain["pretrain"].values()))
    finder = next(iter(plain["find"].values()))
    changes: dict[str, Any] = {
        "a name that leads elsewhere": {"name": "../../escaped"},
        "a name of the root": {"name": "/escaped"},
        "a name that is a dot": {"name": ".."},
        "an empty name": {"name": ""},
        "a name that is a number": {"name": 3},
        "a name with a null": {"name": "a\0b"},
        "a label that leads elsewhere": {"pretrain": {"../../escaped": theta}},
        "a finder that leads elsewhere": {"find": {"../escaped": finder}},
        "a target that leads elsewhere": {"targets": {"/escaped": target}},
        "a regime that leads elsewhere": {
            "targets": {"t": {**target, "recipes": {"../../../escaped": next(iter(target["recipes"].values()))}}}
        },
        "rounds of NaN": {"rounds": [float("nan")]},
        "a million rounds": {"find": {"f": {**finder, "rounds": 10**18}}},
        "seeds that are texts": {"seeds": ["a", "b"]},
        "a radius of infinity": {"evaluation": {"eps": float("inf")}},
        "a radius that is code": {"evaluation": {"eps": "__import__('os').mkdir('executed')"}},
        "a radius over zero": {"evaluation": {"eps": "8/0"}},
        "a radius of a billion digits": {"evaluation": {"eps": "1e999999999"}},
        "an unknown key": {"nmae": 1},
        "data that are a list": {"source": [1, 2]},
        "a model that is nothing": {"model": None},
        "a class for a model": {"model": {"class_path": "os.system", "init_args": {"command": f"mkdir {SENTINEL}"}}},
        "a class for a recipe": {"pretrain": {"A": {"recipe": {"class_path": "subprocess.Popen", "init_args": {}}}}},
    }
    for what, change in changes.items():
        yield Case("configuration", what, yaml.safe_dump({**plain, **change}).encode())


# --- verdicts


def verdict_header() -> dict[str, Any]:
    return {"model": "x", "stages": [{"attack": "pgd", "eps": "0.1"}, {"attack": "square", "eps": "0.1"}]}


def verdict_files(folder: Path) -> Iterator[Case]:
    count = 20
    whole, zero = torch.arange(count), torch.zeros(count)
    rows = Verdicts(
        id=whole, label=whole % 3, clean_prediction=whole % 3, broken_by=torch.where(whole % 2 == 0, 0, UNBROKEN),
        step=whole, next_stage=torch.ones_like(whole), linf=zero, l2=zero, l1=zero, margin=zero, forward=whole,
        backward=whole, queries=whole,
    )  # fmt: skip
    file = VerdictFile(folder / "verdicts.csv", verdict_header())
    file.finish(rows)
    good = (folder / "verdicts.csv").read_bytes()
    for what, spoiled in [*cut(good, 12), *flipped(good, 20, first=600), *shuffled(good, 9)]:
        yield Case("verdicts", what, spoiled, sound=None)
    for what, content in strangers().items():
        yield Case("verdicts", what, content)
    first, columns, *lines = good.decode().splitlines()
    row = lines[3].split(",")

    def with_row(index: int, text: str) -> bytes:
        changed = ",".join([*row[:index], text, *row[index + 1 :]])
        return "\n".join([first, columns, *lines[:3], changed, *lines[4:], ""]).encode()

    for index, name in enumerate(columns.split(",")):
        for what, text in {"no number": "abc", "2**70": str(1 << 70), "5,000 digits": "9" * 5000}.items():
            real = name in ("linf", "l2", "l1", "margin") and what != "no number"
            yield Case("verdicts", f"{name} is {what}", with_row(index, text), sound=real)
    headers = {
        "no JSON": "{", "a list": "[1]", "null": "null", "no stages": "{}", "stages of numbers": '{"stages":[1]}',
        "deep JSON": "[" * 100_000, "a stage without eps": '{"stages":[{"attack":"pgd"}]}',
        "an eps that is none": '{"stages":[{"attack":"pgd","eps":"abc"},{"attack":"square","eps":"abc"}]}',
        "an eps of NaN": '{"stages":[{"attack":"pgd","eps":NaN}]}',
        "a stage with a comma": '{"stages":[{"attack":"a,b","eps":"1"}]}',
        "stages that are a mapping": '{"stages":{"attack":"pgd","eps":"1"}}',
    }  # fmt: skip
    for what, text in headers.items():
        changed = "\n".join([f"# sparse-robust verdicts 1 {text}", columns, *lines, ""])
        yield Case("verdicts", f"header: {what}", changed.encode())
    later = good.replace(b"verdicts 1 ", b"verdicts 99999999999999999999 ", 1)
    yield Case("verdicts", "a version of the future", later)
    yield Case("verdicts", "an image twice", "\n".join([first, columns, *lines, lines[0], ""]).encode())
    yield Case("verdicts", "no rows", "\n".join([first, columns, ""]).encode())
    yield Case("verdicts", "a line of 10 MB", "\n".join([first, columns, "1," * 5_000_000, ""]).encode())


# --- studies


def studies(folder: Path) -> Iterator[Case]:
    study = {"name": "s", "config": {}, "machine": {}, "cells": ["pretrain-STD"], "notes": []}
    good = json.dumps(study).encode()
    for what, spoiled in [*cut(good, 6), *flipped(good, 10)]:
        yield Case("study", what, spoiled, sound=None)
    for what, content in strangers().items():
        yield Case("study", what, content, sound=what == "json")
    changes: dict[str, Any] = {
        "cells that lead elsewhere": {"cells": ["../../../escaped", "/etc/passwd"]},
        "a cell of nulls": {"cells": ["\0"]},
        "cells that are numbers": {"cells": [1, 2]}, "cells that are a text": {"cells": "abc"},
        "cells that are a number": {"cells": 3}, "notes that are a number": {"notes": 3},
    }  # fmt: skip
    for what, change in changes.items():
        yield Case("study", what, json.dumps({**study, **change}).encode())
    yield Case("study", "a cell of a long name", json.dumps({**study, "cells": ["a" * 10_000]}).encode(), sound=True)
    yield Case("study", "a deep list", b"[" * 100_000)
    yield Case("study", "NaN", b'{"name": NaN}')

"""Writes the report: one self-contained page, its machine-readable twin, and the pictures beside them."""

from __future__ import annotations

import base64
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from sparse_robust.files import atomic_write, commit_folder, recover_folder, write_json, write_text
from sparse_robust.study.compare import signed
from sparse_robust.study.criterion import Criterion
from sparse_robust.study.report.curves import machine_line
from sparse_robust.study.report.figures import draw_all
from sparse_robust.study.report.style import Picture
from sparse_robust.study.report.tables import assemble
from sparse_robust.study.report.words import duration, finder_name, plural, regime_name, target_name
from sparse_robust.study.results import load_results

PAGE, TWIN = "index.html", "report.json"


def write_report(folder: str | Path, criterion: Criterion | None = None) -> Path:
    """Write ``report/`` into a study folder from what is finished there, and return the page.

    The folder holds ``index.html`` (one file, nothing else is needed to read it), ``report.json`` (every number shown)
    and each picture as PNG and SVG. It is replaced as a whole; the same results give the same bytes.

    Args:
        folder: a study folder, finished or not.
        criterion: what counts as a win; by default strict, c = 1, against the same pre-training's dense model.

    Raises:
        FileError: if the folder is no study, or the report cannot be written.
    """
    results = load_results(folder)
    report = assemble(results, criterion)
    pictures = draw_all(report, results)
    report["figures"] = [
        {"name": p.name, "title": p.title, "caption": p.caption, "files": [f"{p.name}.svg", f"{p.name}.png"]}
        for p in pictures
    ]
    page = render_page(report, pictures)
    target = Path(folder) / "report"
    recover_folder(target)
    new = target.with_name(target.name + ".new")
    for picture in pictures:
        atomic_write(new / f"{picture.name}.png", partial(Path.write_bytes, data=picture.png))
        atomic_write(new / f"{picture.name}.svg", partial(Path.write_bytes, data=picture.svg))
    write_json(new / TWIN, report)
    write_text(new / PAGE, page)
    commit_folder(new, target)
    return target / PAGE


def render_page(report: dict[str, Any], pictures: list[Picture]) -> str:
    """Return the page for a report with its pictures. It shows nothing that ``report`` does not hold."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "points": lambda v: "–" if v is None else signed(v),
        "percent": lambda v, digits=1: "–" if v is None else f"{v:.{digits}f}",
        "accuracy": _accuracy,
        "duration": duration,
        "finder": finder_name,
        "regime": regime_name,
        "plural": plural,
        "yaml": lambda v: yaml.safe_dump(v, sort_keys=False, allow_unicode=True, width=100),
    }
    environment.globals |= {"place_name": target_name, "machine": machine_line(report["machine"])}
    template = environment.from_string(
        resources.files("sparse_robust.study").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    )
    return template.render(report=report, images={p.name: _data_uri(p) for p in pictures}, layout=_layout(report))


def _data_uri(picture: Picture) -> str:
    """Embed drawings as SVG and photographs as PNG, which browsers do not blur."""
    photo = picture.name.startswith("examples")
    kind, content = ("image/png", picture.png) if photo else ("image/svg+xml", picture.svg)
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _accuracy(value: dict[str, Any] | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:.1f}" + (f" ± {value['std']:.1f}" if value["std"] is not None else "")


def _layout(report: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of the page's wide tables: their columns, and rows looked up by column."""
    rounds = dict(sorted((p["k"], p["sparsity"]) for s in report["curves"] for p in s["points"] if p["k"]))
    accuracy = [
        {
            **series,
            "by_round": {p["k"]: p for p in series["points"]},
            "name": target_name(series["target"], series["fraction"]),
        }
        for series in report["curves"]
    ]
    margins = []
    for row in report["double_win"]:
        for index, (metric, regime) in enumerate(report["criterion"]["requires"]):
            matches = {r["k"]: r["matches"][index] for r in row["rounds"]}
            margins.append({**row, "metric": metric, "regime": regime, "by_round": matches})
    main = report["main_finder"]
    tickets = [t for t in report["densities"] if t["finder"] == main]
    layers = [name for name, _, _ in tickets[0]["layers"]] if tickets else []
    shared = [o for o in report["overlaps"] if o["a"][1] == o["b"][1] == main or o["a"][0] == o["b"][0]]
    return {
        "rounds": rounds,
        "accuracy": accuracy,
        "margins": margins,
        "tickets": tickets,
        "layers": layers,
        "shared": shared,
        "attacks": list(dict.fromkeys(name for row in report["ranking"] for name in list(row["attacks"])[:-1])),
    }

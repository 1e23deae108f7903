"""The report: complete, self-contained, the same every time, and its sentences follow the numbers."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sparse_robust.errors import FileError
from sparse_robust.study.criterion import Criterion
from sparse_robust.study.report import write_report
from sparse_robust.study.report.tables import assemble
from sparse_robust.study.results import load_results
from sparse_robust.study.verdict import sparsity_label
from tests.study.synthetic import Synthetic, expected

PICTURES = [
    "accuracy",
    "double-win",
    "examples-fashion",
    "examples-digits",
    "densities",
    "overlap",
    "overlap-curves",
    "time",
]
VOID = {"meta", "img", "br", "link"}


def made(folder: Path, study: Synthetic | None = None, **options: Any) -> tuple[str, dict[str, Any]]:
    """Write a study and its report; return the page and its twin."""
    page = write_report((study or Synthetic(examples=False, rounds=(2, 8))).write(folder), **options)
    assert page == folder / "report" / "index.html"
    return page.read_text(encoding="utf-8"), json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))


def assembled(folder: Path, study: Synthetic, criterion: Criterion | None = None) -> dict[str, Any]:
    """The twin alone, without drawing anything."""
    found: dict[str, Any] = json.loads(json.dumps(assemble(load_results(study.write(folder)), criterion)))
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study like the quickstart's, with its report."""
    folder = tmp_path_factory.mktemp("quick")
    made(folder, Synthetic(rounds=(4, 8, 12)))
    return folder


@pytest.fixture(scope="module")
def page(quick: Path) -> str:
    return (quick / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def twin(quick: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((quick / "report" / "report.json").read_text(encoding="utf-8"))
    return found


def finding(twin: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(f for f in twin["findings"] if f["id"] == name)
    return found


def text_of(page: str) -> str:
    """The words of a page, without markup, styles and pictures."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


class Structure(HTMLParser):
    """Checks that every tag is closed, and collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [str(value) for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# --- files


def test_every_picture_is_there_in_both_formats(quick: Path, twin: dict[str, Any]) -> None:
    assert [f["name"] for f in twin["figures"]] == PICTURES
    folder = quick / "report"
    expected_files = {"index.html", "report.json", *(f"{p}.{end}" for p in PICTURES for end in ("png", "svg"))}
    assert {p.name for p in folder.iterdir()} == expected_files
    for name in PICTURES:
        with Image.open(folder / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 250
            assert len(image.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 5
        svg = (folder / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.rstrip().endswith("</svg>")


def test_the_page_is_one_file(quick: Path, page: str) -> None:
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert not structure.tags & {"script", "link", "iframe", "object"}
    assert structure.references
    assert all(r.startswith("data:image/") for r in structure.references)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert "url(" not in page
    assert "@import" not in page


def test_the_pictures_in_the_page_are_those_beside_it(quick: Path, page: str) -> None:
    structure = Structure()
    structure.feed(page)
    assert len(structure.images) == len(PICTURES)
    for name, image in zip(PICTURES, structure.images, strict=True):
        kind, _, content = str(image["src"]).removeprefix("data:image/").partition(";base64,")
        ending = {"svg+xml": "svg", "png": "png"}[kind]
        assert base64.b64decode(content) == (quick / "report" / f"{name}.{ending}").read_bytes()
        assert image["alt"]


def test_each_picture_has_a_one_sentence_caption(twin: dict[str, Any], page: str) -> None:
    words = text_of(page)
    for figure in twin["figures"]:
        assert figure["caption"].endswith(".")
        assert figure["caption"] in words
        assert figure["title"] in words


def test_the_same_results_give_the_same_bytes(quick: Path, tmp_path: Path) -> None:
    """Also in another folder, and whatever the user's own plot style is; that one is left as it was."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "svg.hashsalt": "other", "savefig.dpi": 20}):
        made(tmp_path, Synthetic(rounds=(4, 8, 12)))
        assert matplotlib.rcParams["font.size"] == 31
    for file in sorted((quick / "report").iterdir()):
        assert file.read_bytes() == (tmp_path / "report" / file.name).read_bytes(), file.name


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    made(tmp_path, Synthetic(examples=False, rounds=(2,), targets=("digits",)))
    before = {p.name: p.read_bytes() for p in (tmp_path / "report").iterdir()}
    (tmp_path / "report" / "left-over.png").write_bytes(b"old")
    (tmp_path / "report.new").mkdir()  # a report that was killed while it was written
    write_report(tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "report").iterdir()} == before
    assert not (tmp_path / "report.new").exists()


# --- content


def test_numbers_of_the_tables_are_in_the_twin(page: str, twin: dict[str, Any]) -> None:
    shown = set()
    for series in twin["curves"]:
        for point in series["points"]:
            for metric in ("sa", "ra"):
                shown.add(f"{point[metric]['mean']:.1f}")
    rows = re.search(r'id="accuracy-table".*?</section>', page, flags=re.S)
    assert rows
    cells = [c.split("<")[0] for c in rows[0].split("<td>")[1:]]
    numbers = [n for cell in cells for n in re.findall(r"\d+\.\d", cell)]
    assert len(numbers) == 2 * sum(len(s["points"]) for s in twin["curves"])
    assert set(numbers) <= shown


def test_single_seed_is_said_wherever_it_applies(page: str, twin: dict[str, Any]) -> None:
    assert twin["seeds_label"] == "single seed"
    assert all(row["seeds_label"] == "single seed" for row in twin["double_win"])
    assert twin["criterion"]["label"] == "strict, c = 0"
    assert "single seed" in finding(twin, "double-win/fashion/1")["sentence"]
    assert any(limit.startswith("Single seed") for limit in twin["limits"])
    table = re.search(r'id="double-win-table".*?</section>', page, flags=re.S)
    assert table
    assert table[0].count("single seed") >= len(twin["double_win"])


def test_three_seeds_and_two_fractions(tmp_path: Path) -> None:
    study = Synthetic(seeds=(0, 1, 2), fractions=(1.0, 0.1), rounds=(4, 8), targets=("fashion",), examples=False)
    page, twin = made(tmp_path, study)
    assert twin["seeds_label"] == "3 seeds"
    assert twin["criterion"]["label"] == "strict, c = 1"
    assert [p["name"] for p in twin["places"]] == ["fashion", "fashion (10 % of its data)"]
    assert "single seed" not in text_of(page).lower()
    assert all(p["sa"]["std"] is not None for s in twin["curves"] for p in s["points"])
    assert "±" in text_of(page)
    assert finding(twin, "robust-pretraining/fashion/0.1/AT/AT")["numbers"]["seeds"] == 3


def test_the_table_says_which_predicate_it_uses(tmp_path: Path) -> None:
    option = "lenient"
    page, twin = made(tmp_path, Synthetic(examples=False, rounds=(2,)), criterion=Criterion(option, c=0.5))
    assert twin["criterion"]["predicate"] == option
    assert f"A ticket wins ({option}" in text_of(page)
    assert twin["criteria"]["columns"][:3] == ["strict", "lenient", "literal"]


@pytest.mark.acceptance("double-win", "A-34")
def test_sparsities_are_printed_as_the_papers_print_them(tmp_path: Path) -> None:
    study = Synthetic(rounds=(6, 7, 8, 10, 11, 15), targets=("fashion",), thetas=("AT",), examples=False)
    page, twin = made(tmp_path, study)
    labels = {r["k"]: f"{r['sparsity']:.2f}" for row in twin["double_win"] for r in row["rounds"]}
    assert labels == {k: sparsity_label(k) for k in (6, 7, 8, 10, 11, 15)}
    for printed in ("73.79", "79.03", "83.22", "89.26", "91.41", "96.48"):
        assert f"{printed} %" in text_of(page)


@pytest.mark.acceptance("double-win", "A-35")
def test_chance_levels_are_printed(page: str, twin: dict[str, Any]) -> None:
    row = next(o for o in twin["overlaps"] if o["k"] == 8)
    assert row["chance"] == pytest.approx(0.092, abs=0.001)
    assert f"{row['chance']:.3f}" in text_of(page)
    caption = next(f["caption"] for f in twin["figures"] if f["name"] == "overlap")
    assert re.search(r"random masks of this density have 0\.\d{3}", caption)


def test_thin_layers_are_shown(tmp_path: Path) -> None:
    folder = Synthetic(examples=False, rounds=(2,)).write(tmp_path)
    path = folder / "cells" / "find-AT-imp-st" / "result.json"
    data = json.loads(path.read_text())
    data["tickets"][-1]["layers"][0]["kept"] = 0
    path.write_text(json.dumps(data))
    page = write_report(folder).read_text(encoding="utf-8")
    assert "AT, IMP, k = 2: conv1.weight is empty" in text_of(page)


def test_the_examples_name_the_classes(twin: dict[str, Any]) -> None:
    shown = [e for e in twin["examples"] if e["target"] == "fashion"]
    assert [e["theta"] for e in shown] == ["STD", "FAT", "AT"]
    assert {(e["finder"], e["k"], e["regime"]) for e in shown} == {("imp-st", 12, "AT")}
    assert [i["label"] for i in shown[0]["images"]][:2] == ["Ankle boot", "Pullover"]
    fooled = [sum(i["label"] != i["adversarial_prediction"] for i in e["images"]) for e in shown]
    assert fooled == [4, 0, 0]
    assert all(i["largest_change"] <= 0.1 + 1e-6 for e in shown for i in e["images"])


def test_text_from_the_study_is_not_markup(tmp_path: Path) -> None:
    study = Synthetic(examples=False, rounds=(2,), config={"description": "<script>alert(1)</script> & more"})
    page, _ = made(tmp_path, study)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


# --- studies that are not whole


@pytest.mark.parametrize(
    "study",
    [
        pytest.param(Synthetic(thetas=("AT",), rounds=(2,), examples=False), id="one-pretraining"),
        pytest.param(Synthetic(regimes=("ST",), rounds=(2,), examples=False), id="one-regime"),
        pytest.param(Synthetic(finders=("random",), rounds=(2,), examples=False), id="random-only"),
        pytest.param(Synthetic(finders=("imp-st",), rounds=(2,), examples=False), id="no-random"),
        pytest.param(Synthetic(test_images=None, rounds=(2,), examples=False), id="no-test-size"),
        pytest.param(
            Synthetic(finders=("imp-st", "imp-at", "oneshot", "random"), rounds=(2, 9), targets=("digits",)),
            id="four-finders",
        ),
    ],
)
def test_other_shapes_of_studies(tmp_path: Path, study: Synthetic) -> None:
    page, twin = made(tmp_path, study)
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert len(structure.images) == len(twin["figures"]) >= 3
    assert twin["warnings"] == []


def test_one_regime_is_not_decided_and_not_a_loss(tmp_path: Path) -> None:
    twin = assembled(tmp_path, Synthetic(regimes=("ST",), rounds=(2,), examples=False))
    assert {row["label"] for row in twin["double_win"]} == {"not decided"}
    assert all("under AT transfer" in row["undecided"]["2"] for row in twin["double_win"])
    assert finding(twin, "double-win/fashion/1")["holds"] is None


def test_a_partial_study_lists_what_is_pending(tmp_path: Path) -> None:
    folder = Synthetic(examples=False, rounds=(2, 4)).write(tmp_path)
    gone = [p for p in sorted(folder.glob("cells/transfer-*/result.json")) if "AT-s0" in str(p) and "digits" in str(p)]
    for path in gone[1:]:
        path.unlink()
    gone[0].write_text("{")
    page = write_report(folder).read_text(encoding="utf-8")
    twin = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert twin["cells"]["done"] == twin["cells"]["all"] - len(gone)
    assert {p["cell"] for p in twin["cells"]["pending"]} == {p.parent.name for p in gone}
    assert sum(p["problem"] is not None for p in twin["cells"]["pending"]) == 1
    for path in gone:
        assert path.parent.name in page
    open_rows = [row for row in twin["double_win"] if row["target"] == "digits"]
    assert open_rows
    assert all(row["label"] == "not decided" for row in open_rows)
    assert all(row["label"] != "not decided" for row in twin["double_win"] if row["target"] == "fashion")


@pytest.mark.parametrize("kept", ["pretrain-*", "find-*", "nothing"])
def test_a_study_that_has_only_begun(tmp_path: Path, kept: str) -> None:
    folder = Synthetic(examples=False, rounds=(2,)).write(tmp_path)
    keep = set(folder.glob(f"cells/{kept}/result.json"))
    for path in set(folder.glob("cells/*/result.json")) - keep:
        path.unlink()
    page = write_report(folder).read_text(encoding="utf-8")
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert "are still pending" in page
    assert load_results(folder).transfer == ()


def test_damaged_files_beside_the_results_are_reported(tmp_path: Path) -> None:
    folder = Synthetic(rounds=(2,), targets=("fashion",)).write(tmp_path)
    (folder / "cells" / "find-FAT-random" / "tickets" / "k02.safetensors").write_bytes(b"x")
    (folder / "cells" / "transfer-AT-imp-st-k02-fashion-1-AT-s0" / "examples.safetensors").write_bytes(b"x")
    write_report(folder)
    twin = json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    assert len(twin["warnings"]) == 2
    assert "FAT, random, k = 2" in twin["warnings"][0]
    assert "cannot be read and is not shown" in twin["warnings"][1]
    assert not any(str(tmp_path) in w for w in twin["warnings"])
    assert [e["theta"] for e in twin["examples"]] == ["STD", "FAT"]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        pytest.param({"mask_digest": "0" * 64}, "is not that of ticket k = 2", id="another-mask"),
        pytest.param({"sa": 40.0, "ra": 60.0}, "so the attack did not work", id="more-accurate-under-attack"),
    ],
)
def test_results_that_contradict_themselves(tmp_path: Path, change: dict[str, Any], warning: str) -> None:
    folder = Synthetic(examples=False, rounds=(2,)).write(tmp_path)
    path = folder / "cells" / "transfer-AT-imp-st-k02-digits-1-AT-s0" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert warning in text_of(write_report(folder).read_text(encoding="utf-8"))


def test_a_folder_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is not a study folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- findings follow the numbers

Law = Callable[[str, str, str, int, str, str], float]


def with_law(law: Law, **other: Any) -> Synthetic:
    return Synthetic(law=law, examples=False, rounds=(8, 12), targets=("fashion",), noise=0.0, **other)


def mirrored(metric: str, theta: str, finder: str, k: int, target: str, regime: str) -> float:
    """The other way round: standard pre-training is the robust one, and random masks beat IMP."""
    theta = {"STD": "AT", "AT": "STD"}.get(theta, theta)
    finder = {"imp-st": "random", "random": "imp-st"}.get(finder, finder)
    return expected(metric, theta, finder, k, target, regime)


def level(metric: str, theta: str, finder: str, k: int, target: str, regime: str) -> float:
    """No difference anywhere."""
    return 80.0 if metric == "sa" else 40.0


def test_findings_of_the_usual_case(twin: dict[str, Any]) -> None:
    robust = finding(twin, "robust-pretraining")
    assert robust["holds"] is True
    assert "8 of 8 comparisons" in robust["sentence"]
    masks = finding(twin, "masks/fashion/1/imp-st")
    assert masks["holds"] is True
    assert "On fashion, IMP tickets beat random masks" in masks["sentence"]
    easy = finding(twin, "masks/digits/1/imp-st")
    assert easy["holds"] is None
    assert "do not clearly beat random masks" in easy["sentence"]
    assert "A known reason" in easy["sentence"]
    assert "A known reason" not in masks["sentence"]


def test_tickets_that_win_in_part_are_not_explained_away(tmp_path: Path) -> None:
    """With clean accuracies level and robust ones clearly higher, nothing was learned anew."""

    def robust_only(metric: str, theta: str, finder: str, k: int, target: str, regime: str) -> float:
        return 80.0 if metric == "sa" else expected(metric, theta, finder, k, target, regime)

    masks = finding(assembled(tmp_path, with_law(robust_only)), "masks/fashion/1/imp-st")
    assert masks["holds"] is None and masks["numbers"]["tally"]["higher"] and not masks["numbers"]["tally"]["lower"]
    assert "do not clearly beat random masks everywhere" in masks["sentence"]
    assert "A known reason" not in masks["sentence"]


def test_findings_flip_with_the_numbers(tmp_path: Path) -> None:
    twin = assembled(tmp_path, with_law(mirrored))
    robust = finding(twin, "robust-pretraining/fashion/1/AT/AT")
    assert robust["holds"] is False
    assert "points less robust accuracy than STD pre-training" in robust["sentence"]
    assert robust["numbers"]["difference"] < -15
    assert finding(twin, "robust-pretraining")["holds"] is False
    masks = finding(twin, "masks/fashion/1/imp-st")
    assert masks["holds"] is False
    assert "random masks do better than IMP tickets" in masks["sentence"]
    assert "A known reason" in masks["sentence"]


def test_no_difference_is_called_that(tmp_path: Path) -> None:
    twin = assembled(tmp_path, with_law(level))
    for name in ("robust-pretraining/fashion/1/AT/AT", "masks/fashion/1/imp-st/AT/RA_AT"):
        found = finding(twin, name)
        assert found["holds"] is None
        assert "no clear difference" in found["sentence"]
    assert finding(twin, "robust-pretraining")["holds"] is None
    assert finding(twin, "double-win/fashion/1")["numbers"]["k_max"] == {"STD": 12, "FAT": 12, "AT": 12}


@pytest.mark.parametrize(("images", "clear"), [(200, False), (5000, True)])
def test_two_standard_errors_decide(tmp_path: Path, images: int, clear: bool) -> None:
    def law(metric: str, theta: str, finder: str, k: int, target: str, regime: str) -> float:
        return level(metric, theta, finder, k, target, regime) + (4.0 if theta == "AT" and metric == "ra" else 0.0)

    twin = assembled(tmp_path, with_law(law, test_images=images))
    found = finding(twin, "robust-pretraining/fashion/1/AT/AT")
    assert found["numbers"]["difference"] == pytest.approx(4.0)
    assert found["holds"] is (True if clear else None)
    assert f"binomial standard error of {images:,} test images" in found["sentence"]


def test_without_an_error_nothing_is_claimed(tmp_path: Path) -> None:
    twin = assembled(tmp_path, with_law(expected, test_images=None))
    found = finding(twin, "robust-pretraining/fashion/1/AT/AT")
    assert found["holds"] is None
    assert "the size of the test set is not recorded" in found["sentence"]


def test_extremes_with_one_seed_settle_nothing_and_with_three_do(tmp_path: Path) -> None:
    def law(metric: str, theta: str, finder: str, k: int, target: str, regime: str) -> float:
        last = {"STD": 8, "FAT": 8, "AT": 12}[theta]
        return 80.0 if k <= last else 70.0

    single = assembled(tmp_path / "single", with_law(law))
    found = finding(single, "double-win/fashion/1")
    assert found["numbers"]["k_max"] == {"STD": 8, "FAT": 8, "AT": 12}
    assert found["holds"] is None
    assert "settles nothing" in found["sentence"]
    three = assembled(tmp_path / "three", with_law(law, seeds=(0, 1, 2)))
    found = finding(three, "double-win/fashion/1")
    assert found["holds"] is True
    assert "The published order AT, FAT, STD holds here." in found["sentence"]


def test_only_one_pretraining_cannot_be_compared(tmp_path: Path) -> None:
    twin = assembled(tmp_path, with_law(expected, thetas=("AT",)))
    found = finding(twin, "robust-pretraining")
    assert found["holds"] is None
    assert "not decided" in found["sentence"]


def test_finders_are_compared_in_pairs(tmp_path: Path) -> None:
    twin = assembled(tmp_path, with_law(expected, finders=("imp-st", "imp-at", "random")))
    for metric in ("SA", "RA"):
        found = finding(twin, f"imp-regime/{metric}")
        assert found["holds"] is True
        assert found["numbers"]["pairs"] == 12
        assert "no clear difference" in found["sentence"]

"""A whole study on a tiny network: what it leaves, that it resumes, that its rows mean what they say."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.soak import disturbed, leftovers
from sparse_robust.cli import main
from sparse_robust.files import sha256_state
from sparse_robust.models import load_model
from sparse_robust.pruning import prune, survivors
from sparse_robust.tickets import Ticket
from tests.study.mini import differences, rows, write_mini


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    out = folder / "out"
    assert main(["study", "run", "--config", str(write_mini(folder)), "--out", str(out), "--quiet"]) == 0
    return out


def of_kind(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in rows(out).values() if row["kind"] == kind]


def test_it_leaves_everything_and_nothing_more(finished: Path) -> None:
    study = json.loads((finished / "study.json").read_text())
    assert set(rows(finished)) == set(study["cells"])
    assert (finished / "report" / "index.html").stat().st_size > 10_000
    assert (
        not list(finished.rglob("checkpoint*"))
        and not list(finished.rglob("round-*"))
        and not list(finished.rglob("*.tmp"))
    )
    assert study["machine"]["cpu"] is not None and study["config"]["seeds"] == [0]


@pytest.mark.acceptance("double-win", "A-5")
def test_ticket_one_is_the_same_for_both_regimes_and_equals_one_cut(finished: Path) -> None:
    for theta in ("STD", "AT"):
        found = {row["finder"]: row for row in of_kind(finished, "find") if row["theta"] == theta}
        first = {name: row["tickets"][0]["digest"] for name, row in found.items() if name != "random"}
        weights = next(finished.glob(f"cells/pretrain-{theta}-*/weights.safetensors"))
        model = load_model(weights)
        count = survivors(found["imp-st"]["tickets"][0]["numel"], 0.2, 1)
        assert set(first.values()) == {prune(model, count=count).digest()}


@pytest.mark.acceptance("double-win", "A-2")
def test_tickets_are_nested_exact_and_belong_to_their_weights(finished: Path) -> None:
    for row in of_kind(finished, "find"):
        masks = [Ticket.load(finished / ticket["file"]).masks for ticket in row["tickets"]]
        assert [m.count() for m in masks] == [survivors(masks[0].numel(), 0.2, k) for k in range(1, len(masks) + 1)]
        if row["finder"] != "random":
            assert all(later <= earlier for earlier, later in zip(masks, masks[1:], strict=False))
        weights = next(finished.glob(f"cells/pretrain-{row['theta']}-*/weights.safetensors"))
        model = load_model(weights)
        for ticket in row["tickets"]:
            Ticket.load(finished / ticket["file"]).verify(model)
            assert ticket["digest"] == Ticket.load(finished / ticket["file"]).masks.digest()


def test_random_tickets_have_the_layer_counts_of_the_ones_they_copy(finished: Path) -> None:
    for theta in ("STD", "AT"):
        found = {row["finder"]: row for row in of_kind(finished, "find") if row["theta"] == theta}
        for mine, theirs in zip(found["random"]["tickets"], found["imp-st"]["tickets"], strict=True):
            assert mine["layers"] == theirs["layers"] and mine["digest"] != theirs["digest"]


@pytest.mark.acceptance("double-win", "A-13")
def test_transfers_keep_the_tickets_mask(finished: Path) -> None:
    digests = {
        (row["theta"], row["finder"], ticket["k"]): (ticket["digest"], ticket["count"])
        for row in of_kind(finished, "find")
        for ticket in row["tickets"]
    }
    sparse = [row for row in of_kind(finished, "transfer") if row["k"]]
    assert sparse
    for row in sparse:
        assert (row["mask_digest"], row["survivors"]) == digests[row["theta"], row["finder"], row["k"]]


@pytest.mark.acceptance("double-win", "A-30")
def test_transfers_report_best_and_last(finished: Path) -> None:
    for row in of_kind(finished, "transfer"):
        expected = {"best_sa", "last"} | ({"best_ra"} if row["regime"] == "AT" else set())
        assert set(row["checkpoints"]) == expected
        assert row["headline"] == ("best_ra" if row["regime"] == "AT" else "best_sa")
        assert row["sa"] == row["checkpoints"][row["headline"]]["sa"]
        assert 0 <= row["ra"] <= row["sa"] <= 100 and row["test_images"] == 60


def test_running_again_does_nothing(finished: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.glob("cells/*/*") if file.is_file()}
    assert main(["study", "run", "--config", str(write_mini(tmp_path)), "--out", str(finished), "--quiet"]) == 0
    assert {file: file.stat().st_mtime_ns for file in finished.glob("cells/*/*") if file.is_file()} == before


def test_a_finished_study_keeps_the_machine_its_results_come_from(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    file = out / "study.json"
    study = json.loads(file.read_text())
    file.write_text(json.dumps({**study, "machine": {**study["machine"], "cpu": "another"}}))
    assert main(["study", "run", "--config", str(write_mini(tmp_path)), "--out", str(out), "--quiet"]) == 0
    assert json.loads(file.read_text())["machine"]["cpu"] == "another"


@pytest.mark.slow
@pytest.mark.acceptance("double-win", "A-37", "A-41")
def test_workers_killed_at_random_moments_end_the_same(finished: Path, tmp_path: Path) -> None:
    """The soak of `make soak`, with a few kills."""
    out, deadline = tmp_path / "out", time.monotonic() + 600
    soak = disturbed(write_mini(tmp_path), out, kills=4, workers=2, seed=0, deadline=deadline)
    assert (soak.kills, soak.finished, soak.faults) == (4, True, [])
    assert differences(out, finished) + leftovers(out) == []


@pytest.mark.acceptance("double-win", "A-15")
def test_transfer_starts_from_the_pretrained_values(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparse_robust.study import stages

    started: list[dict[str, torch.Tensor]] = []
    original = stages.Context.train

    def spy(self: Any, model: torch.nn.Module, data: Any, recipe: Any, *, masks: Any, **rest: Any) -> Any:
        masks.apply_(model)
        started.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return original(self, model, data, recipe, masks=masks, **rest)

    monkeypatch.setattr(stages.Context, "train", spy)
    weights = next(finished.glob("cells/pretrain-AT-*/weights.safetensors"))
    ticket = next(finished.glob("cells/find-AT-imp-st-*/tickets/k03.safetensors"))
    arguments = ["transfer", "--out", str(tmp_path / "run"), "--quiet", f"weights={weights}", f"ticket={ticket}"]
    arguments += [
        "data.name=fashion-mnist-target",
        "data.fraction=0.05",
        "recipe.epochs=1",
        "evaluation.images=20",
        "evaluation.steps=1",
    ]
    assert main(arguments) == 0
    theta, masks, (state,) = load_model(weights).state_dict(), Ticket.load(ticket).masks, started
    head = [name for name in state if name.startswith("fc.")]
    assert len(head) == 2 and not torch.equal(state["fc.weight"], theta["fc.weight"])
    for name, tensor in state.items():
        if name in masks:
            assert torch.equal(tensor, torch.where(masks[name], theta[name], torch.zeros(())))
        elif name not in head:
            assert torch.equal(tensor, theta[name]), name
    kept = load_model(tmp_path / "run" / "weights.safetensors").state_dict()
    assert all((kept[name][~masks[name]] == 0).all() for name in masks)
    assert sha256_state(kept) != sha256_state(state)


@pytest.mark.slow
def test_another_evaluation_trains_and_prunes_nothing_anew(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    kept = [*out.glob("cells/pretrain-*/weights.safetensors"), *out.glob("cells/find-*/result.json")]
    before = {file: file.stat().st_mtime_ns for file in kept}
    command = [
        "study",
        "run",
        "--config",
        str(write_mini(tmp_path)),
        "--out",
        str(out),
        "--quiet",
        "evaluation.images=30",
    ]
    assert main(command) == 0
    assert kept and {file: file.stat().st_mtime_ns for file in kept} == before
    assert {row["test_images"] for row in of_kind(out, "pretrain")} == {30}
    theirs = {row["theta"]: row["history"] for row in of_kind(finished, "pretrain")}
    assert {row["theta"]: row["history"] for row in of_kind(out, "pretrain")} == theirs
    listed = json.loads((out / "study.json").read_text())["cells"]
    transfers = [row for name, row in rows(out).items() if name in listed and row["kind"] == "transfer"]
    assert transfers and {row["test_images"] for row in transfers} == {30}

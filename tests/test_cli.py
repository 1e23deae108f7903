"""The command line as a user types it, and what it answers to nonsense."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sparse_robust import __version__
from sparse_robust.cli import main
from tests.command import Run, command_line

NETWORK = ["model.name=resnet10t", "model.kwargs={channels: [4, 6, 8, 10], stem_width: 4}"]
DATA = ["data.name=digits", "data.resize=28", "data.fraction=0.1"]
QUICK = ["recipe.epochs=1", "evaluation.steps=1", "evaluation.images=20", "evaluation.eps=0.1"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return command_line(capsys)


def test_pretrain_find_transfer_evaluate_show_verify(run, tmp_path: Path) -> None:
    assert (
        run(
            "pretrain", "--out", "theta", "--quiet", *NETWORK, *DATA, *QUICK, "recipe.regime=fast", "recipe.eps=0.1"
        ).status
        == 0
    )
    weights = "weights=theta/weights.safetensors"
    found = run("find", "--out", "tickets", "--quiet", weights, *DATA, "find.method=oneshot", "find.rounds=3")
    assert found.status == 0 and "3 tickets" in found.out
    ticket = "tickets/tickets/k03.safetensors"
    moved = run("transfer", "--out", "moved", "--quiet", weights, f"ticket={ticket}", *DATA, *QUICK)
    assert moved.status == 0 and "SA" in moved.out and "RA" in moved.out
    assert (tmp_path / "moved" / "log.jsonl").exists() and not (tmp_path / "moved" / "checkpoint").exists()

    evaluated = run("evaluate", "--out", "numbers", "--quiet", "weights=moved/weights.safetensors", *DATA, *QUICK[1:])
    assert evaluated.status == 0 and evaluated.out.splitlines()[-1].split(":")[1] == moved.out.rstrip().split(":")[1]

    shown = run("ticket", "show", ticket)
    assert shown.status == 0 and "sparsity 48.80 %" in shown.out and "layer1.0.conv1.weight" in shown.out
    assert run("ticket", "verify", ticket, "--weights", "theta/weights.safetensors").status == 0
    wrong = run("ticket", "verify", ticket, "--weights", "moved/weights.safetensors")
    assert wrong.status == 2 and "drawn from weights with sha256" in wrong.err

    again = run("transfer", "--out", "moved", "--quiet", weights, f"ticket={ticket}", *DATA, *QUICK)
    assert again.out == moved.out
    other = run("transfer", "--out", "moved", "--quiet", weights, f"ticket={ticket}", *DATA, *QUICK, "seed=1")
    assert other.status == 2 and "another configuration or other input files (different: seed)" in other.err


def test_without_out_each_configuration_has_a_folder_of_its_own(run, tmp_path: Path) -> None:
    for eps in ("0.1", "0.05", "0.1"):
        command = ["pretrain", "--quiet", *NETWORK, *DATA, *QUICK[:3], f"evaluation.eps={eps}"]
        assert run(*command).status == 0
    assert len(list((tmp_path / "runs").glob("pretrain-*/result.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrain", *NETWORK, "data.nam=digits"], "unknown key in data 'nam'. Did you mean 'name'"),
        (["pretrain", "model.name=resnet19", *DATA, *QUICK], "Did you mean 'resnet18'"),
        (["pretrain", *NETWORK, *QUICK, "data.name=digit"], "Did you mean 'digits'"),
        (["pretrain", *NETWORK, *DATA, "recipe.regime=adverserial"], "Did you mean 'adversarial'"),
        (["pretrain", *NETWORK, *DATA, "recipe.epochs=few"], "recipe.epochs must be of type int, got 'few'"),
        (["pretrain", *NETWORK, *DATA, *QUICK, "evaluation.eps=8"], "8/255"),
        (["pretrain", "model.name=convnext_atto", *DATA, *QUICK], "resize"),
        (["pretrain"], "lacks model, data"),
        (["pretrain", *NETWORK, *DATA], "recipe.regime=fast"),
        (["study", "run", "--config", "quick"], "Did you mean 'quickstart'"),
        (["study", "status", "--out", "nowhere"], "holds no study"),
        (["study", "report"], "say which study"),
        (["find", "weights=absent.safetensors", *DATA], "absent.safetensors"),
        (["ticket", "show", "absent.safetensors"], "absent.safetensors"),
    ],
)
def test_nonsense_is_named_and_nothing_is_trained(run, arguments: list[str], expected: str, tmp_path: Path) -> None:
    answer = run(*arguments)
    assert answer.status in (1, 2)
    assert answer.err.startswith("error: ") and expected in answer.err and "Traceback" not in answer.err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_named_before_training(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    answer = run("study", "run", "--config", "quickstart", "--out", "file/study")
    assert answer.status == 1 and "cannot write into file/study" in answer.err and "--out" in answer.err


def test_a_full_disk_is_named_before_training(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    answer = run("study", "run", "--config", "quickstart", "--out", "study")
    assert answer.status == 1 and "free and this run needs about" in answer.err
    assert not (tmp_path / "study" / "cells").exists()


def test_an_interrupted_run_says_how_to_go_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_robust.study import stages

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "pretrain", interrupt)
    answer = run("study", "run", "--config", "quickstart", "--out", "study", "--quiet")
    assert answer.status == 130 and "What was saved is kept" in answer.err
    assert "run the same command again to go on" in answer.err
    status = run("study", "status", "--out", "study")
    assert status.status == 0 and "0 of" in status.out and "next: pretrain-STD" in status.out
    assert run("study", "report", "--out", "study", "--predicate", "lenient").status == 0
    wrong = run("study", "report", "--out", "study", "--predicate", "strct")
    assert wrong.status == 2 and "Did you mean 'strict'" in wrong.err


def test_an_interrupted_verb_that_keeps_nothing_promises_nothing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_robust.study import doctor

    def interrupt() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    answer = run("doctor")
    assert answer.status == 130 and answer.err == "\ninterrupted at once.\n"


def test_dry_run_lists_cells_and_cost_without_data_or_folder(run, tmp_path: Path) -> None:
    answer = run("study", "run", "--config", "reference", "--dry-run")
    assert answer.status == 0
    assert "find-AT-imp-at" in answer.out and "not counted" in answer.out and "folder:data/imagenet" in answer.out
    assert not list(tmp_path.iterdir())
    assert " ? " in answer.out and "0.00 M" not in answer.out
    assert "checkpoints that are not here: weights/fat_eps4.pt" in answer.out
    quick = run("study", "run", "--config", "quickstart", "--dry-run", "seeds=[0,1]")
    assert quick.status == 0 and "M passes at the most" in quick.out and "-s1-" in quick.out


def test_dry_run_says_how_much_it_cannot_count(run) -> None:
    partly = run("study", "run", "--config", "quickstart", "--dry-run", "targets.digits.data.name=folder:nowhere")
    assert partly.status == 0 and partly.out.count("M + ?") == 2 and "here: folder:nowhere" in partly.out


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("source.name=nosuch", "unknown data set 'nosuch'"),
        ("targets.digits.data.name=digit", "Did you mean 'digits'"),
        ("source.augment=foo", "unknown data augment 'foo'"),
        ("model.name=resnet99", "unknown model 'resnet99'"),
        ("model.num_classes=7", "model.num_classes is 7 and fashion-mnist-source has 10"),
        ("--predicate=foo", "unknown predicate 'foo'"),
        ("--tolerance=-1", "tolerance c"),
        ("--baseline=best", "Did you mean 'best_dense'"),
    ],
)
@pytest.mark.parametrize("action", [["run"], ["submit", "--processes", "2"]])
def test_dry_run_of_a_study_refuses_unknown_names(run, action: list[str], wrong: str, expected: str) -> None:
    answer = run("study", *action, "--config", "quickstart", "--dry-run", wrong)
    assert answer.status == 2 and expected in answer.err and not answer.out


def test_dry_run_of_submit_refuses_what_the_cluster_would(run) -> None:
    command = ["study", "submit", "--config", "quickstart", "--dry-run"]
    assert "unknown engine 'slurn'" in run(*command, "--processes", "2", "--engine", "slurn").err
    assert "--processes must be at least 1" in run(*command, "--processes", "0").err


def test_help_lists_every_predicate_and_presets_for_studies_alone(capsys: pytest.CaptureFixture[str]) -> None:
    from sparse_robust.study.criterion import PREDICATES

    shown = {}
    for verb in (["study", "run"], ["pretrain"]):
        with pytest.raises(SystemExit):
            main([*verb, "--help"])
        shown[verb[0]] = capsys.readouterr().out
    assert ", ".join(PREDICATES) in " ".join(shown["study"].split())
    assert "quickstart" in shown["study"] and "preset" not in shown["pretrain"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pretrain", "--checkpoint-seconds=-5"], "--checkpoint-seconds must be at least 0, got -5"),
        (["study", "run", "--config", "quickstart", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["study", "run", "--config", "quickstart", "--idle-minutes=-1"], "--idle-minutes must be at least 0, got -1"),
        (["study", "run", "--config", "quickstart", "checkpoint_seconds=-5"], "study.checkpoint_seconds must be"),
        (["pretrain", *NETWORK, *DATA, *QUICK, "recipe.optimizer=foo"], "unknown optimizer 'foo'"),
        (["pretrain", *NETWORK, *DATA, *QUICK, "recipe.regime=fast", "recipe.extra={a: 1}"], "recipe.extra, here {'a'"),
    ],
)
def test_options_out_of_range_are_named(run, arguments: list[str], expected: str) -> None:
    answer = run(*arguments, "--quiet")
    assert answer.status == 2 and expected in answer.err and "Traceback" not in answer.err


@pytest.mark.parametrize("action", [["pretrain", *NETWORK, *DATA, *QUICK], ["study", "run", "--config", "quickstart"]])
def test_a_tracker_that_is_not_installed_is_refused(
    run, action: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    answer = run(*action, "--tracker", "wandb")
    assert answer.status == 2 and not list(tmp_path.iterdir())
    assert answer.err == (
        "error: --tracker wandb: wandb is not installed. pip install 'sparse-robust[track]', or leave --tracker out.\n"
    )


def test_doctor_finds_this_machine_fit(run) -> None:
    answer = run("doctor")
    assert answer.status == 0 and "embedded data" in answer.out and "fails" not in answer.out
    words = " ".join(answer.out.replace("│", " ").split())
    assert "masks, optim, rng, select: reference; pgd_step: reference, compile" in words or torch.cuda.is_available()


def test_no_verb_prints_the_help(run) -> None:
    answer = run()
    assert answer.status == 2 and "study" in answer.out and "accelerate launch" in answer.out


def test_module_and_script_are_the_same_thing() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "sparse_robust", "--version"], capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == f"sparse-robust {__version__}"


def test_a_warning_is_one_line(tmp_path: Path) -> None:
    """Of the command; what calls main from Python keeps its own."""
    before = warnings.formatwarning
    command = [sys.executable, "-W", "always", "-c", WARNS, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert said.splitlines()[0] == "warning: odd [but true]"
    assert main(["ticket", "show", "absent"]) == 1 and warnings.formatwarning is before


WARNS = """
import warnings
from sparse_robust import cli
def show(options):
    warnings.warn("odd [but true]")
    return 0
import argparse
parser = argparse.ArgumentParser()
parser.set_defaults(function=show)
cli.build_parser = lambda: parser
cli.main([])
"""

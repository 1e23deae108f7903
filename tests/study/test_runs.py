"""Single runs: what their folder says, what a dry run finds, and which mistakes cost nothing."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparse_robust.cli import main
from sparse_robust.errors import UsageError
from sparse_robust.files import sha256_file
from sparse_robust.study.config import EvaluationConfig
from sparse_robust.study.context import Context, Guarded
from sparse_robust.study.runs import PretrainRun
from tests.command import Run, command_line

NETWORK = ["model.name=resnet10t", "model.kwargs={channels: [4, 6, 8, 10], stem_width: 4}"]
DATA = ["data.name=digits", "data.resize=28", "data.fraction=0.1"]
QUICK = ["recipe.epochs=1", "recipe.regime=fast", "evaluation.steps=1", "evaluation.images=20", "evaluation.eps=0.1"]
WEIGHTS = "weights=theta/weights.safetensors"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    return command_line(capsys)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-training and a search with one ticket."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["pretrain", "--out", str(folder / "theta"), "--quiet", *NETWORK, *DATA, *QUICK]) == 0
    weights = f"weights={folder / 'theta' / 'weights.safetensors'}"
    assert main(["find", "--out", str(folder / "tickets"), "--quiet", weights, *DATA, "find.rounds=1"]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, run: Run) -> Run:
    for name in ("theta", "tickets"):
        (tmp_path / name).symlink_to(made / name)
    return run


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("field", ["images", "batch_size"])
def test_an_evaluation_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(UsageError, match=rf"evaluation\.{field} must be at least 1.*got 0"):
        EvaluationConfig(**{field: 0})


@pytest.mark.parametrize(
    "command",
    [
        ["pretrain", *NETWORK, *DATA, *QUICK, "recipe.batch_size=32"],
        ["transfer", WEIGHTS, "ticket=tickets", *DATA, *QUICK, "recipe.batch_size=32", "--checkpoint-seconds=0"],
    ],
    ids=["pretrain", "transfer"],
)
def test_a_failed_evaluation_does_not_cost_the_training(
    here: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]
) -> None:
    updates: list[int] = []
    monkeypatch.setattr(Guarded, "after_update", lambda self, trainee, update: updates.append(update))

    def fail(*_: object, **__: object) -> None:
        raise UsageError("an evaluation that fails")

    command = [*command, "--quiet", "--out", "o"]
    with monkeypatch.context() as patched:
        patched.setattr(Context, "evaluate", fail)
        assert "an evaluation that fails" in here(*command).err
    trained = len(updates)
    other = here(*command, "seed=1", "evaluation.images=10")
    assert other.status == 2 and "different: evaluation, seed" in other.err
    assert here(*command, "evaluation.images=10").status == 0
    assert trained > 1 and len(updates) - trained <= 1, "what was trained is not trained again"
    assert json.loads((tmp_path / "o" / "result.json").read_text())["test_images"] == 10
    assert yaml.safe_load((tmp_path / "o" / "spec.yaml").read_text())["evaluation"]["images"] == 10
    finished = here(*command)
    assert finished.status == 2 and "(different: evaluation)" in finished.err, "a result stands for what it says"


@pytest.mark.parametrize("text", ["x\n", "a: [\n", "seed: 2026-01-01\n", "\x00", "[]\n"])
def test_a_damaged_description_is_named(run: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "mv").mkdir()
    (tmp_path / "mv" / "spec.yaml").write_text(text)
    answer = run("pretrain", "--out", "mv", "--quiet", *NETWORK, *DATA, *QUICK)
    assert answer.status == 1 and answer.err.startswith("error: mv/spec.yaml is damaged"), answer.err
    assert "another --out, or delete mv" in answer.err


@pytest.mark.parametrize("verb", ["evaluate", "transfer", "find"])
def test_an_unreadable_file_is_named(here: Run, monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    original = builtins.open

    def refuse(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith(".safetensors"):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", refuse)
    answer = here(verb, "--out", "o", "--quiet", WEIGHTS, *DATA)
    assert answer.status == 1 and "theta/weights.safetensors" in answer.err and "Permission denied" in answer.err


def test_a_folder_with_one_ticket_stands_for_it(here: Run, tmp_path: Path) -> None:
    told = [WEIGHTS, "ticket=tickets", *DATA]
    assert here("transfer", "--out", "moved", "--quiet", *told, *QUICK).status == 0
    spec = yaml.safe_load((tmp_path / "moved" / "spec.yaml").read_text())
    file = "tickets/tickets/k01.safetensors"
    assert spec["ticket"] == file and spec["inputs"][file] == sha256_file(file)
    assert here("evaluate", "--out", "numbers", "--dry-run", *told).status == 0
    empty = here("transfer", WEIGHTS, "ticket=theta", *DATA)
    assert empty.status == 2 and "theta is a folder: name one of its tickets, it has none here" in empty.err


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("model.num_classes=7", "model.num_classes is 7 and digits has 10 classes"),
        ("model.in_chans=3", "model.in_chans is 3 and the images of digits have 1"),
    ],
)
def test_what_a_network_is_told_must_be_what_the_data_has(run: Run, tmp_path: Path, wrong: str, expected: str) -> None:
    answer = run("pretrain", "--out", "o", "--quiet", *NETWORK, *DATA, *QUICK, wrong)
    assert answer.status == 2 and expected in answer.err and not files(tmp_path)


def test_classes_and_channels_that_are_not_named_are_not_made_up(run: Run) -> None:
    shown = run("pretrain", "--dry-run", *NETWORK, *DATA, *QUICK)
    model = yaml.safe_load(shown.out)["model"]
    assert (model["num_classes"], model["in_chans"]) == (None, None)
    right = run("pretrain", "--dry-run", *NETWORK, *DATA, *QUICK, "model.num_classes=10", "model.in_chans=1")
    assert right.status == 0 and yaml.safe_load(right.out)["model"]["in_chans"] == 1


PRETRAIN = ["pretrain", *NETWORK, *DATA, *QUICK]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*PRETRAIN, "model.name=resnet99"], "unknown model 'resnet99'"),
        ([*PRETRAIN, "data.name=nosuch"], "unknown data set 'nosuch'"),
        ([*PRETRAIN, "data.name=torchvision:CIFAR11", "data.download=true"], "torchvision data set 'CIFAR11'"),
        ([*PRETRAIN, "data.name=folder:nowhere"], "no folder nowhere"),
        ([*PRETRAIN, "data.augment=foo"], "unknown data augment 'foo'"),
        ([*PRETRAIN, "checkpoint=nofile.pt"], "nofile.pt"),
        (["pretrain", "model.name=convnext_atto", *DATA, *QUICK], "does not take 28x28 images"),
        (["find", "weights=absent.safetensors", *DATA], "absent.safetensors"),
        (["find", WEIGHTS, *DATA, "like=theta"], "k01.safetensors"),
        (["transfer", "weights=absent.safetensors", *DATA], "absent.safetensors"),
        (["transfer", WEIGHTS, "ticket=absent.safetensors", *DATA], "absent.safetensors"),
        (["transfer", WEIGHTS, *DATA, "data.channels=3"], "takes 1 channels"),
        (["evaluate", WEIGHTS, *DATA, "sources=[absent.safetensors]"], "absent.safetensors"),
        (["landscape", "runs=[theta]"], "landscapes are drawn of transfers"),
    ],
)
def test_a_dry_run_refuses_what_cannot_start(here: Run, tmp_path: Path, arguments: list[str], expected: str) -> None:
    answer = here(*arguments, "--dry-run", "--out", "o")
    assert answer.status in (1, 2) and answer.err.startswith("error: ") and expected in answer.err, answer
    assert not answer.out and not (tmp_path / "o").exists()


def test_a_dry_run_looks_into_the_folder(here: Run) -> None:
    answer = here(*PRETRAIN, "--dry-run", "--out", "theta", "seed=4")
    assert answer.status == 2 and "different: seed" in answer.err
    assert here(*PRETRAIN, "--dry-run", "--out", "theta").status == 0


def test_a_dry_run_fetches_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_robust.study import preflight

    monkeypatch.setattr(preflight, "load_data", lambda spec: pytest.fail(f"{spec} was loaded"))
    assert run(*PRETRAIN, "--dry-run", "data.name=hf:somebody/something").status == 0
    assert run(*PRETRAIN, "--dry-run", "data.name=torchvision:CIFAR10", "data.download=true").status == 0


def test_every_run_can_be_checked() -> None:
    from sparse_robust.study.runs import RUNS

    assert all(callable(kind.check) for kind in RUNS.values()) and RUNS["pretrain"] is PretrainRun


@pytest.mark.parametrize(
    ("name", "expected"),
    [("quickstart", "a study's preset: use `sparse-robust study run --config quickstart`"), ("no", "there is no file")],
)
def test_presets_are_for_studies(run: Run, name: str, expected: str) -> None:
    answer = run("pretrain", "--config", name)
    assert answer.status == 2 and expected in answer.err

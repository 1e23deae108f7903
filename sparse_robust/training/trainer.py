"""One training run on Accelerate: any regime, with or without a mask, resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sparse_robust.attacks import PGD, parse_eps
from sparse_robust.data import Batch, Data, eval_loader, train_loader
from sparse_robust.errors import SparseRobustError, UsageError
from sparse_robust.evaluation import evaluate
from sparse_robust.masks import Masks
from sparse_robust.pruning import enforce
from sparse_robust.seeding import derive_seed, seeded
from sparse_robust.training.checkpoint import Checkpoint
from sparse_robust.training.guard import CatastrophicOverfittingGuard
from sparse_robust.training.log import RunLog
from sparse_robust.training.progress import SILENT, ProgressReporter, Task
from sparse_robust.training.recipe import Recipe
from sparse_robust.training.schedule import RecipeScheduler
from sparse_robust.training.selection import Selection, State

GUARD_STEPS = 5
CLOCK_STEPS = 16  # several ranks agree on the time this often


class TrainingError(SparseRobustError, RuntimeError):
    """Training cannot go on: the loss is not a number."""


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind.

    Attributes:
        selection: the kept weights (``best_sa``, ``best_ra``, ``last``) and their validation accuracies.
        history: one entry an epoch: epoch, train_loss, train_accuracy, lr, val_sa, val_ra, seconds.
        stopped_by_guard: whether catastrophic overfitting ended it; the weights are those of the epoch before.
        seconds: wall time over all starts of the run.
    """

    selection: Selection
    history: list[dict[str, Any]]
    stopped_by_guard: bool
    seconds: float

    def headline(self, adversarial: bool) -> str:
        """Name the reported weights: best validation RA for adversarial regimes, best validation SA otherwise, else
        the last."""
        preferred = "best_ra" if adversarial else "best_sa"
        return preferred if preferred in self.selection.chosen else "last"


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is carried out; none of it changes its result.

    Attributes:
        folder: where log.jsonl and the checkpoint go; None keeps nothing.
        checkpoint_seconds: wall time between checkpoints within a run.
        checkpoint_steps: optimizer steps between checkpoints, in addition; None for time alone.
        eval_batch_size: images per batch in validation.
        workers: loader processes of large data sets.
        progress: where progress is shown.
        name: what the display and the trackers call this run.
        project: what the trackers group it under.
    """

    folder: Path | None = None
    checkpoint_seconds: float = 60.0
    checkpoint_steps: int | None = None
    eval_batch_size: int = 500
    workers: int = 0
    progress: ProgressReporter = SILENT
    name: str = "train"
    project: str = "sparse-robust"


class Trainer:
    """Trains ``model`` in place. Every random choice is a function of (seed, epoch, step, sample id), so a resumed
    run repeats
    the uninterrupted one bit for bit on the same hardware.

    Args:
        model: the network, normalisation inside.
        data: training and validation splits.
        recipe: what to do.
        seed: any integer; 0 is as good as any other.
        masks: weights that stay at +0.0; None trains densely.
        accelerator: devices, precision, trackers; a new one by default.
        options: see `RunOptions`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        *,
        seed: int,
        masks: Masks | None = None,
        accelerator: Accelerator | None = None,
        options: RunOptions | None = None,
    ) -> None:
        self.recipe, self.data, self.seed, self.masks = recipe, data, seed, masks
        self.accelerator = accelerator or Accelerator(gradient_accumulation_steps=1)  # accumulation is ours
        self.options = options or RunOptions()
        model.to(self.accelerator.device)
        if masks is not None:
            masks.apply_(model)
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        optimizer = create_optimizer_v2(
            model, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay,
            momentum=recipe.momentum, filter_bias_and_bn=not recipe.decay_norms, **recipe.extra,
        )  # fmt: skip
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.inner: nn.Module = self.accelerator.unwrap_model(self.model)
        self.enforcement = enforce(optimizer, self.inner, masks) if masks is not None else None
        self.objective = recipe.objective()
        shard = {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes}
        common = {"device": self.accelerator.device, "workers": self.options.workers, **shard}
        self.train_batches = train_loader(data, recipe.batch_size, seed=seed, **common)
        self.validation_batches = eval_loader(data.validation, self.options.eval_batch_size, **common)
        self.updates_per_epoch = -(-len(self.train_batches) // recipe.accumulate)
        self.scheduler = RecipeScheduler(optimizer, recipe, self.updates_per_epoch)
        self.selection, self.history = Selection(), list[dict[str, Any]]()
        self.guard: CatastrophicOverfittingGuard | None = None
        if recipe.guard and recipe.regime == "fast":
            self.guard = CatastrophicOverfittingGuard(recipe.guard_drop)
            self.guard_batch = eval_loader(data.train, recipe.batch_size, limit=recipe.batch_size, **common)
        self.before_fall: State = {}
        self.epoch, self.step, self.seconds, self.stopped_by_guard = 0, 0, 0.0, False
        self.totals = self._no_totals()
        self.checkpoint = Checkpoint(self.options.folder / "checkpoint") if self.options.folder else None
        self.log = RunLog(self.options.folder, self.accelerator, self.options.project, self.options.name)

    def fit(self) -> TrainResult:
        """Train to the end of the recipe, from the newest checkpoint if there is one.

        Raises:
            TrainingError: if the loss becomes NaN or infinite; the message names epoch and step.
        """
        self._started = self._last_save = time.monotonic()
        task = self.options.progress.task(self.options.name, self.recipe.epochs * len(self.train_batches))
        try:
            with seeded("training", self.seed):
                self._resume()
                task.advance(self.epoch * len(self.train_batches) + self.step)
                while self.epoch < self.recipe.epochs and not self.stopped_by_guard:
                    self._train_epoch(task)
                    self._end_epoch(task)
                    self.epoch, self.step, self.totals = self.epoch + 1, 0, self._no_totals()
                    self._save_if_due()
            if self.enforcement is not None:
                self.enforcement.verify()
        finally:
            task.close()
            self.log.close()
            self._release()
        return TrainResult(self.selection, self.history, self.stopped_by_guard, self._elapsed())

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.inner

    def _train_epoch(self, task: Task) -> None:
        attack_seed = self.objective.epoch_seed(self.seed, self.epoch)
        self.model.train()
        for batch in self._batches():
            torch.manual_seed(derive_seed("step", self.seed, self.epoch, self.step, self.accelerator.process_index))
            self._train_step(batch, attack_seed)
            self.step += 1
            task.advance(info=f"epoch {self.epoch + 1}/{self.recipe.epochs}")
            self._save_if_due(within_epoch=True)

    def _train_step(self, batch: Batch, attack_seed: int) -> None:
        accelerator, recipe, steps = self.accelerator, self.recipe, len(self.train_batches)
        group_start = self.step - self.step % recipe.accumulate
        group = min(recipe.accumulate, steps - group_start)  # the epoch's last group may be shorter
        closes = self.step + 1 == group_start + group
        with nullcontext() if closes else accelerator.no_sync(self.model):
            with accelerator.autocast():
                loss, logits = self.objective(self.model, self.inner, batch.x, batch.y, batch.ids, seed=attack_seed)
            accelerator.backward(loss * self._share(len(batch.y)) / group)
        if closes:
            if recipe.clip_grad is not None:
                if self.enforcement is not None:
                    self.enforcement.mask_gradients_()
                accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
            updates = self._updates(self.step + 1)
            self.scheduler.step_update(updates)
            if self.ema is not None:
                self.ema.update(self.inner, step=updates)
        seen = len(batch.y)
        correct = (logits.detach().argmax(1) == batch.y).sum()
        self.totals += torch.stack([loss.detach() * seen, correct, torch.full_like(correct, seen)]).to(self.totals)

    def _share(self, images: int) -> float:
        """Weight of this rank's mean loss, so that the average over ranks is the mean over the whole batch."""
        world, size = self.accelerator.num_processes, self.recipe.batch_size
        return images * world / min(size, len(self.data.train) - self.step * size)

    def _updates(self, steps_in_epoch: int) -> int:
        return self.epoch * self.updates_per_epoch + -(-steps_in_epoch // self.recipe.accumulate)

    def _no_totals(self) -> Tensor:
        """Sums of loss, correct predictions and images, kept on the device so that no step waits for them."""
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        return torch.zeros(3, dtype=dtype, device=self.accelerator.device)

    def _batches(self) -> Iterator[Batch]:
        return self.train_batches.epoch(self.epoch, start=self.step)

    def _end_epoch(self, task: Task) -> None:
        self._share_buffers()
        last = self.epoch + 1 == self.recipe.epochs
        tripped = self._check_guard()
        if tripped:
            self.kept.load_state_dict(self.before_fall)
            self.stopped_by_guard = last = True
        totals = self._sum_over_ranks(self.totals.tolist())
        self._check_finite(totals[0])
        entry: dict[str, Any] = {
            "epoch": self.epoch,
            "train_loss": totals[0] / totals[2],
            "train_accuracy": 100 * totals[1] / totals[2],
            "lr": self.optimizer.param_groups[0]["lr"],
            "val_sa": None,
            "val_ra": None,
        }
        if self._validates(last):
            entry["val_sa"], entry["val_ra"] = self._validate(task)
        if tripped:
            entry["guard"] = "catastrophic overfitting: back to the weights of the epoch before"
        self.selection.offer(
            self.epoch - tripped, self.kept.state_dict(), val_sa=entry["val_sa"], val_ra=entry["val_ra"], last=last
        )
        entry["seconds"] = round(self._elapsed(), 2)
        self.history.append(entry)
        self.log.epoch(entry)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.options.name}: the training loss is not finite in epoch {self.epoch + 1}. Lower recipe.lr, "
                "or set recipe.clip_grad; nothing after the last checkpoint was kept."
            )

    def _share_buffers(self) -> None:
        """Give all ranks the running statistics of rank 0: those are what is validated and kept."""
        if self.accelerator.num_processes > 1:
            for module in [self.inner, *([self.ema.module] if self.ema is not None else [])]:
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    def _validates(self, last: bool) -> bool:
        if self.recipe.validate_every == 0 or len(self.data.validation) == 0:
            return False
        due = self.epoch >= self.recipe.validate_from
        return last or (due and (self.epoch - self.recipe.validate_from) % self.recipe.validate_every == 0)

    def _validate(self, task: Task) -> tuple[float, float | None]:
        recipe, attacks = self.recipe, list[PGD]()
        if recipe.validation_steps and recipe.regime != "standard":
            attacks.append(
                PGD(norm=recipe.norm, steps=recipe.validation_steps, step_size=recipe.validation_step_size,
                    seed=derive_seed("validation-attack", self.seed))
            )  # fmt: skip
        result = evaluate(self.kept, self.validation_batches, attacks, recipe.radius, check=False, replica=False)
        ra = result.ra if attacks else None
        task.advance(0, info=f"val SA {result.sa:.1f}" + ("" if ra is None else f" RA {ra:.1f}"))
        return result.sa, ra

    def _check_guard(self) -> bool:
        if self.guard is None:
            return False
        attack = PGD(norm=self.recipe.norm, steps=GUARD_STEPS, step_size=parse_eps(self.recipe.eps) / 4, seed=self.seed)
        result = evaluate(self.inner, self.guard_batch, [attack], self.recipe.radius, check=False, replica=False)
        if self.guard.trips(result.robust):
            return True
        self.before_fall = {name: tensor.detach().cpu().clone() for name, tensor in self.kept.state_dict().items()}
        return False

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return [float(value) for value in self.accelerator.reduce(tensor, "sum")]

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def _save_if_due(self, within_epoch: bool = False) -> None:
        if self.checkpoint is None or self.epoch >= self.recipe.epochs:
            return
        if within_epoch and self.step % self.recipe.accumulate:
            return  # gradients of an open group are not part of a checkpoint
        every = self.options.checkpoint_steps
        due = every is not None and (self.epoch * len(self.train_batches) + self.step) % every == 0
        if not due and (self.accelerator.num_processes == 1 or self.step % CLOCK_STEPS == 0):
            late = time.monotonic() - self._last_save >= self.options.checkpoint_seconds
            due = self._sum_over_ranks([float(late and self.accelerator.is_main_process)])[0] > 0
        if due:
            self._save()

    def _save(self) -> None:
        assert self.checkpoint is not None
        self._check_finite(float(self.totals[0]))
        progress = {
            "identity": self._identity(),
            "epoch": self.epoch,
            "step": self.step,
            "totals": self.totals.tolist(),
            "history": self.history,
            "seconds": self._elapsed(),
            "stopped_by_guard": self.stopped_by_guard,
            "guard_previous": self.guard.previous if self.guard else None,
            "chosen": self.selection.to_json(),
        }
        tensors = {
            f"kept/{at}/{name}": tensor for at, state in self.selection.states.items() for name, tensor in state.items()
        }
        tensors.update({f"before_fall/{name}": tensor for name, tensor in self.before_fall.items()})
        if self.ema is not None:
            tensors.update({f"ema/{name}": tensor.cpu() for name, tensor in self.ema.module.state_dict().items()})
        self.checkpoint.save(self.accelerator, progress, tensors)
        self._last_save = time.monotonic()

    def _resume(self) -> None:
        loaded = self.checkpoint.load(self.accelerator) if self.checkpoint is not None else None
        if loaded is None:
            return
        progress, tensors = loaded
        if progress["identity"] != self._identity():
            raise UsageError(
                f"the checkpoint in {self.options.folder} belongs to another run (recipe, seed, data or masks differ). "
                "Choose another folder, or delete that one."
            )
        self.epoch, self.step = progress["epoch"], progress["step"]
        self.totals += self.totals.new_tensor(progress["totals"])
        self.history, self.seconds = progress["history"], progress["seconds"]
        self.stopped_by_guard = progress["stopped_by_guard"]
        if self.guard is not None:
            self.guard.previous = progress["guard_previous"]
        groups: dict[str, State] = {}
        for key, tensor in tensors.items():
            head, _, name = key.partition("/")
            if head == "kept":
                at, _, name = name.partition("/")
                head = at
            groups.setdefault(head, {})[name] = tensor
        self.before_fall = groups.pop("before_fall", {})
        ema = groups.pop("ema", None)
        if self.ema is not None and ema is not None:
            self.ema.module.load_state_dict(ema)
        self.selection.restore(progress["chosen"], {int(at): state for at, state in groups.items()})
        self.scheduler.step_update(self._updates(self.step))
        self.log.rewrite(self.history)

    def _identity(self) -> str:
        """Return a digest of what this run is, which a checkpoint must agree with."""
        masks = self.masks.digest() if self.masks is not None else ""
        return str(derive_seed(self.recipe, self.seed, self.data.digest, masks))

    def _release(self) -> None:
        if self.enforcement is not None:
            self.enforcement.remove()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

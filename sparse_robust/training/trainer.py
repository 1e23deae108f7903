"""One training run on Accelerate: any regime, with or without a mask, resumable at any step."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sparse_robust.data import Data, eval_loader, train_loader
from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks
from sparse_robust.objectives import REGIMES
from sparse_robust.seeding import derive_seed, seeded
from sparse_robust.training.agree import Pulse, gathered, require_same
from sparse_robust.training.checkpoint import Checkpoints
from sparse_robust.training.crafting import attack_mode_of
from sparse_robust.training.devices import compiler, describe, deterministic, share_buffers
from sparse_robust.training.guard import CatastrophicOverfittingGuard
from sparse_robust.training.hooks import Hook, Stateful
from sparse_robust.training.log import RunLog
from sparse_robust.training.options import Preempted, RunOptions, TrainingError, TrainResult
from sparse_robust.training.progress import Task
from sparse_robust.training.recipe import Recipe
from sparse_robust.training.sharding import require_unperturbed
from sparse_robust.training.signals import listening
from sparse_robust.training.state import RunState
from sparse_robust.training.step import Stepper
from sparse_robust.training.trainee import Trainee
from sparse_robust.training.validation import guard_accuracy, validate


class Trainer:
    """Trains ``model`` in place. Every random choice is a function of (seed, epoch, step, sample id), so a resumed
    run repeats the uninterrupted one bit for bit on the same hardware.

    Args:
        model: the network, normalisation inside.
        data: training and validation splits.
        recipe: what to do.
        seed: any integer; 0 is as good as any other.
        masks: weights that stay at +0.0; None trains densely.
        accelerator: devices, precision, trackers; a new one by default.
        options: see `RunOptions`.
        hooks: called around every update, in this order; see `Hook`.
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
        hooks: Sequence[Hook] = (),
    ) -> None:
        recipe = recipe.in_passes()
        self.recipe, self.data, self.seed = recipe, data, seed
        self.accelerator = accelerator or Accelerator(gradient_accumulation_steps=1)  # accumulation is ours
        self.options = options or RunOptions()
        self.objective = recipe.objective(data.num_classes)
        require_unperturbed(self.accelerator, self.objective)
        shape = (data.in_chans, *data.size)
        self.trainee = Trainee(model, recipe, self.accelerator, masks, shape, attack_mode_of(self.objective))
        shard = {"rank": self.accelerator.process_index, "world": self.accelerator.num_processes}
        common = {"device": self.accelerator.device, "workers": self.options.workers, **shard}
        self.train_batches = train_loader(data, recipe.batch_size, seed=seed, **common)
        self.validation_batches = eval_loader(data.validation, self.options.eval_batch_size, **common)
        self.stepper = Stepper(
            self.trainee, self.objective, steps=len(self.train_batches), images=len(data.train), hooks=hooks
        )
        guard = None
        if recipe.guard and REGIMES[recipe.regime].single_step:
            guard = CatastrophicOverfittingGuard(recipe.guard_drop)
            self.guard_batch = eval_loader(data.train, recipe.batch_size, limit=recipe.batch_size, **common)
        parts: dict[str, Stateful] = {hook.name: hook for hook in hooks}
        if len(parts) != len(hooks) or "objective" in parts:
            raise UsageError(f"hooks need names of their own, none of them 'objective': {[h.name for h in hooks]}.")
        if isinstance(self.objective, Stateful):
            parts["objective"] = self.objective
        self.state = RunState(self.trainee, parts, guard)
        self.identity = self._identity()
        self.pulse, self._stop, self._due = Pulse(self.accelerator), False, False
        self.checkpoints = Checkpoints(self.options.folder / "checkpoint") if self.options.folder else None
        self.log = RunLog(self.options.folder, self.accelerator, self.options.project, self.options.name)

    def fit(self) -> TrainResult:
        """Train to the end of the recipe, from the newest checkpoint if there is one.

        Raises:
            TrainingError: if the loss becomes NaN or infinite; the message names epoch, step and ranks. Or if the ranks
                do not hold the same masks; it names those that differ.
            Preempted: after SIGTERM, SIGUSR1 or the first Ctrl-C, once a checkpoint is written at the next step
                boundary.
        """
        state = self.state
        self._started = self._last_save = time.monotonic()
        task = self.options.progress.task(self.options.name, self.recipe.epochs * len(self.train_batches))
        try:
            with (
                seeded("training", self.seed),
                deterministic(self.recipe.deterministic),
                listening(self.checkpoints is not None, self.options.progress.say) as self._told,
            ):
                for hook in self.stepper.hooks:
                    hook.start(self.trainee)
                self._agree()
                self._resume()
                task.advance(self._done())
                while state.epoch < self.recipe.epochs and not state.stopped_by_guard:
                    self._train_epoch(task)
                    self._end_epoch(task)
                    state.next_epoch()
                    self._boundary(state.totals[0])
            if self.trainee.enforcement is not None:
                self.trainee.enforcement.verify()
        finally:
            task.close()
            self.log.close()
            self.trainee.release()
        how = describe(self.accelerator, self.recipe, self.trainee.channels_last)
        return TrainResult(
            state.selection, state.history, state.stopped_by_guard, self._elapsed(),
            how={**how, "attack": self.trainee.target.describe()}, masks=self.trainee.masks,
        )  # fmt: skip

    def _train_epoch(self, task: Task) -> None:
        state = self.state
        attack_seed = self.objective.epoch_seed(self.seed, state.epoch)
        self.trainee.model.train()
        for batch in self.train_batches.epoch(state.epoch, start=state.step):
            torch.manual_seed(derive_seed("step", self.seed, state.epoch, state.step, self.accelerator.process_index))
            sums = self.stepper(batch, epoch=state.epoch, step=state.step, seed=attack_seed)
            state.totals += sums.to(state.totals)
            state.step += 1
            task.advance(info=f"epoch {state.epoch + 1}/{self.recipe.epochs}")
            self._boundary(sums[0])

    def _end_epoch(self, task: Task) -> None:
        state = self.state
        self._share_buffers()
        last = state.epoch + 1 == self.recipe.epochs
        tripped = self._check_guard()
        if tripped:
            self.trainee.kept.load_state_dict(state.before_fall)
            state.stopped_by_guard = last = True
        everyones = gathered(self.accelerator, state.totals.tolist())
        self._check_finite(everyones)
        totals = [sum(column) for column in zip(*everyones, strict=True)]
        entry: dict[str, Any] = {
            "epoch": state.epoch,
            "train_loss": totals[0] / totals[2],
            "train_accuracy": 100 * totals[1] / totals[2],
            "lr": self.trainee.optimizer.param_groups[0]["lr"],
            "val_sa": None,
            "val_ra": None,
        }
        if self._validates(last):
            sa, ra = validate(self.trainee.kept, self.validation_batches, self.recipe, self.seed)
            entry["val_sa"], entry["val_ra"] = sa, ra
            task.advance(0, info=f"val SA {sa:.1f}" + ("" if ra is None else f" RA {ra:.1f}"))
        if tripped:
            entry["guard"] = "catastrophic overfitting: back to the weights of the epoch before"
        state.selection.offer(
            state.epoch - tripped, self.trainee.kept.state_dict(), val_sa=entry["val_sa"], val_ra=entry["val_ra"],
            last=last,
        )  # fmt: skip
        entry["seconds"] = round(self._elapsed(), 2)
        state.history.append(entry)
        self.log.epoch(entry)

    def _share_buffers(self) -> None:
        """Give all ranks the same running statistics: those are what is validated and kept."""
        if self.accelerator.num_processes > 1:
            share_buffers(list(self.trainee.modules().values()), self.recipe.dist_bn)

    def _validates(self, last: bool) -> bool:
        if self.recipe.validate_every == 0 or len(self.data.validation) == 0:
            return False
        after = self.state.epoch - self.recipe.validate_from
        return last or (after >= 0 and after % self.recipe.validate_every == 0)

    def _check_guard(self) -> bool:
        guard = self.state.guard
        if guard is None:
            return False
        if guard.trips(guard_accuracy(self.trainee.inner, self.guard_batch, self.recipe, self.seed)):
            return True
        self.state.before_fall = self.trainee.kept_state()
        return False

    def _elapsed(self) -> float:
        return self.state.seconds + time.monotonic() - self._started

    def _done(self) -> int:
        """Return how many batches of the run are done."""
        return self.state.epoch * len(self.train_batches) + self.state.step

    def _agree(self) -> None:
        """Check that all ranks are about to do the same."""
        masks = self.trainee.masks
        require_same(self.accelerator, "masks", masks.digest() if masks is not None else "")
        require_same(self.accelerator, "run (recipe, seed, data and precision)", self.identity)

    def _boundary(self, loss: Tensor) -> None:
        """Between two steps, with all ranks alike: go on, write a checkpoint, stop, or fail."""
        state, every = self.state, self.options.checkpoint_steps
        if state.epoch >= self.recipe.epochs or state.stopped_by_guard:
            return
        late = time.monotonic() - self._last_save >= self.options.checkpoint_seconds
        beat = self.pulse.beat(loss, (state.epoch, state.step), stop=self._told() is not None, save=late)
        if beat.broken:
            self._fail(beat.broken, *beat.where)
        self._stop |= beat.stop
        self._due |= beat.save or (every is not None and self._done() % every == 0)
        open_group = state.step % self.recipe.accumulate and state.step < len(self.train_batches)
        if self.checkpoints is None or open_group or not (self._stop or self._due):
            return  # gradients of an open group are not part of a checkpoint
        self._save(self.checkpoints)
        if self._stop:
            by = self._told()
            raise Preempted.by(
                by,
                f"{self.options.name}: {by or 'another rank'} asked this run to stop in epoch "
                f"{state.epoch + 1}, after step {state.step}. It is saved: run the same command again to go on.",
            )

    def _check_finite(self, totals: Sequence[Sequence[float]]) -> None:
        """Check the totals of all ranks, on every rank."""
        broken = [rank for rank, (loss, *_) in enumerate(totals) if not math.isfinite(loss)]
        if broken:
            self._fail(broken, self.state.epoch, self.state.step)

    def _fail(self, broken: Sequence[int], epoch: int, step: int) -> NoReturn:
        ranks = self.accelerator.num_processes
        where = f" on rank {', '.join(map(str, broken))} of {ranks}" if ranks > 1 else ""
        raise TrainingError(
            f"{self.options.name}: the training loss is not finite in epoch {epoch + 1}, step {step}{where}. Lower "
            "recipe.lr, or set recipe.clip_grad; nothing after the last checkpoint was kept."
        )

    def _save(self, checkpoints: Checkpoints) -> None:
        progress, tensors, own = self.state.pack()
        self._check_finite(progress["totals"])
        progress |= {"identity": self.identity, "seconds": self._elapsed()}
        checkpoints.save(self.accelerator, self._done(), progress, tensors, own)
        self._last_save, self._due = time.monotonic(), False

    def _resume(self) -> None:
        loaded = self.checkpoints.load(self.accelerator) if self.checkpoints is not None else None
        if loaded is None:
            return
        if loaded.progress["identity"] != self.identity:
            raise UsageError(
                f"the checkpoint in {self.options.folder} belongs to another run (recipe, seed, data, masks or "
                "precision differ). Choose another folder, or delete that one."
            )
        self.state.unpack(*loaded)
        self.trainee.follow()
        self.stepper.scheduler.step_update(self.stepper.updates(self.state.epoch, self.state.step))
        self.log.rewrite(self.state.history)

    def _identity(self) -> str:
        """Return a digest of what this run is, which a checkpoint must agree with."""
        masks = self.trainee.masks.digest() if self.trainee.masks is not None else ""
        names = [hook.name for hook in self.stepper.hooks]
        how = self.accelerator.mixed_precision, compiler(self.accelerator)
        return str(derive_seed(self.recipe, self.seed, self.data.digest, masks, how, *names))

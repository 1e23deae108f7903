"""What is trained: the network inside and outside its wrapper, with its optimizer, moving average and masks."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, unwrap
from sparse_robust.pruning import Enforcement, enforce
from sparse_robust.training.crafting import AttackTarget
from sparse_robust.training.devices import compiler, lay_out, put_back, synchronise_batch_norm, train_channels_last
from sparse_robust.training.selection import State, on_cpu
from sparse_robust.training.sharding import Mirror, prepare, shards

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sparse_robust.training.recipe import Recipe


class Trainee:
    """A network made ready for training on the devices of an accelerator.

    Attributes:
        model: what the training forward goes through: the distributed wrapper, where there is one.
        trained: the module inside, whose weights the optimizer steps.
        inner: what is attacked, validated and kept: the same module or, where that is sharded, a whole copy of it.
        optimizer: Accelerate's.
        ema: the moving average of the weights, or None.
        masks: the weights that stay at +0.0, or None; see `set_masks`.
        enforcement: what holds them there.
        channels_last: whether 4-d weights lie so in memory.
        target: called with images, returns what training attacks on them act on.
        updates: how many updates of the weights the whole run makes.
    """

    updates: int = 0

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        accelerator: Accelerator,
        masks: Masks | None,
        image_shape: Sequence[int],
        attack_mode: str | None = None,
    ) -> None:
        self.recipe, self.accelerator, self.masks = recipe, accelerator, masks
        model.to(accelerator.device)
        self._unsynchronised = synchronise_batch_norm(model, accelerator) if recipe.dist_bn == "sync" else {}
        self.channels_last = recipe.channels_last and not shards(accelerator)
        if self.channels_last:
            self.channels_last = train_channels_last(model, torch.zeros(1, *image_shape, device=accelerator.device))
        if masks is not None:
            masks.apply_(model)
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay) if recipe.ema_decay else None
        trained = copy.deepcopy(model) if shards(accelerator) else model
        self.inner_optimizer = _optimizer(trained, recipe)
        self.model, self.optimizer = prepare(accelerator, trained, self.inner_optimizer, recipe)
        self.trained = unwrap(self.model)
        self.mirror = Mirror(self.trained, model) if shards(accelerator) else None
        self.inner = self.trained if self.mirror is None else self.mirror.whole
        if recipe.dist_bn == "reduce" and isinstance(self.model, DistributedDataParallel):
            self.model.broadcast_buffers = False  # each rank has its own until the end of the epoch
        self.target = AttackTarget(self.inner, attack_mode, recipe.attack_replica, accelerator)
        self.enforcement: Enforcement | None = None
        if masks is not None:
            self.enforcement = enforce(self.inner_optimizer, self.trained, masks)

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: the moving average if there is one."""
        return self.ema.module if self.ema is not None else self.inner

    def kept_state(self) -> State:
        """Return the whole state of `kept`, on the CPU; called by every rank."""
        return on_cpu(self.kept.state_dict())

    def modules(self) -> dict[str, nn.Module]:
        """Return the networks that have weights of their own: ``inner``, and ``ema`` if there is one."""
        return {"inner": self.inner} | ({"ema": self.ema.module} if self.ema is not None else {})

    def set_masks(self, masks: Masks | None) -> None:
        """Hold other weights at +0.0 from now on: zeros, with optimizer state and average, where ``masks`` prunes.

        A weight that comes alive starts at +0.0 with empty optimizer slots. All ranks must set the same masks.
        """
        if self.enforcement is not None:
            self.enforcement.remove()
        self.masks, self.enforcement = masks, None
        if masks is not None:
            self.enforcement = enforce(self.inner_optimizer, self.trained, masks)
            if self.ema is not None:
                masks.apply_(self.ema.module)
        self.follow()

    def update(self) -> None:
        """Clip the gradients, let the optimizer take its step and drop them."""
        if self.recipe.clip_grad is not None:
            if self.enforcement is not None:
                self.enforcement.mask_gradients_()
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.follow()

    def follow(self) -> None:
        """Let ``inner`` have the weights that are trained; every rank must call."""
        if self.mirror is not None:
            self.mirror.refresh()

    def average(self, update: int) -> None:
        """Take the weights after update number ``update`` into the moving average."""
        if self.ema is not None:
            self.ema.update(self.inner, step=update)

    def release(self) -> None:
        """Leave the network as a plain module, and Accelerate without it."""
        if self.enforcement is not None:
            self.enforcement.remove()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        put_back(self.inner, self._unsynchronised)
        if self.channels_last:
            lay_out(self.inner, torch.contiguous_format)
        if compiler(self.accelerator) is not None:
            torch.compiler.reset()  # what was compiled for this network is of no use to the next
        self.accelerator.free_memory()


def _optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """Make the optimizer that a recipe asks for.

    Raises:
        UsageError: if it does not take these arguments, or needs a package or a device that is not there.
    """
    try:
        return create_optimizer_v2(
            model, opt=recipe.optimizer, lr=recipe.lr, weight_decay=recipe.weight_decay,
            momentum=recipe.momentum, filter_bias_and_bn=not recipe.decay_norms, **recipe.extra,
        )  # fmt: skip
    except Exception as error:  # each optimizer has errors of its own
        raise UsageError(
            f"recipe.optimizer {recipe.optimizer!r} cannot be made: {str(error).rstrip('.')}. It gets recipe.lr, "
            f"momentum and weight_decay, and recipe.extra, here {recipe.extra}: change these, or use another."
        ) from error

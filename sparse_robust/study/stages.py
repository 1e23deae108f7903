"""The stages of the protocol: pretrain, find, transfer. Each works in a folder, resumes there, and returns its result
row."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sparse_robust.data import Data, DataSpec, eval_loader
from sparse_robust.errors import FileError, SparseRobustError, UsageError
from sparse_robust.evaluation import Evaluation
from sparse_robust.files import atomic_write, read_json, sha256_state, write_json
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.masks.patterns import Pattern
from sparse_robust.models import (
    ModelSpec,
    check_input_size,
    create_model,
    head_names,
    import_weights,
    load_model,
    load_state,
    replace_head,
    save_model,
    set_normalization,
    spec_of,
)
from sparse_robust.pruning import imp, prune
from sparse_robust.seeding import derive_seed
from sparse_robust.study.cells import describe
from sparse_robust.study.config import EvaluationConfig, FinderConfig, PretrainConfig
from sparse_robust.study.context import Context
from sparse_robust.study.finding import STATE, State, changed_masks, resumed_state, rewind_target, save_state
from sparse_robust.study.network import NetworkConfig
from sparse_robust.study.scoring import pruning_options
from sparse_robust.tickets import Ticket
from sparse_robust.training import Hook, Recipe

WEIGHTS = "weights.safetensors"
TRAINING = "training.json"
EXAMPLES = "examples.safetensors"
EXAMPLE_IMAGES = 8


def network_for(spec: ModelSpec, data: Data, seed: int) -> nn.Module:
    """Create a network with the channels, classes and statistics of a data set, whose images must be large enough."""
    model = create_model(
        spec.name, num_classes=data.num_classes, in_chans=data.in_chans, stem=spec.stem, pretrained=spec.pretrained,
        mean=data.mean, std=data.std, seed=seed, **dict(spec.kwargs),
    )  # fmt: skip
    check_input_size(model, *data.size)
    return model


def pretrain(
    spec: NetworkConfig,
    data_spec: DataSpec,
    config: PretrainConfig,
    evaluation: EvaluationConfig,
    *,
    seed: int,
    folder: Path,
    context: Context,
    label: str,
) -> dict[str, Any]:
    """Make pre-trained weights in ``folder`` and evaluate them on the source task; returns the result row."""
    data = context.data(data_spec)
    if (folder / TRAINING).exists():  # only the evaluation is another one
        training, model = read_json(folder / TRAINING), load_model(folder / WEIGHTS)
    else:
        training, model = _trained(spec, data, config, seed, folder, context, label)
        sha256 = sha256_state(model.state_dict())
        provenance = {"label": label, "sha256": sha256, "data": data.digest, "seed": seed}
        context.on_main(lambda: save_model(model, folder / WEIGHTS, extra=provenance))
        context.on_main(lambda: write_json(folder / TRAINING, {**training, "sha256": sha256}))
        training["sha256"] = sha256
    started = time.monotonic()
    measured = context.evaluate(model, data, evaluation)
    return {
        "sa": measured.sa,
        "ra": measured.ra,
        "test_images": len(measured),
        "evaluation": describe(evaluation),
        **training,
        "seconds": training["seconds"] + time.monotonic() - started,
    }


def _trained(
    spec: NetworkConfig, data: Data, config: PretrainConfig, seed: int, folder: Path, context: Context, label: str
) -> tuple[dict[str, Any], nn.Module]:
    """Return the record of the training and the network with the weights to keep."""
    pretrained = config.checkpoint is None and (config.pretrained or spec.pretrained)
    model = network_for(spec.for_data(data).with_(pretrained=pretrained), data, derive_seed("model", seed))
    if config.checkpoint is not None:
        state = load_state(config.checkpoint, trust_pickle=context.trust_pickle)
        import_weights(model, state, source=config.checkpoint)
    if config.recipe is None:
        return {"regime": None, "epochs": 0, "history": [], "stopped_by_guard": False, "seconds": 0.0}, model
    trained = context.train(
        model, data, config.recipe, seed=derive_seed("pretrain", seed), masks=None, folder=folder,
        name=f"pretrain {label}",
    )  # fmt: skip
    headline = trained.headline(config.recipe.regime != "standard")
    model.load_state_dict(trained.selection.state(headline))
    return {
        "regime": config.recipe.regime,
        "epochs": config.recipe.epochs,
        "history": trained.history,
        "stopped_by_guard": trained.stopped_by_guard,
        "how": trained.how,
        "selected": {"rule": headline, **trained.selection.to_json()[headline]},
        "seconds": trained.seconds,
    }, model


def find(
    weights: Path,
    data_spec: DataSpec,
    config: FinderConfig,
    *,
    seed: int,
    folder: Path,
    context: Context,
    label: str,
    like: Path | None = None,
) -> dict[str, Any]:
    """Draw the tickets of all rounds from ``weights`` into ``folder/tickets``; returns the result row.

    Finished tickets are kept, so an interrupted search goes on with the round it was in. ``like`` is the folder of the
    search whose per-layer counts are copied.
    """
    started = time.monotonic()
    model = load_model(weights)
    base_sha256 = sha256_state(model.state_dict())
    theta = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    done = _tickets_on_disk(folder, config.rounds, base_sha256)
    context.accelerator.wait_for_everyone()  # all ranks have seen the same tickets before one of them writes more
    produced = dict(enumerate(done, start=1))
    rules: dict[str, Any] = {"stem": config.stem, "head": config.head, "exclude": config.exclude}
    cutting = {} if len(done) == config.rounds else pruning_options(config, data_spec, seed, context)
    if "batches" in cutting:
        model.to(context.accelerator.device)

    def keep(k: int, masks: Masks) -> None:
        produced[k] = masks
        provenance = {"finder": label, "k": k, "find": describe(config), "seed": seed, "source": data_spec.name}
        ticket = Ticket(
            masks=masks, base_sha256=base_sha256, architecture=spec_of(model).to_dict(), provenance=provenance
        )
        context.on_main(lambda: ticket.save(ticket_file(folder, k)))

    def train_round(network: nn.Module, masks: Masks | None, k: int, hooks: Sequence[Hook] = ()) -> None:
        assert config.recipe is not None
        result = context.train(
            network, context.data(data_spec), config.recipe, seed=derive_seed("imp", seed, k), masks=masks,
            folder=folder / f"round-{k:02d}", hooks=hooks,
            name=f"find {label} round {k + (config.method == 'imp')}/{config.rounds}",
        )  # fmt: skip
        record = {"k": k, "seconds": result.seconds, "history": result.history, "how": result.how}
        context.on_main(lambda: write_json(folder / "rounds" / f"after-k{k:02d}.json", record))

    def initial() -> State:
        data = context.data(data_spec)
        return network_for(spec_of(model).with_(pretrained=False), data, derive_seed("model", seed)).state_dict()

    if config.method == "imp" and len(done) < config.rounds:
        target = rewind_target(config, model, initial, train_round, folder, context.on_main)
        begin = resumed_state(folder, len(done)) if target == "lr" and done else theta
        how: dict[str, Any] = {
            "rounds": config.rounds, "rate": config.rate, "sparsities": config.sparsities, "rewind": target,
            "done": done,
        }  # fmt: skip
        for k, masks in imp(model, begin, train_round, **how, **cutting):
            if target == "lr":
                state = model.state_dict()
                context.on_main(partial(save_state, state, folder / f"round-{k:02d}" / STATE))
            keep(k, masks)
            if k > 1:
                shutil.rmtree(folder / f"round-{k - 1:02d}", ignore_errors=True)
    elif config.trains:
        for k in range(len(done) + 1, config.rounds + 1):
            drawn = derive_seed("changing-masks", seed, k)
            keep(k, changed_masks(model, theta, config, k, rules=rules, seed=drawn, train=train_round))
            shutil.rmtree(folder / f"round-{k:02d}", ignore_errors=True)
    else:
        for k in range(len(done) + 1, config.rounds + 1):
            keep(k, _one_cut(model, config, k, derive_seed("random-masks", seed, k), cutting, like))
    rounds = [read_json(file) for file in sorted((folder / "rounds").glob("after-k*.json"))]
    return {
        "method": config.method,
        "regime": config.recipe.regime if config.recipe is not None and config.trains else None,
        "base_sha256": base_sha256,
        "tickets": [_ticket_row(folder, k, masks) for k, masks in sorted(produced.items())],
        "rounds": rounds,
        "seconds": max(sum(record["seconds"] for record in rounds), time.monotonic() - started),
    }


def _one_cut(
    model: nn.Module, config: FinderConfig, k: int, seed: int, cutting: dict[str, Any], like: Path | None
) -> Masks:
    """Cut once to the count of round ``k`` (at most what the pattern allows), or to the counts of another ticket."""
    if like is not None:
        return prune(model, seed=seed, **{**cutting, "scope": Ticket.load(ticket_file(like, k)).masks})
    everything = Masks.full(prunable_weights(model, **{name: cutting[name] for name in ("stem", "head", "exclude")}))
    room = sum(Pattern.parse(config.pattern).capacity(everything).values())
    return prune(model, count=min(config.kept(everything.numel(), k), room), seed=seed, **cutting)


def ticket_file(folder: Path, k: int) -> Path:
    """Return where round ``k``'s ticket stands in the folder of a search."""
    return folder / "tickets" / f"k{k:02d}.safetensors"


def _ticket_row(folder: Path, k: int, masks: Masks) -> dict[str, Any]:
    return {
        "k": k,
        "sparsity": 100 * masks.sparsity,
        "count": masks.count(),
        "numel": masks.numel(),
        "digest": masks.digest(),
        "file": str(ticket_file(folder, k).relative_to(folder)),
        "layers": [
            {"name": name, "shape": list(shape), "kept": kept, "numel": numel}
            for name, shape, kept, numel in masks.layers()
        ],
    }


def _tickets_on_disk(folder: Path, rounds: int, base_sha256: str) -> list[Masks]:
    """Return the masks of the rounds that are finished, from 1 on without a gap."""
    found: list[Masks] = []
    for k in range(1, rounds + 1):
        if not ticket_file(folder, k).exists():
            break
        ticket = Ticket.load(ticket_file(folder, k))
        if ticket.base_sha256 != base_sha256:
            raise FileError(
                f"{ticket_file(folder, k)} was drawn from other weights ({ticket.base_sha256[:12]}...) than "
                f"those this run has ({base_sha256[:12]}...). Delete {folder} to have the tickets found again."
            )
        found.append(ticket.masks)
    return found


def transfer(
    weights: Path,
    ticket: Path | None,
    data_spec: DataSpec,
    recipe: Recipe,
    evaluation: EvaluationConfig,
    *,
    seed: int,
    folder: Path,
    context: Context,
    label: str,
    hooks: Sequence[Hook] = (),
) -> dict[str, Any]:
    """Transfer a ticket (None: the dense network) from ``weights`` to a data set and evaluate it; returns the result
    row.

    Training starts at the pre-trained values under the mask, with a new head; the mask stays as it is, and a new head
    is not masked. ``hooks`` take part in it.
    """
    data = context.data(data_spec)
    model = load_model(weights)
    base_sha256 = sha256_state(model.state_dict())
    masks = ticket_masks = None
    if ticket is not None:
        loaded = Ticket.load(ticket)
        loaded.require_base(base_sha256)
        ticket_masks = loaded.masks
        ticket_masks.apply_(model)
        masks = without_head(ticket_masks, model)
    fit_to(model, data, derive_seed("head", seed))
    trained = context.train(
        model, data, recipe, seed=derive_seed("transfer", data_spec.name, seed), masks=masks, folder=folder, name=label,
        hooks=hooks,
    )  # fmt: skip
    started = time.monotonic()
    checkpoints: dict[str, Any] = {}
    measured: dict[int, Evaluation] = {}
    headline = trained.headline(recipe.regime != "standard")
    for name in sorted(trained.selection.chosen, key=lambda n: n == headline):  # the headline weights stay loaded
        chosen = trained.selection.chosen[name]
        model.load_state_dict(trained.selection.state(name))
        if chosen.epoch not in measured:
            measured[chosen.epoch] = context.evaluate(model, data, evaluation)
        found = measured[chosen.epoch]
        checkpoints[name] = {
            "epoch": chosen.epoch, "sa": found.sa, "ra": found.ra, "val_sa": chosen.val_sa, "val_ra": chosen.val_ra
        }  # fmt: skip
    if masks is not None:
        _check_zeros(model, masks)
    _save_examples(model, data, evaluation, folder, context)
    if context.keep_weights:
        extra = {
            "label": label,
            "base_sha256": base_sha256,
            "mask_digest": ticket_masks.digest() if ticket_masks is not None else "",
        }
        context.on_main(lambda: save_model(model, folder / WEIGHTS, extra=extra))
    return {
        "sparsity": 100 * ticket_masks.sparsity if ticket_masks is not None else 0.0,
        "trained_by": recipe.regime,
        "seed": seed,
        "sa": checkpoints[headline]["sa"],
        "ra": checkpoints[headline]["ra"],
        **_by_attack(measured[checkpoints[headline]["epoch"]]),
        "headline": headline,
        "checkpoints": checkpoints,
        "epochs": recipe.epochs,
        "train_images": len(data.train),
        "classes": list(data.classes),
        "test_images": len(measured[checkpoints[headline]["epoch"]]),
        "mask_digest": ticket_masks.digest() if ticket_masks is not None else None,
        "survivors": ticket_masks.count() if ticket_masks is not None else None,
        "base_sha256": base_sha256,
        "stopped_by_guard": trained.stopped_by_guard,
        "history": trained.history,
        "how": trained.how,
        "seconds": trained.seconds + time.monotonic() - started,
    }


def without_head(masks: Masks, model: nn.Module) -> Masks:
    """Return what a transfer holds: a new head is not masked."""
    return masks.only([name for name in masks if name not in head_names(model)])


def _by_attack(found: Evaluation) -> dict[str, Any]:
    """Return what is left after each attack in turn, where there are several at one radius."""
    names = [name for name, _ in found.stages]
    if len(names) < 2 or len(set(names)) < len(names):
        return {}
    return {"attacks": {name: 100 * left for name, left in zip(names, found.robust_after, strict=True)}}


def fit_to(model: nn.Module, data: Data, seed: int) -> None:
    """Give the network a new head and the statistics of its new data, which must have its channels and fit its size."""
    if spec_of(model).in_chans != data.in_chans:
        raise UsageError(
            f"the network takes {spec_of(model).in_chans} channels and {data.name} has {data.in_chans}. "
            f"Set channels: {spec_of(model).in_chans} in the data section."
        )
    replace_head(model, data.num_classes, seed=seed)
    set_normalization(model, data.mean, data.std)
    check_input_size(model, *data.size)


def _check_zeros(model: nn.Module, masks: Masks) -> None:
    weights = dict(model.named_parameters())
    for name in masks.names():
        stray = int((weights[name].detach().cpu()[~masks[name]] != 0).sum())
        if stray:
            raise SparseRobustError(f"{stray} pruned weights of {name} are not zero after the transfer.")


def _save_examples(model: nn.Module, data: Data, how: EvaluationConfig, folder: Path, context: Context) -> None:
    """Keep a few test images, their adversarial versions and the predictions, for the report."""

    def save() -> None:
        batch = next(
            iter(eval_loader(data.test, EXAMPLE_IMAGES, device=context.accelerator.device, limit=EXAMPLE_IMAGES))
        )
        model.eval()
        adversarial = how.attack()(model, batch.x, batch.y, eps=how.radius, ids=batch.ids)
        with torch.no_grad():
            before, after = model(batch.x).argmax(1), model(adversarial).argmax(1)
        tensors = {
            "clean": (batch.x * 255).round().to(torch.uint8),
            "adversarial": adversarial,
            "labels": batch.y,
            "clean_prediction": before,
            "adversarial_prediction": after,
            "ids": batch.ids,
        }
        on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write(folder / EXAMPLES, lambda path: save_file(on_cpu, path))

    context.on_main(save)


def remove_checkpoints(folder: Path) -> None:
    """Delete what only an unfinished run needs."""
    for name in ("checkpoint", "checkpoint.new", "checkpoint.old"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for rest in folder.glob("round-*"):
        shutil.rmtree(rest, ignore_errors=True)

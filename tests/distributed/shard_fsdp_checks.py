"""Masks of models that FSDP2 has sharded; run by torchrun on 2 and 3 processes (see test_shard_fsdp.py)."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from sparse_robust.attacks import PGD
from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, cut, select_kth
from sparse_robust.pruning import MaskViolation, enforce, prune
from sparse_robust.training.sharding import Mirror, unsharded
from tests.distributed.shard_network import Network, batch, make
from tests.distributed.shard_ranks import Checks, Traffic, same_everywhere

check = Checks()


def mesh() -> object:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def sharded(model: Network) -> Network:
    """Shard a copy of a model in three units, as a real one is: two blocks, and the rest with the root."""
    copied = copy.deepcopy(model)
    fully_shard(copied.stem)
    fully_shard(copied.body)
    fully_shard(copied)
    return copied


def whole(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def refuses(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    try:
        call()
    except error as found:
        assert all(word in str(found) for word in words), str(found)
    else:
        raise AssertionError(f"expected {error.__name__}")


few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, float("inf")])
shapes = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=4)


@check
def any_shapes_are_cut_as_if_they_were_whole() -> None:
    """Ties, empty shards, layers smaller than the number of processes, masks, replicated tensors among sharded ones."""

    @settings(
        max_examples=60, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(shapes, st.randoms(use_true_random=False), st.booleans(), st.booleans(), st.booleans())
    def run(sizes: list[list[int]], random: object, magnitude: bool, masked: bool, replicate: bool) -> None:
        generator = torch.Generator().manual_seed(random.getrandbits(30))  # type: ignore[attr-defined]
        values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, float("inf")])
        scores = {f"layer{9 - i}": values[torch.randint(7, size, generator=generator)] for i, size in enumerate(sizes)}
        keep = None
        if masked:
            keep = Masks.from_bools({n: torch.rand(s.shape, generator=generator) > 0.3 for n, s in scores.items()})
        alive = keep.count() if keep is not None else sum(score.numel() for score in scores.values())
        count = int(torch.randint(alive + 1, (), generator=generator))
        placed: dict[str, Tensor] = {n: distribute_tensor(s, mesh(), [Shard(0)]) for n, s in scores.items()}
        first = next(iter(scores))
        if replicate:
            placed[first] = scores[first]
        masks = cut(placed, count, keep, magnitude=magnitude)
        assert masks == cut(scores, count, keep, magnitude=magnitude) and masks.names() == tuple(scores)
        if count:
            found = select_kth(placed, count, keep, magnitude=magnitude)
            assert found == select_kth(scores, count, keep, magnitude=magnitude)

    run()


@check
def a_sharded_model_is_pruned_as_a_whole_one() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = make().to(dtype)
        parts = sharded(model)
        for options in ({}, {"scope": "layerwise"}, {"score": "random", "seed": 3}, {"stem": False}, {"head": True}):
            expected = prune(model, 0.7, **options)
            found = prune(parts, 0.7, **options)
            assert found == expected and found.names() == expected.names(), options
            assert prune(parts, 0.9, keep=found, **options) == prune(model, 0.9, keep=expected, **options)
        assert same_everywhere(found.digest())


@check
def hybrid_sharding_counts_every_weight_once() -> None:
    """Two dimensions of the mesh: weights are replicated over one and sharded over the other."""
    if dist.get_world_size() % 2:
        return
    grid = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    model = make()
    parts = copy.deepcopy(model)
    fully_shard(parts, mesh=grid)
    assert prune(parts, 0.8) == prune(model, 0.8)


@check
def only_counts_and_bits_travel() -> None:
    model = nn.Sequential(nn.Linear(700, 600), nn.ReLU(), nn.Linear(600, 10))
    weights = 700 * 600
    for parameter in model.parameters():  # processes share no generator
        dist.broadcast(parameter.data, src=0)
    expected = prune(model, 0.9)
    fully_shard(model)
    with Traffic() as traffic:
        found = prune(model, 0.9)
    assert found == expected
    assert set(traffic.bytes) == {"allreduce_"}
    assert weights // 8 <= sum(traffic.bytes.values()) <= weights // 8 + 64 * 1024  # the weights take 4 bytes each
    with Traffic() as traffic:
        select_kth([model[0].weight], 1000)
    assert sum(traffic.bytes.values()) <= 64 * 1024


@check
def nan_on_one_process_is_named_on_all() -> None:
    model = sharded(make())
    last = dist.get_rank() == dist.get_world_size() - 1
    if last:
        with torch.no_grad():
            model.body[0].weight.to_local().view(-1)[-1] = float("nan")
    refuses(lambda: prune(model, 0.5), UsageError, "NaN in body.0.weight (1 values)")
    refuses(
        lambda: cut({"w": model.stem.weight}, 10**6),
        UsageError,
        "cannot remove 1000000 weights: expected from 0 to 189",
    )


@check
def other_ways_to_shard_are_refused() -> None:
    columns = distribute_tensor(torch.randn(6, 6), mesh(), [Shard(1)])
    refuses(lambda: cut({"w": columns}, 3), UsageError, "sharded by rows of the first dimension")
    copies = distribute_tensor(torch.arange(36.0).view(6, 6), mesh(), [Replicate()])
    assert cut({"w": copies}, 3) == cut({"w": torch.arange(36.0).view(6, 6)}, 3)
    wrong = Masks.full({"stem.weight": torch.zeros(7, 3, 3, 2)})
    refuses(lambda: wrong.apply_(sharded(make())), UsageError, "stem.weight", "(7, 3, 3, 3)")


@check
def masks_are_applied_to_shards() -> None:
    model = make()
    with torch.no_grad():
        model.body[0].weight.view(-1)[:40] = float("nan")  # cleared where it is pruned, kept elsewhere
    generator = torch.Generator().manual_seed(0)
    masks = Masks.from_bools(
        {n: torch.rand(s, generator=generator) > 0.5 for n, s in Masks.full(model).shapes().items()}
    )
    parts = sharded(model)
    parts.eval()(batch(0)[0])  # leaves the root's weights gathered: writing to those would be lost
    masks.apply_(parts)
    masks.apply_(model)
    found = whole(parts)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def optimizers(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {
        "sgd": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4),
        "foreach": torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, foreach=True
        ),
        "adamw": torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1),
        "rmsprop": torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-3),
    }


def is_positive_zero(tensor: Tensor) -> bool:
    return not tensor.contiguous().view(torch.uint8).any()


@check
def enforcement_holds_on_shards_after_every_step() -> None:
    """And the weights are those of one process with the whole batch: momentum, decay and clipping included."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for name in ("sgd", "foreach", "adamw", "rmsprop"):
        alone, parts = make(norm=False), sharded(make(norm=False))
        masks = prune(alone, 0.8)
        sides = []
        for model in (alone, parts):
            optimizer = optimizers(model)[name]
            sides.append((model, optimizer, enforce(optimizer, model, masks)))
        for step in range(12):
            images, labels = batch(step)
            norms = []
            for model, optimizer, enforcement in sides:
                mine = slice(None) if model is alone else slice(rank, None, world)
                F.cross_entropy(model(images[mine]), labels[mine]).backward()
                enforcement.mask_gradients_()
                norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
                optimizer.step()
            torch.testing.assert_close(norms[1].full_tensor(), norms[0], rtol=1e-4, atol=1e-6)
            for layer in masks:
                weight = parts.get_parameter(layer)
                pruned = distribute_tensor(~masks[layer], weight.device_mesh, weight.placements).to_local()
                slots = [value for value in optimizer.state[weight].values() if isinstance(value, DTensor)]
                assert slots and weight.grad is not None
                for tensor in (weight, weight.grad, *slots):
                    assert is_positive_zero(tensor.detach().to_local()[pruned])
            sides[1][2].verify()
            for _, optimizer, _ in sides:
                optimizer.zero_grad()
        found = whole(parts)
        for layer, tensor in alone.state_dict().items():
            torch.testing.assert_close(found[layer], tensor, rtol=1e-4, atol=1e-5)


@check
def what_breaks_the_masks_of_a_shard_is_seen() -> None:
    model = sharded(make())
    masks = prune(model, 0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    enforcement = enforce(optimizer, model, masks)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    enforcement.verify()
    state = optimizer.state[model.body[0].weight]["momentum_buffer"]
    state.to_local().fill_(-0.0)
    if state.to_local().numel():
        refuses(enforcement.verify, MaskViolation, "optimizer state 'momentum_buffer' of body.0.weight")
    optimizer.step()
    enforcement.verify()
    refuses(lambda: enforce(torch.optim.SGD(make().parameters(), lr=0.1), model, masks), UsageError, "does not hold")


@check
def attacks_on_unsharded_weights_issue_no_collective() -> None:
    model = make()
    parts = sharded(model)
    images, labels = batch(dist.get_rank(), size=3 + dist.get_rank())  # as many passes as a process likes
    attack = PGD(steps=2 + dist.get_rank(), step_size=0.02, seed=1)
    for mode in ("eval", "train_frozen"):
        attack = PGD(steps=2 + dist.get_rank(), step_size=0.02, seed=1, mode=mode)
        expected = attack(model, images, labels, eps=0.1)
        with unsharded(parts) as plain:
            assert type(plain) is Network and type(plain.stem) is nn.Conv2d
            with Traffic() as traffic:
                found = attack(plain, images, labels, eps=0.1)
        assert traffic.bytes == {} and torch.equal(found, expected)
    with Traffic() as traffic, unsharded(parts):
        pass
    numel = sum(parameter.numel() for parameter in model.parameters())
    assert 0 < sum(traffic.bytes.values()) < 12 * numel  # gathered once
    assert all(isinstance(parameter, DTensor) for parameter in parts.parameters())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole(parts).items())


@check
def training_goes_on_around_the_unsharded_weights() -> None:
    """The attack changes nothing but the statistics that it is told to, and the next update is what it would be."""
    one, other = sharded(make()), sharded(make())
    attack = PGD(steps=2, step_size=0.02, mode="train")
    for step in range(3):
        images, labels = batch(step)
        for model in (one, other):
            if model is one:
                with unsharded(model) as plain:
                    attack(plain, images, labels, eps=0.1)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert int(one.norm.num_batches_tracked) == 9 and int(other.norm.num_batches_tracked) == 3
    first, second = whole(one), whole(other)
    assert all(torch.equal(first[name], second[name]) for name, _ in make().named_parameters())


@check
def a_mirror_follows_and_shares_the_statistics() -> None:
    model = make()
    parts = sharded(model)
    mirror = Mirror(parts, model)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(parts.parameters(), lr=0.1)
    F.cross_entropy(parts(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert torch.equal(model.stem.weight, before["stem.weight"])
    with Traffic() as traffic:
        mirror.refresh()
    assert not torch.equal(model.stem.weight, before["stem.weight"]) and traffic.bytes
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole(parts).items())
    assert set(dict(model.named_parameters())) == set(dict(make().named_parameters()))


@check
def masks_survive_saving_and_loading() -> None:
    model = sharded(make())
    masks = prune(model, 0.8)
    masks.apply_(model)
    state = whole(model)
    fresh, again = make(seed=1), sharded(make(seed=2))
    fresh.load_state_dict(state)
    set_model_state_dict(again, state, options=StateDictOptions(full_state_dict=True))
    for layer in masks:
        assert is_positive_zero(fresh.get_parameter(layer).detach()[~masks[layer]])
    assert prune(fresh, 0.8) == prune(again, 0.8) == masks


if __name__ == "__main__":
    check.run()

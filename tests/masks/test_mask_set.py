"""The mask set: counts, immutability, algebra against plain bool tensors, and use on a model."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, unwrap

shapes = st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), min_size=1, max_size=4)


@st.composite
def bools(draw: st.DrawFn, sizes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return {f"layer{i}.weight": torch.rand(size, generator=generator) < density for i, size in enumerate(sizes)}


pairs = shapes.flatmap(lambda sizes: st.tuples(bools(sizes), bools(sizes), bools(sizes)))


def flat(keep: dict[str, Tensor]) -> Tensor:
    return torch.cat([mask.reshape(-1) for mask in keep.values()])


@given(pairs)
def test_masks_behave_as_the_bool_tensors_they_came_from(three: tuple[dict[str, Tensor], ...]) -> None:
    a, b, _ = three
    masks = Masks.from_bools(a)
    assert masks.names() == tuple(a) and list(masks) == list(a) and len(masks) == len(a)
    assert masks.shapes() == {name: tuple(mask.shape) for name, mask in a.items()}
    for name, mask in a.items():
        assert masks[name].dtype == torch.bool and torch.equal(masks[name], mask)
    x, y = flat(a), flat(b)
    assert masks.count() == int(x.sum()) and masks.numel() == x.numel()
    assert [(kept, numel) for _, _, kept, numel in masks.layers()] == [(int(m.sum()), m.numel()) for m in a.values()]
    if x.numel():
        assert masks.density == pytest.approx(x.double().mean().item())
        assert masks.sparsity == pytest.approx(1 - masks.density)
    other = Masks.from_bools(b)
    for got, expected in ((masks & other, x & y), (masks | other, x | y), (~masks, ~x)):
        assert torch.equal(flat({name: got[name] for name in got}), expected)
        assert got.count() == int(expected.sum())
    assert (masks <= other) == bool((~x | y).all())
    assert (masks == other) == torch.equal(x, y)


@given(pairs)
def test_the_algebra_is_boolean(three: tuple[dict[str, Tensor], ...]) -> None:
    a, b, c = map(Masks.from_bools, three)
    assert a & b == b & a and a | b == b | a and ~~a == a
    assert ~(a & b) == ~a | ~b
    assert a & (b | c) == (a & b) | (a & c)
    assert a & b <= a <= a | b and a <= a and b <= a | b
    assert (a & ~a).count() == 0 and (a | ~a).count() == a.numel()
    assert (a <= b) == (a & b == a)
    assert 0 <= a.iou(b) <= 1 and a.iou(b) == b.iou(a)
    assert len({a, Masks.from_bools(three[0])}) == 1


@given(pairs)
def test_packing_comes_back(three: tuple[dict[str, Tensor], ...]) -> None:
    masks = Masks.from_bools(three[0])
    again = Masks.from_packed(masks.tensors(), masks.shapes())
    assert again == masks and again.digest() == masks.digest() and hash(again) == hash(masks)
    assert Masks.from_stored(masks.tensors(), masks.metadata(), source="memory") == masks
    assert pickle.loads(pickle.dumps(masks)) == masks == copy.deepcopy(masks)


def test_masks_never_change() -> None:
    keep = {"w": torch.tensor([True, False, True])}
    masks = Masks.from_bools(keep)
    digest = masks.digest()
    keep["w"].fill_(False)
    masks["w"].fill_(False)
    masks.tensors()["w"].fill_(0)
    masks.shapes().clear()
    packed = masks.tensors()
    other = Masks.from_packed(packed, masks.shapes())
    packed["w"].fill_(0)
    assert masks["w"].tolist() == other["w"].tolist() == [True, False, True]
    assert Masks.from_packed(masks.tensors(), masks.shapes()).digest() == digest
    with pytest.raises(AttributeError):
        masks._shapes = {}  # type: ignore[misc]


def test_digest_names_content_and_nothing_else() -> None:
    one, two = torch.tensor([True, False]), torch.tensor([[True, True]])
    masks = Masks.from_bools({"a": one, "b": two})
    assert masks.digest() == Masks.from_bools({"b": two, "a": one}).digest()
    assert len(masks.digest()) == 64
    different = [{"a": one, "c": two}, {"a": ~one, "b": two}, {"a": one, "b": two.T}, {"a": one}, {"a": two, "b": one}]
    digests = {Masks.from_bools(keep).digest() for keep in different}
    assert len(digests | {masks.digest()}) == 6
    assert masks != "masks"


@pytest.mark.acceptance("double-win", "A-35")
def test_overlap_of_a_mask_with_itself_its_complement_and_by_chance() -> None:
    masks = Masks.from_bools({"a": torch.rand(1000) < 0.3, "b": torch.rand(10, 50) < 0.6})
    assert masks.iou(masks) == 1 and masks.iou(~masks) == 0
    empty = masks & ~masks
    assert empty.iou(empty) == 1 and empty.iou(masks) == 0
    for k, expected in ((6, 0.151), (7, 0.117), (8, 0.092), (10, 0.057), (11, 0.045), (15, 0.018)):
        kept = round(0.8**k * 1_000_000)
        same = Masks.from_bools({"a": torch.arange(1_000_000) < kept})
        assert same.chance_iou(same) == pytest.approx(expected, abs=5e-4)
        assert same.chance_iou(same) == pytest.approx(same.density / (2 - same.density))


def test_chance_overlap_is_what_random_masks_have() -> None:
    def random(seed: int) -> Masks:
        generator = torch.Generator().manual_seed(seed)
        return Masks.from_bools(
            {"a": torch.rand(200_000, generator=generator) < 0.1, "b": torch.rand(100_000, generator=generator) < 0.7}
        )

    one, two = random(1), random(2)
    assert one.iou(two) == pytest.approx(one.chance_iou(two, layerwise=True), abs=0.003)
    assert one.only(["a"]).iou(two.only(["a"])) == pytest.approx(one.only(["a"]).chance_iou(two.only(["a"])), abs=0.003)
    assert one.chance_iou(two) < 0.25 < one.chance_iou(two, layerwise=True)


def net() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), flat=nn.Flatten(), fc=nn.Linear(4 * 36, 5))
    )


def masks_of(model: nn.Module) -> Masks:
    return Masks.from_bools({"conv.weight": torch.rand(4, 3, 3, 3) > 0.5})


@pytest.mark.acceptance("double-win", "A-16")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_apply_clears_whatever_is_under_the_mask(poison: float) -> None:
    model = net().eval()
    masks = masks_of(model)
    keep = masks["conv.weight"]
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model.conv.weight[~keep] = 0
        expected = model(x)
        model.conv.weight[~keep] = poison
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks.apply_(model)
    after = model.state_dict()
    assert not after["conv.weight"][~keep].view(torch.int32).any(), "+0.0, not -0.0"
    assert torch.equal(after["conv.weight"][keep], before["conv.weight"][keep])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "conv.weight")
    assert torch.equal(model(x), expected)


def test_apply_keeps_the_memory_format_and_the_precision() -> None:
    model = net().to(torch.bfloat16).to(memory_format=torch.channels_last)
    masks = masks_of(model)
    before = model.conv.weight.clone()
    masks.apply_(model)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.conv.weight, torch.where(masks["conv.weight"], before, 0))


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.parallel.DistributedDataParallel,
        torch.compile,
        torch.optim.swa_utils.AveragedModel,
        lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    ],
)
def test_wrapped_models_are_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = net()
    wrapped = wrap(model)
    inner = unwrap(wrapped)
    assert list(inner.state_dict()) == list(model.state_dict())
    assert Masks.full(wrapped).names() == ("conv.weight",)
    masks = masks_of(model)
    masks.apply_(wrapped)
    assert torch.equal(inner.conv.weight == 0, ~masks["conv.weight"])


def test_a_model_that_is_not_wrapped_is_left_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Conv2d(1, 1, 1)

    model = Net()
    assert unwrap(model) is model
    assert Masks.full(model).names() == ("module.weight",)


def test_masks_of_another_model_are_refused_and_change_nothing() -> None:
    model = net()
    before = model.conv.weight.clone()
    shape = (4, 3, 5, 5)
    keep = {f"block{i}.weight": torch.zeros(2, dtype=torch.bool) for i in range(7)}
    wrong = Masks.from_bools({"conv.weight": torch.zeros(shape, dtype=torch.bool), **keep})
    with pytest.raises(UsageError) as caught:
        wrong.apply_(model)
    message = str(caught.value)
    assert "8 of 8 tensors do not fit" in message and "and 3 more" in message
    assert f"conv.weight: expected shape {shape}, the model has (4, 3, 3, 3)" in message
    assert "block0.weight: expected shape (2,), the model has no such parameter" in message
    assert torch.equal(model.conv.weight, before)


def test_full_keeps_everything() -> None:
    full = Masks.full(net())
    assert full.names() == ("conv.weight",) and full.sparsity == 0 and full.count() == full.numel() == 108
    assert Masks.full({"w": torch.zeros(3, 3)}).count() == 9
    assert repr(full) == "Masks(1 tensors, 108 of 108 weights kept, sparsity 0.00 %)"


def test_only_keeps_some_layers_in_the_order_asked_for() -> None:
    masks = Masks.from_bools({name: torch.rand(9) > 0.5 for name in "abc"})
    some = masks.only(["c", "a"])
    assert some.names() == ("c", "a") and torch.equal(some["a"], masks["a"])
    assert "a" in masks and "d" not in masks


GOOD = {"w": torch.ones(9, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Masks.from_bools({}), "at least one tensor"),
        (lambda: Masks.from_bools({"w": torch.ones(3)}), "mask of w must be a bool tensor, got torch.float32"),
        (lambda: Masks.from_bools({"w": [True]}), "mask of w must be a bool tensor, got list"),
        (lambda: Masks.from_packed({"w": torch.zeros(1, dtype=torch.uint8)}, {"w": (9,)}), r"takes uint8 \(2,\)"),
        (lambda: Masks.from_packed({"w": torch.zeros(2)}, {"w": (9,)}), "torch.float32"),
        (lambda: Masks.from_packed({"w": torch.tensor([0, 2], dtype=torch.uint8)}, {"w": (9,)}), "beyond its 9"),
        (lambda: Masks.from_packed({}, {"w": (9,)}), r"missing \['w'\]"),
        (lambda: Masks.from_bools(GOOD)["v"], "unknown masked weight 'v'.*Known: w"),
        (lambda: Masks.from_bools(GOOD).only(["v"]), "unknown masked weight 'v'"),
        (lambda: Masks.from_bools(GOOD) & Masks.full({"w": torch.zeros(8)}), r"w is \(9,\) here and \(8,\) there"),
        (lambda: Masks.from_bools(GOOD).iou(Masks.full({"v": torch.zeros(9)})), r"w is \(9,\) here and None there"),
        (lambda: Masks.from_bools(GOOD) <= 3, "expected Masks, got int"),
        (lambda: Masks.full(nn.ReLU()), "ReLU has no prunable weight"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()

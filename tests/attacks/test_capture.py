"""Captured attacks: what is a new graph and what is not, with a stand-in for the device that records and replays."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_robust.attacks import FGSM, PGD, RGD
from sparse_robust.attacks.capture import MOST, Graphs
from sparse_robust.attacks.replica import Replica, make_replica
from sparse_robust.errors import UsageError
from sparse_robust.objectives.crafting import NFGSM, NearPGD


class Recorder:
    """Captures like a device: the work is recorded once, and a replay writes the same memory from the same memory."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        self.captures += 1
        output = torch.full_like(function(), torch.nan)  # a capture runs nothing

        def replay() -> None:
            self.replays += 1
            output.copy_(function())

        return replay, output


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def captured(trained: Any, recorder: Recorder) -> Iterator[Replica]:
    replica = make_replica(trained.model, trained.x)
    replica.graphs = Graphs(recorder)
    yield replica
    assert not replica.graphs.failure


ATTACK = PGD(steps=3, step_size="2/255")


@pytest.mark.parametrize(
    "attack",
    [
        ATTACK,
        FGSM(),
        PGD(norm="L2", steps=2),
        PGD(norm="L1", steps=2, momentum=0.9),
        PGD(steps=2, loss="kl"),
        PGD(steps=0),
        NFGSM(),
        NearPGD(steps=2, loss="kl"),
        RGD(steps=2),
        RGD(steps=2, step_size=10.0, random_start=True, recursion="clipped"),
    ],
    ids=lambda attack: f"{attack.name}-{attack.norm}-{attack.loss}",
)
def test_replays_with_other_inputs_keys_and_weights_are_the_attack_itself(
    attack: PGD | RGD, trained: Any, captured: Replica, recorder: Recorder
) -> None:
    model, x, y, ids = trained
    plain, eps = make_replica(model, x), 0.1 if attack.norm == "Linf" else 1.5
    parts = [slice(0, 50), slice(50, 100), slice(100, 150)]
    found = []
    for part, seed in zip(parts, (0, 1, 2**40), strict=True):
        call = {"eps": eps, "ids": ids[part]}
        found.append(replace(attack, seed=seed)(captured.target, x[part], y[part], **call))
        assert torch.equal(found[-1], replace(attack, seed=seed)(plain, x[part], y[part], **call))
        for parameter in model.parameters():
            parameter.data *= 1.1
        captured.refresh()
        plain.refresh()
    assert (recorder.captures, recorder.replays) == (1, 3)
    again = attack(plain, x[:50], y[:50], eps=eps, ids=ids[:50])
    assert attack.steps == 0 or not torch.equal(again, found[0])  # weights matter
    assert len({tensor.data_ptr() for tensor in found}) == 3  # results are the caller's own


def test_noise_follows_ids_and_seed(trained: Any, captured: Replica, recorder: Recorder) -> None:
    _, x, y, ids = trained
    start = PGD(steps=0)
    first = start(captured, x, y, eps=0.1, ids=ids)
    assert not torch.equal(start(captured, x, y, eps=0.1, ids=ids + 1), first)
    assert not torch.equal(replace(start, seed=1)(captured, x, y, eps=0.1, ids=ids), first)
    assert torch.equal(start(captured, x, y, eps=0.1, ids=ids), first)
    assert (recorder.captures, recorder.replays) == (1, 4)


def test_what_a_graph_cannot_vary_is_captured_anew(trained: Any, captured: Replica, recorder: Recorder) -> None:
    _, x, y, ids = trained
    calls: list[tuple[PGD, float, int]] = [
        (ATTACK, 0.1, 20), (ATTACK, 0.2, 20), (replace(ATTACK, steps=2), 0.1, 20), (ATTACK, 0.1, 19),
        (replace(ATTACK, step_size="1/255"), 0.1, 20), (replace(ATTACK, loss="cw"), 0.1, 20), (FGSM(), 0.1, 20),
    ]  # fmt: skip
    plain = make_replica(trained.model, x)
    for number, (attack, eps, n) in enumerate(calls, 1):
        got = attack(captured, x[:n], y[:n], eps=eps, ids=ids[:n])
        assert torch.equal(got, attack(plain, x[:n], y[:n], eps=eps, ids=ids[:n]))
        assert recorder.captures == number and captured.graphs is not None
        assert len(captured.graphs) == min(number, MOST)
    for attack, eps, n in calls[-MOST:]:  # the last ones are still there, and the first is not
        attack(captured, x[:n], y[:n], eps=eps, ids=ids[:n])
    assert recorder.captures == len(calls)
    attack, eps, n = calls[0]
    attack(captured, x[:n], y[:n], eps=eps, ids=ids[:n])
    assert recorder.captures == len(calls) + 1


def test_the_least_recently_used_graph_goes(recorder: Recorder) -> None:
    graphs, inputs = Graphs(recorder), (torch.ones(2),)
    for kind in [*range(MOST), 0, MOST, 0]:  # 0 is used again before the last is captured
        assert torch.equal(graphs.run(kind, lambda x: x + 1, inputs), inputs[0] + 1)
    assert recorder.captures == MOST + 1


@pytest.mark.parametrize(
    "images", [torch.rand(4, 3, 8, 8).double(), torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last)]
)
def test_type_and_layout_belong_to_the_kind(images: Tensor, recorder: Recorder) -> None:
    graphs = Graphs(recorder)
    for x in (torch.rand(4, 3, 8, 8), images):
        assert torch.equal(graphs.run("kind", lambda x: 2 * x, (x,)), 2 * x)
    assert recorder.captures == 2


def test_where_capturing_fails_attacks_run_as_they_are_and_it_is_said_once(
    trained: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(function: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model, x, y, ids = trained
    replica = make_replica(model, x)
    replica.graphs = Graphs(refuse)
    assert replica.capture
    with caplog.at_level(logging.WARNING, logger="sparse_robust.attacks.capture"):
        for seed in (0, 1):
            attack = replace(ATTACK, seed=seed)
            expected = attack(make_replica(model, x), x, y, eps=0.1, ids=ids)
            assert torch.equal(attack(replica, x, y, eps=0.1, ids=ids), expected)
    assert not replica.capture
    assert [record.getMessage() for record in caplog.records] == [
        "attacks on the replica run without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]


def test_the_cpu_captures_nothing(trained: Any) -> None:
    for capture in (True, False):
        replica = make_replica(trained.model, trained.x, capture=capture)
        assert replica.graphs is None and not replica.capture and replica.target is replica


def test_restarts_and_evaluations_go_without(trained: Any, captured: Replica, recorder: Recorder) -> None:
    _, x, y, ids = trained
    PGD(steps=1, n_restarts=2)(captured, x[:8], y[:8], eps=0.1, ids=ids[:8])
    ATTACK.run(captured, x[:8], y[:8], eps=0.1, ids=ids[:8])
    assert recorder.captures == 0


# ---- batch-norm modes


def test_a_replica_with_batch_statistics_is_the_model_attacked_in_that_mode(trained: Any) -> None:
    model, x, y, ids = trained
    attack = PGD(steps=3, mode="train_frozen")
    replica = make_replica(model, x, mode="train_frozen", channels_last=False)
    assert replica.mode == "train_frozen" and replica.folded == () and replica.module is not None
    buffers = [buffer.clone() for module in (model, replica.module) for buffer in module.buffers()]
    for training in (False, True):  # whatever mode its owner has left the model in
        model.train(training)
        expected = attack(model, x, y, eps=0.1, ids=ids)
        assert torch.equal(attack(replica.target, x, y, eps=0.1, ids=ids), expected)
    left = [buffer for module in (model, replica.module) for buffer in module.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(buffers, left, strict=True))
    model.eval()
    assert not torch.equal(PGD(steps=3)(model, x, y, eps=0.1, ids=ids), expected)


def test_layers_that_are_frozen_in_a_model_in_training_stay_frozen(trained: Any) -> None:
    model, x, y, ids = trained
    model.train()
    next(part for part in model.modules() if isinstance(part, _BatchNorm)).eval()
    attack = PGD(steps=2, mode="train_frozen")
    replica = make_replica(model, x, mode="train_frozen", channels_last=False)
    expected = attack(model, x, y, eps=0.1, ids=ids)
    assert torch.equal(attack(replica, x, y, eps=0.1, ids=ids), expected)
    everywhere = make_replica(copy.deepcopy(model).train(), x, mode="train_frozen", channels_last=False)
    assert not torch.equal(attack(everywhere, x, y, eps=0.1, ids=ids), expected)


def test_modes_that_do_not_fit_are_refused(trained: Any) -> None:
    model, x, y, _ = trained
    with pytest.raises(UsageError, match="'eval' or 'train_frozen', got 'train': such an attack updates"):
        make_replica(model, x, mode="train")
    with pytest.raises(UsageError, match="'eval' or 'train_frozen', got 'bogus'"):
        make_replica(model, x, mode="bogus")
    with pytest.raises(UsageError, match="works in mode 'train_frozen', but the replica is in 'eval'"):
        PGD(mode="train_frozen")(make_replica(model, x), x, y, eps=0.1)


def test_what_has_no_copy_is_attacked_itself(trained: Any) -> None:
    model, x, y, ids = trained
    replica = make_replica(lambda images: model(images), x)
    assert replica.target is replica.model is not replica
    expected = ATTACK(model, x, y, eps=0.1, ids=ids)
    assert torch.equal(ATTACK(replica.target, x, y, eps=0.1, ids=ids), expected)


# ---- equality with attacking the model, option by option


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"fold": False, "channels_last": False}, 0.0),  # a frozen copy: the same bits
        ({"fold": False}, 1e-4),  # convolutions of another layout round differently
        ({"channels_last": False}, 1e-4),
        ({}, 1e-4),
        ({"precision": "bf16"}, 0.1),
    ],
)
def test_an_attack_on_a_replica_is_the_attack_on_the_model(
    options: dict[str, Any], tolerance: float, trained: Any
) -> None:
    """Images of one raw-gradient step, which shows every difference of the gradients; ``tolerance`` of the step."""
    model, x, y, ids = trained
    attack = PGD(norm="L2", steps=1, step_size=0.2, random_start=False)
    expected = attack(model, x, y, eps=0.5, ids=ids)
    got = attack(make_replica(model, x, **options).target, x, y, eps=0.5, ids=ids)
    assert float((got - expected).flatten(1).norm(dim=1).max()) <= tolerance * 0.2
    assert (tolerance == 0) == torch.equal(got, expected)


def test_a_compiled_replica_computes_no_gradients_of_weights(trained: Any) -> None:
    """A compiled model asks its convolutions for all gradients that its parameters take."""
    from torch._dynamo.backends.common import aot_autograd

    masks: list[list[bool]] = []

    def backward(graph: Any, _: Any) -> Any:
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default:
                masks.append(list(node.args[-1]))
        return graph.forward

    def compiled(module: nn.Module) -> Any:
        return torch.compile(
            module, backend=aot_autograd(fw_compiler=lambda graph, _: graph.forward, bw_compiler=backward)
        )

    model, x, y, ids = trained
    leaf = x.clone().requires_grad_(True)
    torch.autograd.grad(compiled(copy.deepcopy(model))(leaf).sum(), leaf)
    assert [mask[:2] for mask in masks] == [[True, True]] * 2
    masks.clear()
    replica = make_replica(model, x)
    expected = ATTACK(replica, x, y, eps=0.1, ids=ids)
    assert replica.module is not None
    replica._compute = compiled(replica.module)
    assert torch.equal(ATTACK(replica, x, y, eps=0.1, ids=ids), expected)
    assert masks and all(mask[:2] == [True, False] for mask in masks)

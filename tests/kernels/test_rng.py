"""Philox: the published vectors, a second implementation in Python integers, and what counting is for."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_robust_kernels import backends
from sparse_robust_kernels.rng import philox_uniform, reference, signed

# Counter, key and output of Philox4x32-10 in the known-answer file of Random123.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def slow_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 with Python's integers, which have no width."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for number in range(10):
        if number:
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        high0, low0 = divmod(0xD2511F53 * x0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x2, 2**32)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
    return [x0, x1, x2, x3]


def slow_uniform(sample: int, numel: int, key: int, stream: int) -> list[float]:
    values = []
    for element in range(numel):
        counter = [element // 4, stream, sample % 2**32, (sample % 2**64) >> 32]
        values.append((slow_philox(counter, [key % 2**32, key >> 32])[element % 4] >> 8) / 2**24)
    return values


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in words(counter))
    k0, k1 = words(key)
    assert [int(word) for word in reference.philox((c0, c1, c2, c3), (k0, k1))] == words(expected)
    assert slow_philox(words(counter), words(key)) == words(expected)


@given(
    samples=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    numel=st.integers(0, 13),
    key=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**32 - 1),
)
@example(samples=[0, -1, 2**32, 2**63 - 1], numel=9, key=2**64 - 1, stream=2**32 - 1)
@example(samples=[7], numel=1, key=0, stream=0)
def test_numbers_are_those_of_the_slow_implementation(samples: list[int], numel: int, key: int, stream: int) -> None:
    expected = [slow_uniform(sample, numel, key, stream) for sample in samples]
    for arrays in (True, False):
        with mock.patch.object(reference, "_has_arrays", lambda: arrays):  # noqa: B023
            drawn = philox_uniform(torch.tensor(samples), numel, key=key, stream=stream)
            assert drawn.dtype == torch.float32 and drawn.shape == (len(samples), numel)
            assert drawn.tolist() == expected
            held = torch.tensor(signed(key, 64))
            assert torch.equal(philox_uniform(torch.tensor(samples), numel, key=held, stream=stream), drawn)


def test_a_row_depends_on_its_id_alone() -> None:
    ids = torch.tensor([5, 900, 3, 2**40, 0, 77, 12])
    together = philox_uniform(ids, 50, key=11, stream=2)
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    assert torch.equal(philox_uniform(ids[order], 50, key=11, stream=2), together[order])
    for row, sample in enumerate(ids):
        assert torch.equal(philox_uniform(sample[None], 50, key=11, stream=2)[0], together[row])
    assert torch.equal(philox_uniform(ids, 17, key=11, stream=2), together[:, :17])


@pytest.mark.parametrize("arrays", [True, False])
def test_chunks_leave_no_trace(monkeypatch: pytest.MonkeyPatch, arrays: bool) -> None:
    ids = torch.arange(23)
    whole = philox_uniform(ids, 30, key=1, stream=0)
    monkeypatch.setattr(reference, "_has_arrays", lambda: arrays)
    monkeypatch.setattr(reference, "ARRAY_CHUNK" if arrays else "CHUNK", 20)
    assert torch.equal(philox_uniform(ids, 30, key=1, stream=0), whole)


def test_arrays_are_drawn_on_where_there_is_numpy_and_words_of_torch_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ids = torch.tensor([3, -1, 2**40]).repeat(2)[::2]  # as they lie in memory does not matter
    expected = philox_uniform(ids, 9, key=5, stream=ids & 7)
    monkeypatch.setattr(reference, "_rows", None)
    assert torch.equal(philox_uniform(ids, 9, key=5, stream=ids & 7), expected)
    monkeypatch.undo()
    monkeypatch.setattr(reference, "_rows_of_arrays", None)
    monkeypatch.setattr(reference, "_has_arrays", lambda: False)
    assert torch.equal(philox_uniform(ids, 9, key=5, stream=ids & 7), expected)


@pytest.mark.usefixtures("poison")
def test_numbers_are_uniform_and_neighbours_unrelated() -> None:
    ids = torch.arange(400)
    drawn = philox_uniform(ids, 500, key=3, stream=0)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, bins=20, min=0, max=1)
    # Chi-square with 19 degrees of freedom: above 43.8 once in a thousand generators.
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 43.8
    for other in (
        philox_uniform(ids + 1, 500, key=3, stream=0),
        philox_uniform(ids, 500, key=4, stream=0),
        philox_uniform(ids, 500, key=3 + 2**32, stream=0),
        philox_uniform(ids, 500, key=3, stream=1),
        drawn.roll(1, 1),
    ):
        correlation = float(torch.corrcoef(torch.stack([drawn.flatten(), other.flatten()]))[0, 1])
        assert abs(correlation) < 0.012, correlation  # five standard deviations over 200,000 pairs


def test_no_samples_and_no_elements() -> None:
    assert philox_uniform(torch.arange(0), 7, key=0, stream=0).shape == (0, 7)
    assert philox_uniform(torch.arange(3), 0, key=0, stream=0).shape == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": torch.zeros(2, dtype=torch.int32)}, "int64"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, "int64"),
        ({"numel": -1}, "numel"),
        ({"key": 2**64}, "key"),
        ({"key": -1}, "key"),
        ({"key": torch.zeros(1, dtype=torch.int64)}, r"key must be int64 \(\) beside ids, got torch.int64 \(1,\)"),
        ({"key": torch.tensor(1.0)}, "key must be int64"),
        ({"stream": 2**32}, "stream"),
        ({"backend": "abacus"}, "reference"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    given_arguments: dict[str, Any] = {"ids": torch.arange(2), "numel": 4, "key": 0, "stream": 0}
    with pytest.raises(ValueError, match=message):
        philox_uniform(**(given_arguments | arguments))


def test_the_reference_is_listed() -> None:
    assert "reference" in backends("rng.philox_uniform")

"""The ticket file: round trip, size, refusals."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import sha256_state
from sparse_robust.masks import Masks, storage
from sparse_robust.models import create_model, spec_of
from sparse_robust.pruning import prune
from sparse_robust.tickets import Ticket, TicketWarning

TINY = {"channels": (4, 6, 8, 10), "stem_width": 4}


def _model(seed: int = 0, **kwargs: object) -> nn.Module:
    return create_model("resnet10t", num_classes=10, in_chans=1, seed=seed, **{**TINY, **kwargs})


def _ticket(model: nn.Module) -> Ticket:
    return Ticket(
        masks=prune(model, 0.8),
        base_sha256=sha256_state(model.state_dict()),
        architecture=spec_of(model).to_dict(),
        provenance={"finder": "oneshot", "k": 7, "find": {"rate": 0.2}},
        evaluations=({"sa": 80.0},),
    )


@pytest.mark.acceptance("double-win", "A-40")
def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    ticket = _ticket(_model())
    ticket.save(tmp_path / "t.safetensors")
    loaded = Ticket.load(tmp_path / "t.safetensors")
    assert loaded == ticket and loaded.masks.names() == ticket.masks.names()
    assert all(torch.equal(loaded.masks[name], ticket.masks[name]) for name in ticket.masks)
    assert (tmp_path / "t.safetensors").stat().st_size <= ticket.masks.numel() / 8 + 64 * 1024


@pytest.mark.acceptance("double-win", "A-40")
def test_a_large_ticket_is_an_eighth_of_a_byte_a_weight(tmp_path: Path) -> None:
    masks = Masks.from_bools({f"layer{i}.weight": torch.rand(512, 512, 3, 3) > 0.9 for i in range(4)})
    Ticket(masks=masks, base_sha256="0" * 64).save(tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").stat().st_size <= masks.numel() / 8 + 64 * 1024


@pytest.mark.acceptance("double-win", "A-40")
def test_another_architecture_is_refused_and_left_alone() -> None:
    ticket, other = _ticket(_model()), _model(channels=(4, 6, 8, 12))
    before = sha256_state(other.state_dict())
    with pytest.raises(UsageError, match=r"layer4"):
        ticket.apply_(other)
    assert sha256_state(other.state_dict()) == before
    with pytest.raises(UsageError, match="another architecture"):
        ticket.verify(other)


def test_other_weights_of_the_same_architecture_draw_a_warning_and_fail_verification() -> None:
    model, other = _model(0), _model(1)
    ticket = _ticket(model)
    ticket.verify(model)
    with pytest.warns(TicketWarning, match="drawn from other weights"):
        ticket.apply_(other)
    with pytest.raises(UsageError, match="drawn from weights with sha256"):
        ticket.verify(_model(1))


def test_applying_to_its_own_weights_is_silent_and_masks_them(recwarn: pytest.WarningsRecorder) -> None:
    model = _model()
    ticket = _ticket(model)
    ticket.apply_(model)
    assert not [w for w in recwarn if issubclass(w.category, TicketWarning)]
    weights = dict(model.named_parameters())
    assert all((weights[name][~ticket.masks[name]] == 0).all() for name in ticket.masks)


def test_a_ticket_file_is_also_a_mask_file_but_not_the_other_way_round(tmp_path: Path) -> None:
    ticket = _ticket(_model())
    ticket.save(tmp_path / "ticket.safetensors")
    assert Masks.load(tmp_path / "ticket.safetensors") == ticket.masks
    ticket.masks.save(tmp_path / "masks.safetensors")
    with pytest.raises(FileError, match=r"no ticket.*Masks\.load"):
        Ticket.load(tmp_path / "masks.safetensors")


@pytest.mark.parametrize(
    "about", ["{", "[]", "{}", '{"format_version": "x"}', '{"format_version": 1, "base_sha256": ""}']
)
def test_damaged_metadata_is_named(tmp_path: Path, about: str) -> None:
    masks = prune(_model(), 0.5)
    storage.write(tmp_path / "t.safetensors", masks.tensors(), {**masks.metadata(), "ticket": about})
    with pytest.raises(FileError, match="damaged"):
        Ticket.load(tmp_path / "t.safetensors")


def test_a_later_format_asks_for_an_update(tmp_path: Path) -> None:
    ticket = _ticket(_model())
    ticket.save(tmp_path / "t.safetensors")
    tensors, metadata = storage.read(tmp_path / "t.safetensors")
    metadata["ticket"] = metadata["ticket"].replace('"format_version":1', '"format_version":99')
    storage.write(tmp_path / "t.safetensors", tensors, metadata)
    with pytest.raises(FileError, match="update sparse_robust"):
        Ticket.load(tmp_path / "t.safetensors")


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_never_loads_as_something_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Flip one byte or cut the file: a named error, or (a flip in provenance text) still the same masks."""
    folder = tmp_path_factory.mktemp("ticket")
    ticket = _ticket(_model())
    path = folder / "t.safetensors"
    ticket.save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        loaded = Ticket.load(path)
    except FileError as error:
        assert "t.safetensors" in str(error)
    else:
        assert loaded.masks == ticket.masks

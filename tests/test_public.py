"""The names that hold: what a user writes against."""

from pathlib import Path

import torch

import sparse_robust as sr


def test_the_public_names_do_what_they_say(tmp_path: Path) -> None:
    model = sr.create_model("resnet18", num_classes=10, in_chans=3, stem="small").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = sr.prune(model, sparsity=0.9, score="magnitude", scope="global", batches=None)
    assert isinstance(masks, sr.Masks)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert masks["layer1.0.conv1.weight"].dtype == torch.bool and "layer1.0.conv1.weight" in masks.names()
    assert abs(masks.sparsity - 0.9) < 1e-6 and masks.count() == round(0.1 * masks.numel())
    assert len(masks.digest()) == 64 and masks == masks and masks <= masks and (masks & masks) == masks
    masks.save(tmp_path / "masks.safetensors")
    assert sr.Masks.load(tmp_path / "masks.safetensors") == masks

    masks.apply_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sr.enforce(optimizer, model, masks)
    x, y = torch.rand(4, 3, 32, 32), torch.randint(10, (4,))
    model(x).logsumexp(1).sum().backward()
    optimizer.step()
    weight = model.get_parameter("layer1.0.conv1.weight")
    pruned = ~masks["layer1.0.conv1.weight"]
    assert (weight[pruned] == 0).all() and (optimizer.state[weight]["momentum_buffer"][pruned] == 0).all()

    attack = sr.attacks.PGD(norm="Linf", steps=2, step_size="2/255", n_restarts=1, seed=0)
    adversarial = attack(model, x, y, eps="8/255", ids=None)
    assert adversarial.shape == x.shape and (adversarial - x).abs().max() <= 8 / 255 + 1e-7
    result = sr.evaluate(model, [(x, y)], attacks=[attack], eps="8/255")
    assert 0 <= result.robust <= result.clean <= 1
    assert len(result.per_image.id) == 4 and set(result.counts) == {"forward", "backward", "queries"}

    ticket = sr.Ticket(masks=masks, base_sha256="0" * 64, provenance={"k": 1})
    ticket.save(tmp_path / "ticket.safetensors")
    loaded = sr.Ticket.load(tmp_path / "ticket.safetensors")
    assert loaded.masks == masks and loaded.base_sha256 == "0" * 64 and loaded.provenance == {"k": 1}

    weights = [torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])]
    assert sr.select_kth(weights, 2).value == 1.0
    assert sr.select_kth(weights, 1, keep=[torch.tensor([True, True]), torch.tensor([False, True])]).value == 1.0


def test_what_is_not_there_is_named() -> None:
    try:
        _ = sr.pruned
    except AttributeError as error:
        assert "prune" in str(error)
    else:
        raise AssertionError("sr.pruned should not exist")

"""Train the networks: python -m benchmarks.parity.train [NAME ...]. About a quarter of an hour on one core.

The loop and its attack are written out here, so that the networks do not depend on the code they serve to examine.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.parity import networks
from benchmarks.parity.networks import NETWORKS, Images, Network
from sparse_robust.seeding import derive_seed

BATCH = 100
STEPS = 7


def attack(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, generator: torch.Generator) -> Tensor:
    """Return Linf PGD examples: uniform start, steps of 2.5 eps / steps along the sign, the last iterate."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    moved = (x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(steps):
        moved.requires_grad_(True)
        (grad,) = torch.autograd.grad(F.cross_entropy(model(moved), y), moved)
        moved = torch.minimum(torch.maximum(moved.detach() + 2.5 * eps / steps * grad.sign(), low), high)
    return moved


def train(network: Network, images: Images) -> nn.Module:
    """PGD adversarial training (Madry et al., 2018) with AdamW and one cycle; batch norm is frozen while crafting."""
    model = network.build()
    generator = torch.Generator().manual_seed(derive_seed("parity", network.name) % 2**32)
    x, y = images[0].float() / 255, images[1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=network.lr, weight_decay=5e-4)
    batches = len(y) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.lr, network.epochs * batches)
    for epoch in range(network.epochs):
        began, correct = time.perf_counter(), 0
        eps = network.train_eps * min(1.0, (epoch + 1) / 5)  # a large radius from the first step on stops learning
        for chosen in torch.randperm(len(y), generator=generator)[: batches * BATCH].view(batches, BATCH):
            model.eval().requires_grad_(False)
            moved = attack(model, x[chosen], y[chosen], eps, STEPS, generator)
            model.train().requires_grad_(True)
            logits = model(moved)
            optimizer.zero_grad()
            F.cross_entropy(logits, y[chosen]).backward()
            optimizer.step()
            schedule.step()
            correct += int((logits.argmax(1) == y[chosen]).sum())
        share, seconds = correct / (batches * BATCH), time.perf_counter() - began
        print(f"{network.name} epoch {epoch + 1}/{network.epochs}: {share:.1%} robust, {seconds:.1f} s", flush=True)
    return model.eval().requires_grad_(False)


def accuracies(network: Network, model: nn.Module, images: Images) -> tuple[float, float]:
    """Return the share of images classified correctly: clean, and under PGD-20 at the training radius."""
    x, y = images[0].float() / 255, images[1]
    moved = attack(model, x, y, network.train_eps, 20, torch.Generator().manual_seed(0))
    clean, robust = (float((model(shown).argmax(1) == y).float().mean()) for shown in (x, moved))
    return clean, robust


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the networks of the parity benchmark that are not there yet.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(NETWORKS)}; default: all")
    parser.add_argument("--again", action="store_true", help="also those that are there")
    parser.add_argument("--threads", type=int, default=1, help="more than one may change bits; default: %(default)s")
    given = parser.parse_args()
    if set(given.names) - set(NETWORKS):
        parser.error(f"unknown network among {' '.join(given.names)}: choose from {', '.join(NETWORKS)}")
    torch.set_num_threads(given.threads)
    for name in given.names or NETWORKS:
        network = NETWORKS[name]
        if networks.path_of(network).exists() and not given.again:
            continue
        images, test = networks.read_images(network)
        model = train(network, images)
        networks.save(network, model, test)
        clean, robust = accuracies(network, model, test)
        print(
            f"{name}: {clean:.1%} clean, {robust:.1%} under PGD-20 at Linf {network.train_eps:g}, {len(test[1])} images"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

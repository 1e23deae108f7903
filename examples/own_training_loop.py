"""Prune a network, train it adversarially with the mask held, evaluate it; all without the trainer."""

import torch
from torch.nn import functional as F

import sparse_robust as sr
from sparse_robust.data import DataSpec, eval_loader, load_data, train_loader

EPOCHS, EPS = 5, 0.05


def main() -> None:
    data = load_data(DataSpec(name="digits", resize=28))
    model = sr.create_model(
        "resnet10t", num_classes=data.num_classes, in_chans=data.in_chans, mean=data.mean, std=data.std,
        channels=(16, 32, 48, 64), stem_width=8,
    )  # fmt: skip
    masks = sr.prune(model, sparsity=0.5, score="random", scope="layerwise")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    sr.enforce(optimizer, model, masks)  # applies the masks and keeps them

    attack = sr.attacks.FGSM(mode="eval")
    batches = train_loader(data, 64, seed=0)
    for epoch in range(EPOCHS):
        model.train()
        for x, y, ids in batches.epoch(epoch):
            loss = F.cross_entropy(model(attack(model, x, y, eps=EPS, ids=ids)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    model.eval()
    result = sr.evaluate(model, eval_loader(data.test, 200), attacks=[sr.attacks.PGD(steps=20)], eps=EPS)
    zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in masks.names())
    print(f"clean {100 * result.clean:.1f} %, robust {100 * result.robust:.1f} % at eps {EPS}")
    print(f"{zeros} of {masks.numel()} prunable weights are zero")


if __name__ == "__main__":
    main()

"""Keep your own loop: four lines make it accumulate rightly.

    python examples/02_own_loop.py

The same net is trained twice on the same batches of 256 digits: by a plain loop that needs room for the whole batch,
and by the same loop with an Accumulator, which never has more than 64 samples in memory at once. The two end with the
same parameters, in float64 to the last few digits, the last and shorter batch included.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoaccum


def net() -> nn.Module:
    """A perceptron in float64, so that rounding hides nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()


def batches() -> DataLoader:
    """256 samples at a time, the last batch shorter; the order is the same each time."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float64) / 16, torch.tensor(labels))
    return DataLoader(data, batch_size=256, shuffle=True, generator=torch.Generator().manual_seed(0))


def plain_loop(model: nn.Module) -> None:
    """As everyone writes it."""
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for images, target in batches():
        output = model(images)
        loss(output, target).backward()
        optimizer.step()
        optimizer.zero_grad()


def accumulating_loop(model: nn.Module) -> None:
    """The same loop: a plan, an Accumulator, a window, and its backward."""
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    accumulator = autoaccum.Accumulator(model, optimizer, autoaccum.plan(limit=64, target_batch=256))
    for batch in batches():
        for images, target in accumulator.window(batch):
            output = model(images)
            accumulator.backward(loss(output, target))


def main() -> None:
    """Trains both and compares them."""
    plain, accumulated = net(), net()
    plain_loop(plain)
    accumulating_loop(accumulated)
    pairs = list(zip(plain.state_dict().values(), accumulated.state_dict().values(), strict=True))
    worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    print(f"8 updates; the largest relative difference between the two loops' parameters is {worst:.1e}")
    if worst > 1e-10:
        raise SystemExit("the two loops differ")


if __name__ == "__main__":
    main()

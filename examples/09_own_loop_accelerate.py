"""Keep your own loop with an Accelerator: three lines of its documentation's loop change.

    python examples/09_own_loop_accelerate.py     (needs accelerate)

    - with accelerator.accumulate(model):
    + accumulator = autoaccum.Accumulator(model, optimizer, plan, scheduler=scheduler, accelerator=accelerator)
    + for micro in accumulator.window(batch):
    -     accelerator.backward(loss); optimizer.step(); scheduler.step(); optimizer.zero_grad()
    +     accumulator.backward(loss, denominator=what its mean was divided by)

The parameters are compared with those of batches of 256 at once.
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import autoaccum

TARGET_BATCH, LARGEST = 256, 40


def parts() -> tuple:
    """Model, optimizer, loader and schedule, the same each time; a fifth of the targets is ignored."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    target = torch.tensor(labels)
    target[::5] = -100
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = TensorDataset(torch.tensor(images, dtype=torch.float64) / 16, target)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    return model, optimizer, DataLoader(data, TARGET_BATCH), schedule


def whole() -> torch.Tensor:
    """By a plain loop, which needs room for the whole batch."""
    model, optimizer, loader, schedule = parts()
    for images, target in loader:
        cross_entropy(model(images), target).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def in_pieces() -> torch.Tensor:
    """Never more than 40 samples in memory at once."""
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader, schedule = accelerator.prepare(*parts())
    plan = autoaccum.plan(LARGEST, TARGET_BATCH)
    accumulator = autoaccum.Accumulator(model, optimizer, plan, scheduler=schedule, accelerator=accelerator)
    for batch in loader:
        for images, target in accumulator.window(tuple(batch)):
            accumulator.backward(cross_entropy(model(images), target), denominator=(target != -100).sum())
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def main() -> None:
    """Both loops."""
    reference = whole()
    off = float((in_pieces() - reference).norm() / reference.norm())
    print(f"in micro-batches of at most {LARGEST}: parameters {off:.1e} off those of {TARGET_BATCH} at once")


if __name__ == "__main__":
    main()

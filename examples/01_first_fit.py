"""Train a convolutional net with BatchNorm on handwritten digits, with a batch that does not fit in memory.

    python examples/01_first_fit.py

On the CPU the training gets a budget of 12 MiB, in which 256 samples do not fit at once; on a GPU the budget is a cap
on PyTorch's allocator. The file is a TARGET of the command line as well:

    autoaccum probe examples/01_first_fit.py:setup --target-batch 256 --memory 12MiB
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn

import autoaccum

TARGET_BATCH = 256


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """1,797 grey images of 8 by 8 pixels, twice enlarged; every fifth is held out."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    y = torch.tensor(labels)
    held_out = torch.arange(len(y)) % 5 == 0
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def net() -> nn.Module:
    """Two blocks of convolution, BatchNorm and ReLU, then a linear head."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 1
    for width in (32, 64):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.2), nn.Linear(channels * 16, 10))


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> autoaccum.Mean:
    """The share of right answers, kept as a count and what it is a count of."""
    return autoaccum.Mean((outputs.argmax(1) == targets).sum(), len(targets))


def setup() -> dict[str, object]:
    """What `autoaccum.fit` is called with; the command line calls this."""
    train, held_out = digits()
    return {
        "model": net(),
        "data": train,
        "target_batch": TARGET_BATCH,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": "adamw",
        "lr": 1e-3,
        "lr_batch": 64,
        "epochs": 12,
        "val_data": held_out,
        "metrics": {"accuracy": accuracy},
        "seed": 0,
    }


def main() -> None:
    """Trains under the budget, and says how well it went and where the time was spent."""
    # cuBLAS takes up to 64 MiB of a GPU for itself.
    memory = "96MiB" if torch.cuda.is_available() else "12MiB"
    started = time.perf_counter()
    result = autoaccum.fit(**setup(), memory=memory, progress=True)
    seconds = time.perf_counter() - started

    training = sum(record.seconds for record in result.history)
    probing = sum(trial.seconds for trial in result.probe.trials)
    final = result.evaluations[-1]
    print(
        f"{len(result.history)} windows, all of {TARGET_BATCH} samples but the last of each epoch, "
        f"in {result.plan.accumulation_steps} micro-batches of at most {result.plan.micro_batch}"
    )
    print(f"held-out accuracy {final['accuracy']:.1%}, loss {final['loss']:.3f}")
    print(
        f"{seconds:.1f} s: {probing:.1f} s in the probe's {len(result.probe.trials)} trials, {training:.1f} s in "
        f"training, {seconds - probing - training:.1f} s in the check, validation and the rest"
    )


if __name__ == "__main__":
    main()

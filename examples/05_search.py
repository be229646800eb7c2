"""Search learning rate, target batch, weight decay and width of a small convolutional net on handwritten digits.

    python examples/05_search.py

Twenty-four trials on two processes; the micro-batch of each is not searched but follows from the probe, so every trial
trains with exactly the batch that it claims. The picture and the best plan are written beside the study. Run it again,
also after Ctrl-C, and it goes on where it was. The file is a TARGET as well:

    autoaccum search examples/05_search.py:setup --n-trials 20 --workers 2
    autoaccum fit examples/05_search.py:setup --plan autoaccum-search/05_search-setup/best.json
"""

import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import autoaccum

FOLDER = Path("autoaccum-search") / "digits"
SPACE = {
    "lr": (3e-4, 1e-1, "log"),  # at a batch of 64; scaled from there to each trial's own
    "target_batch": [32, 64, 128, 256],
    "weight_decay": [0.0, 1e-3, 1e-1],
    "width": (8, 24),
}


def digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """1,797 grey images of 8 by 8 pixels; every second is held out: among few, luck would choose between settings."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    held_out = torch.arange(len(y)) % 2 == 0
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def net(width: int) -> nn.Module:
    """Two blocks of convolution, BatchNorm and ReLU, then a linear head."""
    layers: list[nn.Module] = []
    channels = 1
    for wide in (width, 2 * width):
        layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels = wide
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * channels, 10))


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> autoaccum.Mean:
    """The share of right answers, kept as a count and what it is a count of."""
    return autoaccum.Mean((outputs.argmax(1) == targets).sum(), len(targets))


def setup(width: int = 16, weight_decay: float = 1e-3) -> dict[str, object]:
    """What `autoaccum.fit` is called with, anew for each trial; rate and batch go straight to `fit`."""
    train, held_out = digits()
    return {
        "model": net(width),
        "data": train,
        "loss": nn.CrossEntropyLoss(),
        "optimizer": lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay),
        "lr": 3e-3,
        "lr_batch": 64,
        "target_batch": 64,
        "epochs": 9,
        "schedule": "cosine",  # to a rate of 0, so that the last step's own noise is not what is compared
        "val_data": held_out,
        "metrics": {"accuracy": accuracy},
        "device": "cpu",  # so small a net gains nothing on a GPU
    }


def main() -> None:
    """Searches, and says what was found and what it cost."""
    started = time.perf_counter()
    result = autoaccum.search(
        setup, n_trials=24, space=SPACE, workers=2, folder=FOLDER, study_name="digits", progress=True
    )
    seconds = time.perf_counter() - started
    result.plot(FOLDER / "search.png")

    seen = sum(row["samples"] for row in result.trials)
    whole = len(result.trials) * max(row["samples"] for row in result.trials)
    states = [row["state"] for row in result.trials]
    print(f"best validation loss {result.best_value:.4f} with {result.best_params}")
    pruned = states.count("pruned")
    print(f"{len(states)} trials, {pruned} of them pruned: {1 - seen / whole:.0%} of the samples were saved")
    print(f"{seconds:.0f} s; {FOLDER / 'search.png'}, {FOLDER / 'best.json'}; {result.dashboard}")


if __name__ == "__main__":
    main()

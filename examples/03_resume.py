"""Kill a training in mid-run, start it again, and end at the very same parameters.

    python examples/03_resume.py

The digits are trained on twice, with shuffling, dropout and BatchNorm. The first training is left alone. The second one
runs in a process of its own, which is killed with SIGKILL, as a machine that goes down would do it; the same call then
goes on from the last checkpoint. The two end with the same parameters, bit for bit.

`autoaccum fit examples/03_resume.py:setup --checkpoint runs/digits` does the same from the command line: end it as you
like, run it again.
"""

import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import autoaccum

EPOCHS = 8


def setup() -> dict[str, object]:
    """What `autoaccum.fit` is called with, each time the same."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(512, 10),
    )
    return {
        "model": model,
        "data": (x, torch.tensor(labels)),
        "loss": nn.CrossEntropyLoss(),
        "target_batch": 256,
        "micro_batch": 64,
        "schedule": "cosine",
        "epochs": EPOCHS,
        "seed": 0,
    }


def train(folder: str) -> None:
    """In the process that is killed."""
    autoaccum.fit(**setup(), checkpoint=folder, checkpoint_every=5)


def main() -> None:
    """Trains, kills, goes on, compares."""
    alone = autoaccum.fit(**setup())

    with tempfile.TemporaryDirectory() as folder:
        process = multiprocessing.get_context("spawn").Process(target=train, args=(folder,))
        process.start()
        while process.is_alive() and len(list(Path(folder).glob("step-*"))) < 2:
            time.sleep(0.01)
        process.kill()
        process.join()
        saved = sorted(path.name for path in Path(folder).glob("step-*"))
        print(f"killed; on the disk are {', '.join(saved)}")

        resumed = autoaccum.fit(**setup(), checkpoint=folder, checkpoint_every=5)

    print(f"{len(resumed.history)} windows in the end, as many as without the kill: {len(alone.history)}")
    pairs = zip(alone.model.state_dict().values(), resumed.model.state_dict().values())
    assert all(torch.equal(mine, other) for mine, other in pairs)
    assert [record.loss for record in alone.history] == [record.loss for record in resumed.history]
    print("parameters, running statistics and losses are the same, bit for bit")


if __name__ == "__main__":
    main()

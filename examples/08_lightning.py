"""Keep your Lightning Trainer: one callback gives it the batch that does not fit.

    python examples/08_lightning.py               (needs lightning)

A perceptron learns digits; a fifth of the targets is ignored, as in segmentation or language modelling. Shown: what
`accumulate_grad_batches` does to the gradient, then the parameters after two epochs against batches of 256 at once.
"""

import logging
import warnings

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import autoaccum
from autoaccum.integrations.lightning import TargetBatch

TARGET_BATCH = 256


class Digits(lightning.LightningModule):
    """As everyone writes it; in float64, so that rounding hides nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).double()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, target = batch
        loss = cross_entropy(self.net(images), target)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(batch: int) -> DataLoader:
    """Digits in order, every fifth without a target."""
    images, labels = load_digits(return_X_y=True)
    target = torch.tensor(labels)
    target[::5] = -100
    return DataLoader(TensorDataset(torch.tensor(images, dtype=torch.float64) / 16, target), batch)


def trainer(steps: int = 1, callbacks: list | None = None) -> lightning.Trainer:
    """Two epochs, and nothing on the screen."""
    return lightning.Trainer(
        max_epochs=2, accumulate_grad_batches=steps, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", precision="64-true",
    )  # fmt: skip


def trained(made: lightning.Trainer, batch: int) -> torch.Tensor:
    """The parameters after training."""
    module = Digits()
    made.fit(module, loader(batch))
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def main() -> None:
    """Three trainings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    whole = trained(trainer(), TARGET_BATCH)
    print(autoaccum.verify(trainer(steps=8), (Digits(), loader(32))).text)
    own = trained(trainer(steps=8), 32)
    ours = trained(trainer(callbacks=[TargetBatch(TARGET_BATCH, memory="1MiB", cache=False, progress=True)]), 32)
    for name, found in (("accumulate_grad_batches=8", own), ("TargetBatch(256)", ours)):
        print(f"{name}: parameters {float((found - whole).norm() / whole.norm()):.1e} off those of 256 at once")


if __name__ == "__main__":
    main()

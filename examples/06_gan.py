"""A GAN on digits: two optimizers that take turns over the same samples, under a memory budget.

    python examples/06_gan.py            # half a minute; writes digits_painted.png where matplotlib is there

Each window is trained on twice: the judge learns to tell painted digits from real ones, then the painter to pass for
real. Each is a window of exactly 256 samples, cut into the micro-batches that fit, with the other's weights frozen.
Each sample brings its own noise, so that it is the same wherever a window is cut.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import softplus

import autoaccum

NOISE, EPOCHS = 16, 80


class Gan(nn.Module):
    """A painter of 8 × 8 digits and a judge of them."""

    def __init__(self) -> None:
        super().__init__()
        self.painter = nn.Sequential(
            *(nn.Linear(NOISE, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.Sigmoid()),
        )
        self.judge = nn.Sequential(
            *(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.4)),
            *(nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Dropout(0.4)),
            nn.Linear(128, 1),
        )


def judging(model: Gan, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Real digits should score high, painted ones low."""
    real, noise = batch
    return softplus(-model.judge(real)).mean() + softplus(model.judge(model.painter(noise).detach())).mean()


def painting(model: Gan, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Painted digits should score high."""
    return softplus(-model.judge(model.painter(batch[1]))).mean()


def adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """As GANs are usually trained: with little momentum."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.5, 0.99))


def setup() -> dict[str, object]:
    """What `autoaccum.fit` is called with."""
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = Gan()
    return {
        "model": model,
        "data": (images, torch.randn(len(images), NOISE)),
        "phases": [
            autoaccum.Phase(judging, model.judge, adam, lr=5e-4),
            autoaccum.Phase(painting, model.painter, adam, lr=1e-3),
        ],
        "target_batch": 256,
        "memory": "1.5MiB",
        "epochs": EPOCHS,
        "seed": 0,
        "device": "cpu",
    }


def draw(model: Gan, path: Path) -> None:
    """Five rows of what the painter makes of noise it has not seen."""
    model.eval()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with torch.no_grad():
        painted = model.painter(torch.randn(50, NOISE, generator=torch.Generator().manual_seed(1))).view(5, 10, 8, 8)
    painted = nn.functional.pad(painted, (1, 1, 1, 1))
    sheet = painted.permute(0, 2, 1, 3).reshape(50, 100).repeat_interleave(6, 0).repeat_interleave(6, 1)
    pyplot.imsave(path, sheet.numpy(), cmap="gray_r")
    print(f"painted digits: {path}")


def main() -> None:
    """Trains, and shows what was learned."""
    result = autoaccum.fit(**setup())
    for reason in ("accumulation_steps", "budget"):
        print(f"{reason}: {result.plan.reasons[reason]}")
    for name in ("judging", "painting"):
        losses = [record.loss for record in result.history if record.phase == name]
        print(f"{name}: {len(losses)} windows, loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    try:
        draw(result.model, Path("digits_painted.png"))
    except ImportError:
        print('no picture: pip install "autoaccum[plots]"')


if __name__ == "__main__":
    main()

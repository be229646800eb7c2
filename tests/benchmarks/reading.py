"""What it costs to read a loss's denominators off its graph, beside nothing: seconds of this thread's own.

python -m tests.benchmarks.reading
"""

import time

import torch
from torch.nn import functional as F

from autoaccum.loss.graph import read
from tests.benchmarks.measure import median, table, write


def losses() -> dict[str, torch.Tensor]:
    """A few of one to three terms."""
    x, y = torch.randn(6, 4, requires_grad=True), torch.randint(0, 4, (6,))
    marked = torch.tensor([1.0, 0, 1, 1, 0, 0])
    masked = (x.square().mean(1) * marked).sum() / marked.sum().clamp(min=1)
    entropy = F.cross_entropy(x, y)
    return {
        "cross-entropy": entropy,
        "masked mean": masked,
        "two terms": entropy + 0.3 * masked,
        "label smoothing and a penalty": F.cross_entropy(x, y, label_smoothing=0.1) + 0.01 * x.square().sum(),
    }


def microseconds(loss: torch.Tensor, times: int = 1000) -> float:
    """Of one reading."""
    started = time.thread_time()
    for _ in range(times):
        read(loss)
    return (time.thread_time() - started) / times * 1e6


def main() -> None:
    torch.set_num_threads(1)
    found = {name: round(median([microseconds(loss) for _ in range(9)]), 1) for name, loss in losses().items()}
    print(table(["loss", "microseconds"], [[name, value] for name, value in found.items()]))
    print(write("reading", {"microseconds": found}))


if __name__ == "__main__":
    main()

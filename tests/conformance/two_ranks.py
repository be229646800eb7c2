"""What torchrun starts: `-m tests.conformance.two_ranks FOLDER TRAINER:PROBLEM ...`.

Each rank trains the problems in turn, and leaves in FOLDER what its optimizer was given.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tests.conformance.models import IGNORED, CausalLM, classifier, seeded, tagged, tokens, vectors
from tests.conformance.problems import Problem
from tests.conformance.trainers import TRAINERS

__all__ = ["PROBLEMS", "problem_of"]


class Branching(nn.Module):
    """A classifier with a branch that only flagged samples take; where a micro-batch has none, it is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.branch = classifier(), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor, flag: torch.Tensor) -> torch.Tensor:
        outputs = self.main(x)
        return outputs + self.branch(x) * flag[:, None] if flag.any() else outputs


def _tokens() -> Problem:
    return Problem(
        model=lambda: seeded(CausalLM),
        samples=tokens(16, shares=(1.0, 0.9, 0.3, 0.2)),
        k=2,
        loss=nn.CrossEntropyLoss(),
        denominator=lambda batch: (batch["labels"] != IGNORED).sum(),
        summed=lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="sum"),
    )


def _llama() -> Problem:
    from tests.conformance.heads import head, labelled

    return Problem(
        model=lambda: head("LlamaForCausalLM"),
        samples=labelled(16, "ragged"),
        k=2,
        denominator=lambda batch: (batch["labels"][:, 1:] != IGNORED).sum(),
    )


def _branch(count: int = 16) -> Problem:
    flagged = lambda index: torch.tensor(float(index in (0, 8)), dtype=torch.float64)  # noqa: E731
    return Problem(
        model=lambda: seeded(Branching), samples=tagged(vectors(count), flag=flagged), k=2, loss=nn.CrossEntropyLoss()
    )


def _schedule() -> Problem:
    halved = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)  # noqa: E731
    return Problem(model=classifier, samples=vectors(32), k=2, loss=nn.CrossEntropyLoss(), lr=0.01, schedule=halved)


def _unequal() -> Problem:
    return dataclasses.replace(_tokens(), k=4)


PROBLEMS = {
    "tokens": _tokens,
    "llama": _llama,
    "schedule": _schedule,
    "branch, looked for": lambda: dataclasses.replace(_branch(), find_unused=True),
    "branch, last window": lambda: _branch(8),
    "branch": _branch,
    "unequal": _unequal,
}


def problem_of(name: str, rank: int) -> Problem:
    """A problem as a rank has it: in "unequal" rank 0 holds 5 samples at once and rank 1 only 2."""
    problem = PROBLEMS[name]()
    if name == "unequal":
        options = {"micro_batch": (5, 2)[rank], "target_batch": 8}
        problem = dataclasses.replace(problem, options=options)
    return problem


def main() -> None:
    """Trains each problem; the files are this rank's."""
    folder, *pairs = sys.argv[1:]
    trainers = {trainer.name: trainer for trainer in TRAINERS}
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    for pair in pairs:
        trainer, name = trainers[pair.split(":")[0]], pair.split(":")[1]
        run = trainer.train(problem_of(name, rank))
        found: dict[str, Any] = {"gradients": run.gradients, "rates": run.rates}
        if "result" in run.extra:
            found["sizes"] = list(run.extra["result"].plan.micro_batches)
        torch.save(found, Path(folder) / f"{pair}-{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""Accelerate: `accelerator.accumulate`, and the recipe that its guide gives for samples of variable size.

The guide "Performing gradient accumulation with Accelerate" shows both: the context manager, which divides every loss
by the number of steps; and, for token-level tasks, a loop by hand which counts the labels of the whole step first and
multiplies a summed loss by steps × processes / count. The recipe is measured where a problem's loss has a summed form.
"""

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.conformance.problems import Problem, Run
from tests.conformance.trainers.base import NotOffered, Trainer

__all__ = ["Accelerate", "AccelerateRecipe"]


class Accelerate(Trainer):
    """The context manager."""

    name = package = distribution = "accelerate"

    def train(self, problem: Problem) -> Run:
        if not problem.recover:
            return self._train(problem)
        from accelerate.utils import find_executable_batch_size

        # As its guide on memory says: everything is built inside, at the batch size it is called with.
        @find_executable_batch_size(starting_batch_size=problem.micro_batch)
        def attempt(batch_size: int) -> Run:
            return self._train(replace(problem, micro_batch=batch_size))

        return attempt()

    def _train(self, problem: Problem) -> Run:
        inner, optimizer, (accelerator, model, stepper, loader, scheduler) = _prepared(problem)
        first, skipped = _loaded(accelerator, problem)
        for epoch in range(first, problem.epochs):
            behind = skipped if epoch == first else 0
            batches = accelerator.skip_first_batches(loader, behind) if behind else loader
            for index, batch in enumerate(batches, 1):
                with accelerator.accumulate(model):
                    accelerator.backward(problem.compute(model, batch))
                    if problem.clip_norm is not None and accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), problem.clip_norm)
                    stepper.step()
                    if scheduler is not None:
                        scheduler.step()
                    stepper.zero_grad()
                if problem.stop_after is not None and len(optimizer.gradients) == problem.stop_after:
                    accelerator.save_state(problem.save_to)
                    (Path(problem.save_to or "") / "done").write_text(f"{epoch} {index}")
                    return Run(optimizer.gradients, inner)
        return Run(optimizer.gradients, inner, optimizer.rates)


class AccelerateRecipe(Trainer):
    """The guide's loop for samples of variable size."""

    name, package, distribution = "accelerate, recipe", "accelerate", "accelerate"

    def train(self, problem: Problem) -> Run:
        if problem.summed is None or problem.stream:
            raise NotOffered("the guide's recipe is for losses over labels, and a loader with a length")
        inner, optimizer, (accelerator, model, stepper, loader, _) = _prepared(problem)
        for _ in range(problem.epochs):
            batches, updates = iter(loader), math.ceil(len(loader) / problem.k)
            for update in range(updates):
                left = len(loader) - update * problem.k
                samples = [next(batches) for _ in range(min(problem.k, left))]
                counted = sum(batch["labels"].ne(-100).sum() for batch in samples)
                items = accelerator.gather(counted).sum().item()
                for index, batch in enumerate(samples):
                    quiet = index < len(samples) - 1 and accelerator.num_processes > 1
                    with model.no_sync() if quiet else contextlib.nullcontext():
                        inputs = {name: value for name, value in batch.items() if name != "labels"}
                        loss = problem.summed(model(**inputs), batch["labels"])
                        accelerator.backward(loss * problem.k * accelerator.num_processes / items)
                stepper.step()
                stepper.zero_grad()
        return Run(optimizer.gradients, inner, optimizer.rates)


def _loaded(accelerator: Any, problem: Problem) -> tuple[int, int]:
    """The epoch, and its micro-batches, that the state in the folder was saved after."""
    if not problem.resume:
        return 0, 0
    accelerator.load_state(problem.save_to)
    epoch, index = (Path(problem.save_to or "") / "done").read_text().split()
    return int(epoch), int(index)


def _prepared(problem: Problem) -> tuple[Any, Any, tuple[Any, ...]]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DistributedDataParallelKwargs, set_seed

    AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier problem in this process has left
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=problem.k,
        mixed_precision="fp16" if problem.precision == "fp16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=problem.find_unused)],
    )
    if problem.seed is not None:
        set_seed(problem.seed)
    inner = problem.model()
    optimizer = problem.optimizer(inner)
    scheduler = None if problem.schedule is None else problem.schedule(optimizer)
    model, stepper, loader = accelerator.prepare(inner, optimizer, problem.loader())
    if scheduler is not None:
        scheduler = accelerator.prepare(scheduler)
    return inner, optimizer, (accelerator, model, stepper, loader, scheduler)

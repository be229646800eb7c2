"""autoaccum, by `prepare` (which `fit` runs) and by the Accumulator in a loop of one's own."""

import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch.utils.data import default_collate

import autoaccum
from tests.conformance.problems import Problem, Run
from tests.conformance.trainers.base import Trainer, chunks

__all__ = ["Fit", "OwnLoop"]


class Fit(Trainer):
    """The configured training loop; the gradient check before it is on, as it is for users."""

    name, package, distribution, ours = "autoaccum", "autoaccum", "autoaccum", True

    def train(self, problem: Problem) -> Run:
        model = problem.model()
        optimizer = problem.optimizer(model)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        settings: dict[str, Any] = {
            "target_batch": problem.target_batch * ranks, "micro_batch": problem.micro_batch, "loss": problem.loss,
            "reduction": problem.reduction, "epochs": problem.epochs, "clip_norm": problem.clip_norm,
            "precision": problem.precision, "seed": problem.seed, "lr_rule": "none", "device": "cpu", "progress": False,
        }  # fmt: skip
        if problem.schedule is not None:
            settings["schedule"] = problem.schedule
        if problem.step is not None:
            settings.update(step=problem.step, loss=None)
        if problem.save_to is not None:
            settings.update(checkpoint=problem.save_to, checkpoint_every=1, resume=problem.resume)
        loop = autoaccum.prepare(model, problem.loader(), optimizer=optimizer, **{**settings, **problem.options})
        if problem.stop_after is not None:
            with closing(iter(loop)) as records:
                for record in records:
                    if record.step == problem.stop_after:
                        return Run(optimizer.gradients, model)
        result = loop.run()
        return Run(optimizer.gradients, result.model, optimizer.rates, {"result": result, "optimizer": optimizer})


class OwnLoop(Trainer):
    """A loop written by hand around the Accumulator, with the same micro-batches that the peers are given."""

    name, package, distribution, ours = "Accumulator", "autoaccum", "autoaccum", True

    def train(self, problem: Problem) -> Run:
        if problem.seed is not None:
            torch.manual_seed(problem.seed)
        model = problem.model()
        optimizer = problem.optimizer(model)
        scheduler = None if problem.schedule is None else problem.schedule(optimizer)
        if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        plan = autoaccum.plan(
            problem.micro_batch, problem.target_batch * ranks, world_size=ranks, rank=rank, lr_rule="none"
        )
        accumulator = autoaccum.Accumulator(
            model, optimizer, plan, scheduler=scheduler, clip_norm=problem.clip_norm, precision=problem.precision
        )
        records = []
        for _ in range(problem.epochs):
            for batches in chunks(problem.loader(), problem.k) if ranks == 1 else _shares(problem, plan):
                for batch in accumulator.window(batches):
                    loss = problem.compute(model, batch)
                    denominator = None if problem.denominator is None else problem.denominator(batch)
                    accumulator.backward(loss, denominator)
                records.append(accumulator.last)
        accumulator.close()
        return Run(optimizer.gradients, model, optimizer.rates, {"records": records, "optimizer": optimizer})


def _shares(problem: Problem, plan: autoaccum.Plan) -> Iterator[Any]:
    """This rank's part of each window as one batch, which the Accumulator cuts."""
    for samples in problem.windows(plan.world_size):
        start, stop = plan.share(len(samples))
        yield default_collate(samples[start:stop])

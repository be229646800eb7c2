"""Ignite: `create_supervised_trainer(gradient_accumulation_steps=...)`, which steps every k iterations."""

import os
from pathlib import Path
from typing import Any

import torch

from tests.conformance.problems import Problem, Run, positional, returned
from tests.conformance.trainers.base import NotOffered, Trainer

__all__ = ["Ignite"]


class Ignite(Trainer):
    """ignite.engine."""

    name, package, distribution = "ignite", "ignite", "pytorch-ignite"

    def train(self, problem: Problem) -> Run:
        import ignite.distributed as idist
        from ignite.engine import Events, create_supervised_trainer
        from ignite.utils import manual_seed

        if problem.clip_norm is not None:
            raise NotOffered("create_supervised_trainer does not clip; a step written by hand does")
        if problem.precision == "fp16":
            raise NotOffered("its fp16 scaler is CUDA's")
        if problem.seed is not None:
            manual_seed(problem.seed)
        inner = problem.model()
        optimizer = problem.optimizer(inner)
        model, loader = inner, problem.loader()
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if ranks > 1:
            if not torch.distributed.is_initialized():
                idist.initialize("gloo")
            model = idist.auto_model(inner, find_unused_parameters=problem.find_unused)
            loader = idist.auto_dataloader(problem.dataset(), batch_size=problem.micro_batch * ranks, shuffle=False)
        trainer = create_supervised_trainer(
            model,
            optimizer,
            lambda outputs, labels: returned(outputs) if problem.loss is None else _loss(problem, outputs, labels),
            prepare_batch=lambda batch, device, non_blocking: _pair(problem, batch),
            model_fn=lambda model, inputs: model(**inputs),
            gradient_accumulation_steps=problem.k,
            deterministic=problem.save_to is not None,
        )
        path = Path(problem.save_to or "") / "training.pt"

        def leave(engine: Any) -> None:
            if problem.stop_after is not None and engine.state.iteration == problem.stop_after * problem.k:
                torch.save([engine.state_dict(), inner.state_dict(), optimizer.state_dict()], path)
                engine.terminate()

        trainer.add_event_handler(Events.ITERATION_COMPLETED, leave)
        if problem.resume:
            engine_state, model_state, optimizer_state = torch.load(path, weights_only=False)
            trainer.load_state_dict(engine_state)
            inner.load_state_dict(model_state)
            optimizer.load_state_dict(optimizer_state)
        if problem.schedule is not None:
            scheduler = problem.schedule(optimizer)
            trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: scheduler.step())
        trainer.run(loader, max_epochs=problem.epochs)
        return Run(optimizer.gradients, inner, optimizer.rates)


def _pair(problem: Problem, batch: Any) -> tuple[Any, Any]:
    if problem.loss is None:
        return batch, None
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]


def _loss(problem: Problem, outputs: Any, labels: Any) -> Any:
    return positional(problem.loss, outputs, labels)

"""Transformers' Trainer: a model that returns its loss, gradient_accumulation_steps, samples in order.

A model with a loss of its own is given as it is. Another one is wrapped in a module whose forward returns the loss, as
the Trainer's documentation asks for; its forward has no **kwargs, so that the Trainer treats the loss as a plain mean.
"""

import os
import tempfile
from typing import Any

from torch import nn

import autoaccum
from tests.conformance.problems import Problem, Run, positional
from tests.conformance.trainers.base import Trainer

__all__ = ["Transformers", "TransformersAttached"]


class Scored(nn.Module):
    """A model with its loss."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Any, labels: Any, flag: Any = None) -> dict[str, Any]:
        inputs = {"x": x} if flag is None else {"x": x, "flag": flag}
        return {"loss": positional(self.loss, self.model(**inputs), labels)}


class Transformers(Trainer):
    """transformers.Trainer."""

    name = package = distribution = "transformers"
    recovers = True  # by itself, with a switch

    def train(self, problem: Problem) -> Run:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        inner = problem.model()
        optimizer = problem.optimizer(inner)
        make = problem.schedule if problem.schedule is not None else transformers.get_constant_schedule
        length = {"max_steps": len(problem.windows())} if problem.stream else {"num_train_epochs": problem.epochs}

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = state.global_step == problem.stop_after

        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=problem.save_to or folder,
                per_device_train_batch_size=problem.micro_batch,
                gradient_accumulation_steps=problem.k,
                max_grad_norm=problem.clip_norm or 0.0,
                train_sampling_strategy="random" if problem.shuffle else "sequential",
                fp16=problem.precision == "fp16",
                remove_unused_columns=False,
                use_cpu=True,
                save_strategy="steps" if problem.save_to else "no",
                save_steps=1,
                logging_strategy="no",
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
                ddp_find_unused_parameters=problem.find_unused,
                seed=0 if problem.seed is None else problem.seed,
                auto_find_batch_size=problem.recover and self.recovers,
                **length,
            )
            made = transformers.Trainer(
                model=inner if problem.loss is None else Scored(inner, problem.loss),
                args=arguments,
                train_dataset=problem.dataset(),
                data_collator=problem.collate,
                optimizers=(optimizer, make(optimizer)),
                callbacks=[] if problem.stop_after is None else [Stop()],
            )
            self._before(made, problem)
            made.train(resume_from_checkpoint=problem.resume or None)
        return Run(optimizer.gradients, inner, optimizer.rates)

    def _before(self, trainer: Any, problem: Problem) -> None:
        """What is done to the trainer before it trains."""


class TransformersAttached(Transformers):
    """transformers.Trainer, with one line more: its windows are autoaccum's."""

    name = "transformers + attach"
    recovers = False

    def _before(self, trainer: Any, problem: Problem) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        size = problem.target_batch * ranks
        autoaccum.attach(trainer, target_batch=size, micro_batch=problem.micro_batch, progress=False)

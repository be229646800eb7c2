"""Lightning: a LightningModule whose training_step returns the loss, accumulate_grad_batches."""

import logging
import os
import tempfile
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

import autoaccum
from tests.conformance.problems import Problem, Run
from tests.conformance.trainers.base import Trainer

__all__ = ["Lightning", "LightningAttached"]

_PRECISIONS = {torch.float64: "64-true", torch.bfloat16: "bf16-true", torch.float32: "32-true"}


class Lightning(Trainer):
    """lightning.Trainer."""

    name = package = distribution = "lightning"

    def train(self, problem: Problem) -> Run:
        import lightning
        from lightning.pytorch.callbacks import ModelCheckpoint
        from lightning.pytorch.tuner import Tuner

        for chatty in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(chatty).setLevel(logging.ERROR)

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = problem.model()
                self.recorder = problem.optimizer(self.model)
                self.batch_size = problem.micro_batch

            def train_dataloader(self) -> Any:
                cut = replace(problem, micro_batch=self.batch_size)
                if ranks == 1:
                    return cut.loader()
                sampler = DistributedSampler(cut.dataset(), shuffle=problem.shuffle)
                return DataLoader(cut.dataset(), batch_size=cut.micro_batch, sampler=sampler)

            def training_step(self, batch: Any, batch_idx: int) -> Any:
                return problem.compute(self.model, batch)

            def configure_optimizers(self) -> Any:
                if problem.schedule is None:
                    return self.recorder
                scheduler = {"scheduler": problem.schedule(self.recorder), "interval": "step"}
                scheduler["frequency"] = problem.frequency
                return {"optimizer": self.recorder, "lr_scheduler": scheduler}

        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        if problem.seed is not None:
            lightning.seed_everything(problem.seed, verbose=False)
        module = Module()
        parallel = "ddp_find_unused_parameters_true" if problem.find_unused else "ddp"
        dtype = next(module.parameters()).dtype
        with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                accelerator="cpu",
                devices=ranks,
                strategy=parallel if ranks > 1 else "auto",
                precision="16-mixed" if problem.precision == "fp16" else _PRECISIONS[dtype],
                max_epochs=problem.epochs,
                max_steps=-1 if problem.stop_after is None else problem.stop_after,
                callbacks=[ModelCheckpoint(problem.save_to, every_n_train_steps=1, save_last=True)]
                if problem.save_to
                else [],
                accumulate_grad_batches=problem.k,
                gradient_clip_val=problem.clip_norm,
                logger=False,
                enable_checkpointing=problem.save_to is not None,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,  # the one it would add shuffles
                default_root_dir=folder,
            )
            self._before(trainer, problem)
            if problem.options.get("tune"):
                found = Tuner(trainer).scale_batch_size(module, init_val=problem.micro_batch, max_trials=2)
                assert found is not None
                module.batch_size = problem.micro_batch
            trainer.fit(module, ckpt_path="last" if problem.resume else None, weights_only=False)
        return Run(module.recorder.gradients, module.model, module.recorder.rates)

    def _before(self, trainer: Any, problem: Problem) -> None:
        """What is done to the trainer before it trains."""


class LightningAttached(Lightning):
    """lightning.Trainer, with a TargetBatch among its callbacks."""

    name = "lightning + attach"

    def _before(self, trainer: Any, problem: Problem) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        size = problem.target_batch * ranks
        autoaccum.attach(trainer, target_batch=size, micro_batch=problem.micro_batch, progress=False)

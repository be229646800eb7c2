"""Transformers' Trainer and what stands on it (TRL's SFT, DPO and reward trainers, PEFT): windows inside its own loop.

Choices made here:

- Callbacks never see the trainer, so the instance is taken hold of: `train`, `training_step` and `get_train_dataloader`
  are shadowed on it while it lives. Its class is left alone.
- The loss of a piece is what its own `training_step` hands to `accelerator.backward`: whatever an heir puts around it
  (offloading, other losses, its own contexts) runs. It is asked without `num_items_in_batch`, for a plain mean.
- The collate function is held back: the loader yields the samples of a window, which are cut before they are collated.
- On several ranks the loader deals every rank its part of the window, nothing padded and nothing repeated; gradients
  are summed once a window, so the model runs without its DistributedDataParallel.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from autoaccum.checks import plain
from autoaccum.errors import CheckpointError
from autoaccum.files import read_json, write_json
from autoaccum.integrations.attachment import Attachment, Trained, scale_rates
from autoaccum.integrations.heldback import Held, Samples, Shares, source_of
from autoaccum.integrations.transformers_step import NAME, OwnStep, refuse
from autoaccum.integrations.transformers_verify import verify
from autoaccum.ranks import here

__all__ = ["attach", "verify"]

FILE = "autoaccum.json"


def attach(trainer: Any, keywords: Mapping[str, Any]) -> Any:
    """Makes the trainer's windows ours, and returns it; nothing runs before its `train()`.

    Raises:
        SetupError: a trainer that cannot be served, or that is attached already.
    """
    refuse(trainer)
    vars(trainer)[NAME] = _Attached(trainer, keywords)
    return trainer


class _Attached:
    """What shadows a trainer's methods."""

    def __init__(self, trainer: Any, keywords: Mapping[str, Any]) -> None:
        from transformers import TrainerCallback

        self.attachment = Attachment(keywords)
        self._trainer, self._step = trainer, OwnStep(trainer)
        self._train, self._loader = trainer.train, trainer.get_train_dataloader
        self._resumed: str | None = None
        args = trainer.args
        args.gradient_accumulation_steps = 1
        args.per_device_train_batch_size = -(-self.attachment.target_batch // here().size)
        trainer._train_batch_size = self.attachment.target_batch
        trainer.train, trainer.training_step = self.train, self.training_step
        trainer.get_train_dataloader = self.get_train_dataloader
        trainer.get_total_train_batch_size = lambda args: self.attachment.target_batch
        attached = self

        class Begins(TrainerCallback):  # type: ignore[misc]  # transformers ships no types where it is not installed
            def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                attached.begin(state, rest["train_dataloader"])

            def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.is_world_process_zero:
                    attached.save(state)

        trainer.add_callback(Begins())

    def train(self, resume_from_checkpoint: Any = None, *rest: Any, **named: Any) -> Any:
        """The trainer's own, with everything of ours gone when it ends."""
        from transformers.trainer_utils import get_last_checkpoint

        found = get_last_checkpoint(self._trainer.args.output_dir) if resume_from_checkpoint is True else None
        self._resumed = found or (resume_from_checkpoint or None)
        with self.attachment.training():
            return self._train(resume_from_checkpoint, *rest, **named)

    def get_train_dataloader(self) -> Any:
        """The trainer's loader, whose batches are windows: samples, not collated."""
        trainer = self._trainer
        collate, size = trainer.data_collator, trainer._train_batch_size
        config = trainer.accelerator.dataloader_config
        dispatch = config.dispatch_batches
        trainer.data_collator, trainer._train_batch_size = Held(collate), self.attachment.target_batch
        config.dispatch_batches = False  # one process would send the others tensors, and these are samples
        try:
            loader = self._loader()
        finally:
            trainer.data_collator, trainer._train_batch_size = collate, size
            config.dispatch_batches = dispatch
        if here().size > 1:
            self._deal(loader)
        return loader

    def _deal(self, loader: Any) -> None:
        """Gives every rank its part of each batch, where Accelerate would give it every so many whole ones."""
        shard = loader.batch_sampler
        # What hands on all batches as they are: one process, and no size that a batch must have.
        shard.num_processes, shard.process_index, shard.even_batches, shard.batch_size = 1, 0, False, None
        shard.batch_sampler = Shares(shard.batch_sampler, self.attachment)

    def begin(self, state: Any, loader: Any) -> None:
        """The first moment at which everything is there: wrapped, prepared, and loaded from a checkpoint."""
        trainer, attachment = self._trainer, self.attachment
        if self._resumed is not None:
            path = Path(self._resumed) / FILE
            if path.is_file():
                attachment.load_state_dict(_read(path), str(path))
        model = _inner(trainer.model_wrapped)
        scaler = trainer.accelerator.scaler
        precision = trainer.accelerator.mixed_precision  # part of the model's forward, and so of the cache's key
        made = attachment.begin(
            Trained(
                model=model,
                optimizer=getattr(trainer.optimizer, "optimizer", trainer.optimizer),
                step=self._step.loss,
                source=source_of(loader),
                device=trainer.args.device,
                drops=bool(trainer.args.dataloader_drop_last),
                scaler=scaler,
                runs_in=f"{precision if precision != 'no' else 'the model as it is'}: the trainer's own",
                code=self._step.code,
                preserved=self._step.preserved,
                noted=self._step.noted,
            ),
            total_steps=state.max_steps,
            step=state.global_step,
        )
        if made.lr_scale != 1 and state.global_step == 0:
            scale_rates(made.lr_scale, trainer.optimizer, [trainer.lr_scheduler])

    def training_step(self, model: Any, window: "Samples", num_items_in_batch: Any = None) -> Tensor:
        """The window's loss; its gradient stands in `.grad`."""
        attachment = self.attachment
        record = attachment.window(window.samples)
        self._step.log(record.micro_batches)
        window.pieces = attachment.pieces
        return torch.tensor(record.loss, device=self._trainer.args.device)

    def save(self, state: Any) -> None:
        """Our part beside the checkpoint that was just written."""
        from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

        folder = Path(self._trainer._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir() and self.attachment.shares is not None:
            write_json(folder / FILE, plain(self.attachment.state_dict()))


def _inner(model: Any) -> Any:
    """The model that one rank runs by itself, compiled where the trainer compiled it."""
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, DistributedDataParallel):
        model = compiled
    return model.module if isinstance(model, DistributedDataParallel) else model


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): delete it to probe anew") from error

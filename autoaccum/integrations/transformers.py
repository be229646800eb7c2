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

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from autoaccum.checking.verify import VerifyReport
from autoaccum.checks import plain
from autoaccum.errors import CheckpointError
from autoaccum.files import read_json, write_json
from autoaccum.integrations.attachment import Attachment, Trained
from autoaccum.integrations.examination import Examination, looked_at
from autoaccum.integrations.heldback import Held, Pieces, Samples, Shares, source_of
from autoaccum.integrations.transformers_step import NAME, OwnStep, refuse, refuse_own_batches
from autoaccum.model.forward import standing
from autoaccum.model.given_model import unwrapped
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


def verify(trainer: Any) -> VerifyReport:
    """Whether the trainer's own accumulation, as it is configured, gives the whole batch's gradient.

    Raises:
        SetupError: a trainer that makes its own batches.
    """
    refuse_own_batches(trainer)
    args, model, step = trainer.args, trainer.model, OwnStep(trainer)
    with standing(trainer, data_collator=Held(trainer.data_collator)):
        loader = trainer.get_train_dataloader()
    asked = args.gradient_accumulation_steps
    steps, samples = looked_at(source_of(loader), asked, args.per_device_train_batch_size)

    def accumulating(number: int) -> AbstractContextManager[None]:
        return standing(args, gradient_accumulation_steps=number)

    def whole(batch: Any) -> None:
        with accumulating(1), trainer.accelerator.autocast():  # 4.50 divides by it in training_step
            loss = step.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]

    def own(count: int, turn: Callable[[int], Any]) -> None:
        # What the trainer's loop does for one optimizer step.
        drawn, items = trainer.get_batch_samples(map(turn, range(count)), count, args.device)
        trainer.current_gradient_accumulation_steps = len(drawn)
        with accumulating(steps), trainer.accelerator.autocast():
            for place in range(len(drawn)):
                trainer.training_step(model, turn(place), items)
        scaler = trainer.accelerator.scaler
        for parameter in model.parameters() if scaler is not None else ():
            if parameter.grad is not None:
                parameter.grad /= scaler.get_scale()

    inner = getattr(model, "get_base_model", lambda: model)()
    return Examination(
        name="Trainer",
        setting="gradient_accumulation_steps",
        steps=steps,
        asked=asked,
        model=model,
        device=args.device,
        samples=samples,
        collate=Pieces(loader.collate_fn),
        plain=whole,
        own=own,
        preserved=step.preserved,
        blame=(
            f"{type(inner).__name__} takes **kwargs and ignores num_items_in_batch"
            if trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None
            else "the mean of each micro-batch is added up undivided"
        ),
        mend=f"autoaccum.attach(trainer, target_batch={args.train_batch_size * asked}) "
        "gives it the batch's own, whatever the micro-batch",
    ).report()


class _Attached:
    """What shadows a trainer's methods."""

    def __init__(self, trainer: Any, keywords: Mapping[str, Any]) -> None:
        from transformers import TrainerCallback

        self.attachment = Attachment(keywords)
        self._trainer, self._step = trainer, OwnStep(trainer)
        self._train, self._loader = trainer.train, trainer.get_train_dataloader
        self._resumed: str | None = None
        target, args = self.attachment.target_batch, trainer.args
        args.gradient_accumulation_steps = 1
        args.per_device_train_batch_size = -(-target // here().size)
        trainer._train_batch_size = target
        trainer.train, trainer.training_step = self.train, self.training_step
        trainer.get_train_dataloader = self.get_train_dataloader
        trainer.get_total_train_batch_size = lambda args: target
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
        try:
            return self._train(resume_from_checkpoint, *rest, **named)
        except BaseException:
            here().fail()  # the other ranks stop as well, instead of waiting for this one
            raise
        finally:
            self.attachment.end()

    def get_train_dataloader(self) -> Any:
        """The trainer's loader, whose batches are windows: samples, not collated."""
        trainer = self._trainer
        own = {"data_collator": Held(trainer.data_collator), "_train_batch_size": self.attachment.target_batch}
        # Otherwise one process would send the others tensors, and these are samples.
        with standing(trainer, **own), standing(trainer.accelerator.dataloader_config, dispatch_batches=False):
            loader = self._loader()
        if here().size > 1:
            # Every rank gets its part of each batch, where Accelerate would give it every so many whole ones. What
            # hands on all batches as they are: one process, and no size that a batch must have.
            shard = loader.batch_sampler
            shard.num_processes, shard.process_index, shard.even_batches, shard.batch_size = 1, 0, False, None
            shard.batch_sampler = Shares(shard.batch_sampler, self.attachment)
        return loader

    def begin(self, state: Any, loader: Any) -> None:
        """The first moment at which everything is there: wrapped, prepared, and loaded from a checkpoint."""
        trainer, attachment = self._trainer, self.attachment
        path = None if self._resumed is None else Path(self._resumed) / FILE
        if path is not None and path.is_file():
            try:
                kept = read_json(path)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{path} cannot be read ({error}): delete it to probe anew") from error
            attachment.load_state_dict(kept, str(path))
        wrapped = trainer.model_wrapped
        compiled = getattr(wrapped, "_orig_mod", None)  # which is trained as it is, where it stands alone
        precision = trainer.accelerator.mixed_precision  # part of the model's forward, and so of the cache's key
        attachment.begin(
            Trained(
                model=unwrapped(compiled if isinstance(compiled, DistributedDataParallel) else wrapped),
                optimizer=getattr(trainer.optimizer, "optimizer", trainer.optimizer),
                step=self._step.loss,
                source=source_of(loader),
                device=trainer.args.device,
                drops=bool(trainer.args.dataloader_drop_last),
                scaler=trainer.accelerator.scaler,
                runs_in=f"{precision if precision != 'no' else 'the model as it is'}: the trainer's own",
                code=self._step.code,
                preserved=self._step.preserved,
                noted=self._step.noted,
            ),
            [trainer.lr_scheduler],
            total_steps=state.max_steps,
            step=state.global_step,
        )

    def training_step(self, model: Any, window: Samples, num_items_in_batch: Any = None) -> Tensor:
        """The window's loss; its gradient stands in `.grad`."""
        record = self.attachment.window(window.samples)
        self._step.log(record.micro_batches)
        window.pieces = self.attachment.pieces
        return torch.tensor(record.loss, device=self._trainer.args.device)

    def save(self, state: Any) -> None:
        """Our part beside the checkpoint that was just written."""
        from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

        folder = Path(self._trainer._get_output_dir(trial=None)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if folder.is_dir() and self.attachment.shares is not None:
            write_json(folder / FILE, plain(self.attachment.state_dict()))

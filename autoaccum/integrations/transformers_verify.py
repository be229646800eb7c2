"""`autoaccum.verify(trainer)`: what a Transformers Trainer's own accumulation does to the gradient."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autoaccum.checking.verify import VerifyReport
from autoaccum.integrations.examination import Subject, examine, looked_at
from autoaccum.integrations.heldback import Held, Pieces, source_of
from autoaccum.integrations.transformers_step import OwnStep, refuse_own_batches

__all__ = ["verify"]


def verify(trainer: Any) -> VerifyReport:
    """Whether the trainer's own accumulation, as it is configured, gives the whole batch's gradient.

    Raises:
        SetupError: a trainer that makes its own batches.
    """
    refuse_own_batches(trainer)
    args, model = trainer.args, trainer.model
    step = OwnStep(trainer)
    held = trainer.data_collator
    trainer.data_collator = Held(held)
    try:
        loader = trainer.get_train_dataloader()
    finally:
        trainer.data_collator = held
    collate = Pieces(loader.collate_fn)
    steps, samples = looked_at(source_of(loader), args.gradient_accumulation_steps, args.per_device_train_batch_size)

    @contextmanager
    def accumulating(number: int) -> Iterator[None]:
        asked, args.gradient_accumulation_steps = args.gradient_accumulation_steps, number
        try:
            with trainer.accelerator.autocast():
                yield
        finally:
            args.gradient_accumulation_steps = asked

    def plain(batch: Any) -> None:
        with accumulating(1):  # 4.50 divides by it in training_step
            loss = step.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]

    def own(count: int, turn: Callable[[int], Any]) -> None:
        # What the trainer's loop does for one optimizer step.
        drawn, items = trainer.get_batch_samples(map(turn, range(count)), count, args.device)
        trainer.current_gradient_accumulation_steps = len(drawn)
        with accumulating(steps):
            for place in range(len(drawn)):
                trainer.training_step(model, turn(place), items)
        scaler = trainer.accelerator.scaler
        for parameter in model.parameters() if scaler is not None else ():
            if parameter.grad is not None:
                parameter.grad /= scaler.get_scale()

    inner = getattr(model, "get_base_model", lambda: model)()
    return examine(
        Subject(
            name="Trainer",
            setting="gradient_accumulation_steps",
            steps=steps,
            asked=args.gradient_accumulation_steps,
            model=model,
            device=args.device,
            samples=samples,
            collate=collate,
            plain=plain,
            own=own,
            preserved=step.preserved,
            blame=(
                f"{type(inner).__name__} takes **kwargs and ignores num_items_in_batch"
                if trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None
                else "the mean of each micro-batch is added up undivided"
            ),
            mend=f"autoaccum.attach(trainer, target_batch={args.train_batch_size * args.gradient_accumulation_steps}) "
            "gives it the batch's own, whatever the micro-batch",
        )
    )

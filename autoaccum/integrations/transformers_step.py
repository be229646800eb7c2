"""The loss of one batch as a Transformers Trainer's own step makes it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from autoaccum.errors import SetupError
from autoaccum.integrations.noted import Noted
from autoaccum.ranks import here

__all__ = ["OwnStep"]

# Keeps training_step from dividing the loss by its accumulation steps, which are 1: in the loss's graph that looks like
# a division of the user's. Transformers 5.19 and later read the first, 4.50 the second.
_UNDIVIDED = {"loss_is_scaled_for_ga": True, "model_accepts_loss_kwargs": True}


class OwnStep:
    """A trainer's `training_step`, as it was before anything took its place.

    Attributes:
        code: what decides the step's memory beside the model.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._step = trainer, trainer.training_step
        kind = type(trainer)
        self.code = f"{kind.__module__}.{kind.__qualname__} {trainer.args.label_smoothing_factor}"

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The loss of one batch as the trainer's own step makes it, before its backward."""
        trainer = self._trainer
        caught: list[Tensor] = []
        accelerator = trainer.accelerator
        trainer.current_gradient_accumulation_steps = 1
        own = {"backward": lambda loss, **_: caught.append(loss)}
        if here().size > 1:  # a rank may run more micro-batches than another, which nobody may wait for in a gather
            own |= dict.fromkeys(("gather", "gather_for_metrics"), lambda values, *_, **__: values)
        with _standing(accelerator, own), _standing(trainer, _UNDIVIDED):
            self._step(model, dict(batch) if isinstance(batch, dict) else batch, None)
        if len(caught) != 1:
            raise SetupError(
                f"{type(trainer).__name__}.training_step called accelerator.backward {len(caught)} times for a batch, "
                "and attach() takes the loss from there: have it call the Trainer's own training_step, or "
                "accelerator.backward(loss) once"
            )
        (loss,) = caught
        return loss

    def noted(self) -> Noted:
        """What the trainer's step noted on the trainer so far (metrics, token counts)."""
        return Noted(self._trainer)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What the trainer's step notes on the trainer is as before afterwards."""
        kept = self.noted()
        try:
            yield
        finally:
            kept.restore()


@contextmanager
def _standing(owner: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Attributes of an object for a while, in the place of its own or its class's."""
    held = vars(owner)
    before = {name: held[name] for name in attributes if name in held}
    held.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            del held[name]
        held.update(before)

"""The loss of one batch as a Transformers Trainer's own step makes it; and what Trainers cannot be asked for it.

What a trainer notes on itself while its step runs (plain values) is put back after a probe or a pass that failed, and
what it logs waits until its window is done.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn

from autoaccum.checks import refuse_any
from autoaccum.errors import SetupError
from autoaccum.integrations.heldback import refuse_dealt_streams
from autoaccum.integrations.trainers import refuse_late
from autoaccum.model.forward import standing
from autoaccum.ranks import here

__all__ = ["NAME", "OwnStep", "refuse", "refuse_own_batches"]

NAME = "_autoaccum"  # of what stands on a trainer that is attached

_PLAIN = (int, float, bool, str, type(None))
_OF_BATCHES = (
    "get_train_dataloader", "_get_dataloader", "_prepare_inputs", "get_batch_samples", "_inner_training_loop"
)  # fmt: skip
# Keeps training_step from dividing the loss by its accumulation steps, which are 1: in the loss's graph that looks like
# a division of the user's. Transformers 5.19 and later read the first, 4.50 the second.
_UNDIVIDED = {"loss_is_scaled_for_ga": True, "model_accepts_loss_kwargs": True}


class Noted:
    """The plain attributes of an object, and its containers of nothing but plain values."""

    def __init__(self, owner: Any) -> None:
        self._owner, self._names = owner, set(vars(owner))
        self._kept = {name: copy.deepcopy(value) for name, value in vars(owner).items() if _is_plain(value)}

    def restore(self) -> None:
        """Sets them back; what came since goes."""
        held = vars(self._owner)
        for name in [name for name in held if name not in self._names]:
            del held[name]
        held.update(copy.deepcopy(self._kept))  # a window may run more than twice


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value, dict) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, set, tuple)):
        return len(value) <= 1000 and all(map(_is_plain, value))
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.is_leaf
    return isinstance(value, _PLAIN)


class OwnStep:
    """A trainer's `training_step`, as it was before anything took its place.

    Attributes:
        code: what decides the step's memory beside the model.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer, self._step = trainer, trainer.training_step
        kind = type(trainer)
        self.code = f"{kind.__module__}.{kind.__qualname__} {trainer.args.label_smoothing_factor}"
        self._logged: list[list[Callable[[], None]]] = []  # by call of the step

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The loss of one batch as the trainer's own step makes it, before its backward."""
        trainer = self._trainer
        caught: list[Tensor] = []
        trainer.current_gradient_accumulation_steps = 1
        logged: list[Callable[[], None]] = []
        self._logged.append(logged)
        log, own = trainer.log, {"backward": lambda loss, **_: caught.append(loss)}
        if here().size > 1:  # a rank may run more micro-batches than another, which nobody may wait for in a gather
            own |= dict.fromkeys(("gather", "gather_for_metrics"), lambda values, *_, **__: values)
        waits = {"log": lambda *logs, **named: logged.append(partial(log, *logs, **named))}
        with standing(trainer.accelerator, **own), standing(trainer, **_UNDIVIDED, **waits):
            self._step(model, dict(batch) if isinstance(batch, dict) else batch, None)
        if len(caught) != 1:
            raise SetupError(
                f"{type(trainer).__name__}.training_step called accelerator.backward {len(caught)} times for a batch, "
                "and attach() takes the loss from there: have it call the Trainer's own training_step, or "
                "accelerator.backward(loss) once"
            )
        return caught[0]

    def log(self, calls: int) -> None:
        """Logs what the last so many calls did: earlier ones ran out of memory and ran again, or only read."""
        for each in chain(*self._logged[-calls:]) if calls else ():
            each()
        self._logged.clear()

    def noted(self) -> Noted:
        """What the trainer's step noted on the trainer so far (metrics, token counts)."""
        return Noted(self._trainer)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What the trainer's step notes on the trainer is as before afterwards, and what it logs goes nowhere."""
        kept = self.noted()
        try:
            with standing(self._trainer, log=lambda *logs, **named: None):
                yield
        finally:
            self._logged.clear()
            kept.restore()


def refuse(trainer: Any) -> None:
    """Refuses, before anything is touched, a trainer whose windows cannot be made ours, with a SetupError."""
    args, model = trainer.args, trainer.model
    refuse_late(NAME in vars(trainer), trainer.is_in_train, "trainer.train()")
    refuse_own_batches(trainer)
    layers = () if model is None else model.named_modules()
    embeddings = {name: layer for name, layer in layers if isinstance(layer, (nn.Embedding, nn.EmbeddingBag))}
    sparse = next((name for name, layer in embeddings.items() if layer.sparse), None)
    strategy = getattr(args, "train_sampling_strategy", None)
    shards = "shards what attach() has to add up: train without it, or with its own settings"
    refuse_any(
        {
            "auto_find_batch_size=True shrinks the batch when memory runs out, and attach() keeps it: set it to "
            "False": args.auto_find_batch_size,
            f"one process for {args.n_gpu} GPUs is DataParallel, which splits each batch by itself: start the script "
            "with torchrun, one process for each GPU, or show it one with CUDA_VISIBLE_DEVICES": args.n_gpu > 1,
            f'train_sampling_strategy="{strategy}" makes its own batches: leave it out; windows are cut by '
            "length": strategy == "batch_rebalance",
            f"DeepSpeed {shards}": trainer.is_deepspeed_enabled,
            f"FSDP {shards}": trainer.is_fsdp_enabled,
            f"{sparse} has sparse gradients, and the Trainer takes the norm of all gradients, which torch cannot of "
            "sparse ones: make it with sparse=False": sparse is not None,
        }
    )
    refuse_dealt_streams(trainer.train_dataset)


def refuse_own_batches(trainer: Any) -> None:
    """Refuses a trainer that makes its own batches, with a SetupError that names the class which does."""
    for method in _OF_BATCHES:
        where = next((base for base in type(trainer).__mro__ if method in vars(base)), None)
        if where is not None and not where.__module__.startswith("transformers."):
            raise SetupError(
                f"{where.__name__} makes its own batches ({where.__module__} overrides {method}), and may count the "
                "calls of training_step: attach() cannot cut them; train with its own settings"
            )

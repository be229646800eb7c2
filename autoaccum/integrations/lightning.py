"""Lightning: `Trainer(callbacks=[TargetBatch(256)])`, windows inside its own automatic optimization.

Choices made here:

- The window runs in the closure that the optimizer's step is given, so hooks, clipping, schedules, precision plugins
  and checkpoints see one batch a step. The loop that makes the closure is replaced by an heir of itself; that attribute
  is private, and a test holds it for each version.
- The loader's batch sampler is made anew with the target batch, over the user's own sampler, and its collate function
  held back: pieces are collated, converted and moved to the device one by one, through the module's own hooks.
- What `training_step` logs is gathered over the pieces and logged once, weighted by their samples; the loss itself as
  the window's loss. So a replay, or the probe, leaves nothing in the logs.
- On several ranks the module runs without its DistributedDataParallel: gradients are summed once a window.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult, _AutomaticOptimization
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from autoaccum.checks import refuse_any
from autoaccum.errors import SetupError
from autoaccum.integrations.attachment import Attachment, Trained
from autoaccum.integrations.heldback import Samples, loader_of_windows, source_of
from autoaccum.integrations.lightning_verify import verify
from autoaccum.integrations.logged import Logged
from autoaccum.integrations.trainers import refuse_late, wanted
from autoaccum.model.forward import standing
from autoaccum.ranks import here

__all__ = ["TargetBatch", "attach", "verify"]


def attach(trainer: Any, keywords: Mapping[str, Any]) -> Any:
    """Adds a TargetBatch to the trainer's callbacks, and returns the trainer.

    Raises:
        SetupError: it has one already, or is training.
    """
    refuse_late(any(isinstance(each, TargetBatch) for each in trainer.callbacks), trainer.training, "trainer.fit()")
    trainer.callbacks.insert(0, TargetBatch(**keywords))
    return trainer


class TargetBatch(Callback):  # type: ignore[misc]  # no types where lightning is not installed
    """Trains with exactly `target_batch` samples a step, in micro-batches that fit; stands in for a BatchSizeFinder.

    ```python
    trainer = lightning.Trainer(callbacks=[autoaccum.integrations.lightning.TargetBatch(256)])
    trainer.fit(module, loader)
    ```

    The loader's batch size and `accumulate_grad_batches` are set aside. Callbacks and hooks that are given the batch
    get the window's samples, not collated.
    """

    def __init__(self, target_batch: int | None = None, **keywords: Any) -> None:
        """Takes the keywords of `autoaccum.attach`, and checks them.

        Raises:
            SetupError, PlanError: an unknown keyword or value, or no target.
        """
        self._keywords = {**keywords, "target_batch": target_batch}
        wanted(self._keywords)
        self.attachment: Attachment | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuses what cannot be served, and takes the loader over before it is asked for."""
        if stage != "fit":
            return
        _refuse(trainer, pl_module)
        self.attachment = Attachment(self._keywords)
        trainer.accumulate_grad_batches = 1
        source, progress = trainer.fit_loop._data_source, trainer.fit_loop.epoch_loop.batch_progress
        own, attachment = source.dataloader, self.attachment
        source.dataloader = lambda: loader_of_windows(own(), attachment, lambda: progress.current.ready)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The first moment at which everything is there: the strategy set up, the state restored, the loader made."""
        attachment = self.attachment
        assert attachment is not None
        epoch_loop = trainer.fit_loop.epoch_loop
        windowed = _Windowed(trainer, pl_module, attachment)
        windowed.load_state_dict(epoch_loop.automatic_optimization.state_dict())
        (loader,) = trainer.fit_loop._combined_loader.flattened
        attachment.begin(
            Trained(
                model=pl_module,
                optimizer=trainer.optimizers[0],
                step=windowed.loss,
                source=source_of(loader),
                device=trainer.strategy.root_device,
                drops=bool(loader.batch_sampler.drop_last) if loader.batch_sampler is not None else loader.drop_last,
                scaler=getattr(trainer.precision_plugin, "scaler", None),
                runs_in=f"{trainer.precision}: the trainer's own",
                code=f"{type(pl_module).__module__}.{type(pl_module).__qualname__} {trainer.precision}",
                preserved=windowed.preserved,
            ),
            [config.scheduler for config in trainer.lr_scheduler_configs],
            total_steps=trainer.estimated_stepping_batches if trainer.max_epochs != -1 else None,
            step=trainer.global_step,
        )
        epoch_loop.automatic_optimization = windowed

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Nothing of ours stays on the module."""
        if self.attachment is not None:
            self.attachment.end()
        vars(trainer.fit_loop._data_source).pop("dataloader", None)
        epoch_loop = trainer.fit_loop.epoch_loop
        if isinstance(epoch_loop.automatic_optimization, _Windowed):
            epoch_loop.automatic_optimization = epoch_loop.automatic_optimization.leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Whatever ended the training, nothing of ours stays, and the other ranks stop as well."""
        if self.attachment is not None and self.attachment.shares is not None:
            here().fail()
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Into the trainer's checkpoints."""
        return self.attachment.state_dict() if self.attachment is not None and self.attachment.shares else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Out of them."""
        if state_dict and self.attachment is not None:
            self.attachment.load_state_dict(state_dict, "the checkpoint's TargetBatch")


class _Windowed(_AutomaticOptimization):  # type: ignore[misc]
    """The trainer's loop over an optimizer, whose closure runs a window."""

    def __init__(self, trainer: Any, module: Any, attachment: Attachment) -> None:
        super().__init__(trainer)
        self._module, self._attachment, self._logged = module, attachment, Logged()
        strategy = trainer.strategy
        self._hook, self._move = module._on_before_batch_transfer, strategy.batch_to_device
        self._stands = ExitStack()
        # The window as a whole goes past them: they are asked for each piece.
        self._stands.enter_context(standing(module, _on_before_batch_transfer=_past_windows(self._hook)))
        self._stands.enter_context(standing(strategy, batch_to_device=_past_windows(self._move)))

    def leave(self) -> _AutomaticOptimization:
        """Takes away what stands before others' methods; the trainer's own loop, with the progress so far."""
        self._stands.close()
        loop = _AutomaticOptimization(self.trainer)
        loop.load_state_dict(self.state_dict())
        return loop

    def _make_closure(self, kwargs: OrderedDict[str, Any], optimizer: Any, batch_idx: int) -> Closure:
        zero = self._make_zero_grad_fn(batch_idx, optimizer)

        def step() -> ClosureResult:
            trainer = self.trainer
            if zero is not None:
                zero()
            with self._gathering():
                record = self._attachment.window(kwargs["batch"].samples, trainer.current_epoch)
            loss = self._logged.apply(record.micro_batches, record.loss, trainer.strategy.root_device)
            call._call_callback_hooks(trainer, "on_after_backward")
            call._call_lightning_module_hook(trainer, "on_after_backward")
            return ClosureResult(loss)

        return Closure(step_fn=step)

    def loss(self, module: Any, batch: Any) -> Tensor:
        """The loss of one batch as the module's training_step makes it; what it logs is gathered."""
        self._logged.begin()
        trainer = self.trainer
        batch = self._hook(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
        batch = self._move(batch, dataloader_idx=0)
        epoch_loop = trainer.fit_loop.epoch_loop
        kwargs = epoch_loop._build_kwargs(OrderedDict(), batch, max(epoch_loop.batch_idx, 0))
        results = epoch_loop._results
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None
        profiled, plugin = trainer.profiler.profile("[Strategy]training_step"), trainer.precision_plugin
        with standing(module, _current_fx_name="training_step"), profiled, plugin.train_step_context():
            output = module.training_step(*kwargs.values())
        ClosureResult.from_training_step_output(output)  # refuses what is no loss
        # As the module gave it: the result's own loss is divided by 1, which looks like a division of the user's.
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            raise SetupError(
                f"{type(module).__name__}.training_step returned None for a micro-batch, and the window cannot be "
                "weighted: return a loss, of zero weight where nothing counts"
            )
        self._logged.piece(loss)
        return loss  # type: ignore[no-any-return]

    def _gathering(self) -> AbstractContextManager[None]:
        """What is logged inside is gathered, and applied to nothing yet."""
        results = self.trainer.fit_loop.epoch_loop._results
        self._logged = Logged(results)
        return standing(results, update_metrics=self._logged.note)

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """What the module logs in a probe is forgotten."""
        results = self.trainer.fit_loop.epoch_loop._results
        kept = dict(results)
        try:
            with self._gathering():
                yield
        finally:
            results.clear()
            results.update(kept)
            results.batch = results.batch_size = None


def _past_windows(move: Any) -> Any:
    return lambda batch, *rest, **named: batch if isinstance(batch, Samples) else move(batch, *rest, **named)


def _refuse(trainer: Any, module: Any) -> None:
    """Refuses, before anything runs, what cannot be served, with a SetupError."""
    reasons = {
        "manual optimization steps by itself: use autoaccum.Accumulator in it": not module.automatic_optimization,
        "training_step(dataloader_iter) fetches its own batches: take a batch instead": is_param_in_hook_signature(
            module.training_step, "dataloader_iter", explicit=True
        ),
        "the module's own backward() cannot be weighted: leave it out": is_overridden("backward", module),
        f"{type(trainer.strategy).__name__} shards the model, or adds gradients up itself: use one device, or DDP": (
            not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        ),
        "overfit_batches makes its own loader: use limit_train_batches": bool(trainer.overfit_batches),
    }
    for kind in (GradientAccumulationScheduler, StochasticWeightAveraging):
        reasons[f"{kind.__name__} changes what a batch is: leave it out"] = any(
            isinstance(callback, kind) for callback in trainer.callbacks
        )
    refuse_any({f"TargetBatch cannot train this: {reason}": holds for reason, holds in reasons.items()})

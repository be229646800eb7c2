"""`autoaccum.verify(trainer, module)`: what Lightning's own accumulation does to the gradient.

Lightning's own loop runs: a trainer of the same precision and accumulation fits the module on a few of its samples,
with an optimizer whose rate is 0, and the gradient is what stands in the parameters before the step. Hooks of the
module run as in any fit; its loggers, callbacks and checkpoints are left out.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from autoaccum.checking.verify import VerifyReport
from autoaccum.errors import SetupError
from autoaccum.integrations.examination import Examination, looked_at
from autoaccum.integrations.heldback import Held, source_of
from autoaccum.model.forward import standing

__all__ = ["verify"]


def verify(trainer: Any, given: Any = None) -> VerifyReport:
    """Whether the trainer's own accumulation, as it is configured, gives the whole batch's gradient.

    Args:
        trainer: a Lightning Trainer, fitted or not.
        given: the module; or (module,), (module, loader or datamodule). None: the module that it fitted.

    Raises:
        SetupError: no module, no DataLoader, or manual optimization.
    """
    module, *data = given if isinstance(given, tuple) else (given,)
    module = module if module is not None else trainer.lightning_module
    if module is None:
        raise SetupError("a Lightning Trainer knows its module in fit() only: call verify(trainer, module)")
    if not module.automatic_optimization:
        raise SetupError("manual optimization accumulates by the module's own code: verify(module, data, step=...)")
    loader = _loader(module, data[0] if data else None)
    asked = trainer.accumulate_grad_batches
    source = source_of(DataLoader(loader.dataset, collate_fn=Held(loader.collate_fn)))
    steps, samples = looked_at(source, asked, loader.batch_size)
    return Examination(
        name="Lightning Trainer",
        setting="accumulate_grad_batches",
        steps=steps,
        asked=asked,
        model=_inside(module),
        device=next(module.parameters()).device,
        samples=samples,
        collate=source._collated,
        plain=lambda batch: _fit(trainer, module, 1, lambda _: batch, 1),
        own=lambda count, turn: _fit(trainer, module, count, turn, steps),
        preserved=lambda: standing(module, _trainer=module._trainer),
        blame="the mean of each micro-batch is added up undivided",
        mend=(
            "Trainer(callbacks=[autoaccum.integrations.lightning.TargetBatch("
            f"{(loader.batch_size or 2) * asked})]) gives it the batch's own, whatever the micro-batch"
        ),
    ).report()


def _loader(module: Any, data: Any) -> DataLoader[Any]:
    if hasattr(data, "train_dataloader"):
        data.prepare_data()
        data.setup("fit")
    owner = data if hasattr(data, "train_dataloader") else module
    loader = data if isinstance(data, DataLoader) else owner.train_dataloader()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise SetupError(
            f"the training loader is a {type(loader).__name__}: verify(trainer, (module, loader)) takes a DataLoader "
            "of a dataset with indices"
        )
    return loader


def _fit(trainer: Any, module: Any, count: int, turn: Callable[[int], Any], accumulated: int) -> None:
    """Lightning's own loop over so many batches, up to the step, whose optimizer changes nothing."""

    class Turn(Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            turn(batch_idx)  # puts the module back to its start for this micro-batch; the next was fetched before

    def optimizer() -> Any:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.0)

    chatty = logging.getLogger("lightning.pytorch")
    level = chatty.level
    try:
        chatty.setLevel(logging.ERROR)
        own = {"configure_optimizers": optimizer, "configure_gradient_clipping": lambda *given, **named: None}
        with warnings.catch_warnings(), standing(module, **own):
            warnings.simplefilter("ignore")
            again = Trainer(
                accelerator=next(module.parameters()).device.type.replace("cuda", "gpu"), devices=1,
                precision=trainer.precision, accumulate_grad_batches=accumulated, max_epochs=1, callbacks=[Turn()],
                limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False,
            )  # fmt: skip
            again.fit(module, _InTurn(count, turn))
    finally:
        chatty.setLevel(level)


def _inside(module: nn.Module) -> nn.Module:
    """What a module holds, without what Lightning keeps on it while it fits, which nobody may put back meanwhile."""
    inside = nn.Module()
    for held in ("_modules", "_parameters", "_buffers"):
        vars(inside)[held] = getattr(module, held)
    return inside


class _InTurn:
    """A loader of batches that are made in turn; unlike a DataLoader it draws nothing from the module's generator."""

    def __init__(self, count: int, turn: Callable[[int], Any]) -> None:
        self._count, self._turn = count, turn

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        return map(self._turn, range(self._count))

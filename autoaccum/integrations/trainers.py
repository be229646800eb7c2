"""`attach` and `verify`, for whichever trainer they are given: known by where its class is from, loaded on use."""

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from autoaccum.checking.verify import VerifyReport
from autoaccum.checks import refuse_any
from autoaccum.errors import SetupError, shown
from autoaccum.planning.given_plan import given_plan, target_of
from autoaccum.planning.plan import Plan
from autoaccum.session import check_settings
from autoaccum.settings import Settings
from autoaccum.training.events import Listener

__all__ = ["attach", "is_trainer", "refuse_late", "verify", "wanted"]

T = TypeVar("T")

_KNOWN = {
    "transformers.trainer.Trainer": "transformers",
    "lightning.pytorch.trainer.trainer.Trainer": "lightning",
    "pytorch_lightning.trainer.trainer.Trainer": "lightning",
}


def attach(
    trainer: T,
    *,
    target_batch: int | None = None,
    memory: int | str | None = None,
    micro_batch: int | None = None,
    plan: Plan | str | None = None,
    lr_batch: int | None = None,
    lr_rule: str = "auto",
    reduction: str | Callable[[Any], float] = "auto",
    accumulate: str = "fp32",
    batch_norm: str = "pooled",
    prefer: str = "fewest",
    multiple_of: int = 1,
    max_batch: int | None = None,
    cache: bool = True,
    check: bool | str = True,
    ladder: str | bool | None = None,
    regrow_after: int | None = None,
    on_nonfinite: str = "raise",
    progress: bool | None = None,
    callbacks: Iterable[Listener] = (),
) -> T:
    """Gives somebody else's trainer exact batches that fit; its loop, logs, schedule and checkpoints stay as they are.

    ```python
    trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collator)
    autoaccum.attach(trainer, target_batch=256)
    trainer.train()
    ```

    Before the trainer's first step its own step is probed, and the plan is shown; then each of its batches is a window
    of `target_batch` samples over all ranks, which runs in as many micro-batches as the plan says. Its batch size and
    its accumulation steps are set aside. Its step counts, schedule, logs and checkpoints are those of the whole batch.

    Args:
        trainer: a Transformers Trainer or an heir of it (TRL's SFT, DPO and reward trainers), or a Lightning Trainer.
        target_batch: samples of one optimizer step, over all ranks.
        lr_batch: the batch that the trainer's learning rate was tuned at; None: its rate is left as it is.
        reduction: what the trainer's loss divides by, where that is not found: "sample_mean", "sum" or f(batch).
        memory, micro_batch, plan, lr_rule, accumulate, batch_norm, prefer, multiple_of, max_batch, cache, check,
            ladder, regrow_after, on_nonfinite, progress, callbacks: as in `fit`.

    Returns:
        The trainer itself.

    Raises:
        SetupError: a trainer that cannot be served, with the reason; it is left as it was.
        PlanError: no target, or one that is no whole number above 0.
    """
    keywords = {name: value for name, value in locals().items() if name != "trainer"}
    return _integration(trainer, "attach").attach(trainer, keywords)  # type: ignore[no-any-return]


def verify(trainer: Any, rest: Any, keywords: Mapping[str, Any]) -> VerifyReport:
    """What `trainer`'s own accumulation does to the gradient, as it is configured; `rest`: a Lightning module and data.

    Raises:
        SetupError: a trainer that cannot be looked at, or keywords, which are a model's.
    """
    given = [name for name, value in keywords.items() if value not in (None, "auto")]
    if given:
        raise SetupError(f"verify(trainer) takes no {given[0]}=: what the trainer is configured with is looked at")
    return _integration(trainer, "verify").verify(*((trainer,) if rest is None else (trainer, rest)))  # type: ignore[no-any-return]


def is_trainer(value: Any) -> bool:
    """Whether `value` is a trainer that `attach` and `verify` know; nothing is imported to see it."""
    return _known(value) is not None


def _known(value: Any) -> str | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in type(value).__mro__)
    return next((_KNOWN[name] for name in names if name in _KNOWN), None)


def _integration(trainer: Any, doing: str) -> Any:
    """The module that knows this trainer."""
    known, kind = _known(trainer), type(trainer)
    if known is None:
        raise SetupError(
            f"{doing}() got a {kind.__module__}.{kind.__qualname__}: it takes a Transformers Trainer or a Lightning "
            "Trainer; with a loop of your own use autoaccum.Accumulator, and without a loop autoaccum.fit"
        )
    return importlib.import_module(f"autoaccum.integrations.{known}")


def refuse_late(attached: bool, training: bool, begins: str) -> None:
    """Refuses a trainer that is attached, or that trains already, as `begins` makes it do; with a SetupError."""
    refuse_any(
        {
            "this trainer is attached already: attach() takes hold of a trainer once": attached,
            f"training has begun: call attach(trainer, target_batch=...) before {begins}": training,
        }
    )


def wanted(keywords: Mapping[str, Any]) -> Settings:
    """The keywords of `attach`, checked before anything is touched; the others as they are where they are not given.

    Raises:
        SetupError: an unknown keyword or value.
        PlanError: no target, or one that is no whole number above 0.
    """
    names = [name for name in inspect.signature(attach).parameters if name != "trainer"]
    for name in keywords:
        if name not in names:
            raise SetupError(f"attach() does not take {name!r}: it takes {', '.join(names)}; the rest is the trainer's")
    asked = Settings(keywords)
    given = None if asked.plan is None else given_plan(asked.plan, asked.target_batch)
    check_settings(asked, SetupError)
    if not callable(asked.reduction) and asked.reduction not in ("auto", "sample_mean", "sum"):
        raise SetupError(
            f"reduction={shown(asked.reduction)} cannot be declared for a trainer's step: give 'auto', "
            "'sample_mean', 'sum' or f(batch) -> float"
        )
    asked["target_batch"], asked["plan"] = target_of(given, asked.target_batch), given
    return asked

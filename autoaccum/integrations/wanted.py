"""The keywords of `attach`, checked before anything is touched."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from autoaccum.checks import check_counts, one_of
from autoaccum.errors import SetupError, shown
from autoaccum.planning.given_plan import given_plan, target_of
from autoaccum.training.events import Listener

__all__ = ["Wanted", "refuse_late"]


def refuse_late(attached: bool, training: bool, begins: str) -> None:
    """Refuses a trainer that is attached, or that trains already, as `begins` makes it do; with a SetupError."""
    if attached:
        raise SetupError("this trainer is attached already: attach() takes hold of a trainer once")
    if training:
        raise SetupError(f"training has begun: call attach(trainer, target_batch=...) before {begins}")


@dataclass(frozen=True)
class Wanted:
    """The keywords of `attach`, with the meanings that they have in `fit`."""

    target_batch: int | None = None
    memory: int | str | None = None
    micro_batch: int | None = None
    plan: Any = None
    lr_batch: int | None = None
    lr_rule: str = "auto"
    reduction: Any = "auto"
    accumulate: str = "fp32"
    batch_norm: str = "pooled"
    prefer: str = "fewest"
    multiple_of: int = 1
    max_batch: int | None = None
    cache: bool = True
    check: bool | str = True
    ladder: str | bool | None = None
    regrow_after: int | None = None
    on_nonfinite: str = "raise"
    progress: bool | None = None
    callbacks: Iterable[Listener] = ()

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> "Wanted":
        """Checked before anything is touched.

        Raises:
            SetupError: an unknown keyword or value.
            PlanError: no target, or one that is no whole number above 0.
        """
        names = [field.name for field in fields(cls)]
        for name in keywords:
            if name not in names:
                raise SetupError(
                    f"attach() does not take {name!r}: it takes {', '.join(names)}; the rest is the trainer's"
                )
        wanted = cls(**keywords)
        given = None if wanted.plan is None else given_plan(wanted.plan, wanted.target_batch)
        check_counts(max_batch=wanted.max_batch, micro_batch=wanted.micro_batch, regrow_after=wanted.regrow_after)
        if not callable(wanted.reduction) and wanted.reduction not in ("auto", "sample_mean", "sum"):
            raise SetupError(
                f"reduction={shown(wanted.reduction)} cannot be declared for a trainer's step: give 'auto', "
                "'sample_mean', 'sum' or f(batch) -> float"
            )
        one_of("check", wanted.check, (True, False, "warn"))
        one_of("prefer", wanted.prefer, ("fewest", "fastest"))
        one_of("on_nonfinite", wanted.on_nonfinite, ("raise", "skip"))
        return replace(wanted, target_batch=target_of(given, wanted.target_batch), plan=given)

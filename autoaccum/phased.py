"""What is done once for each phase of a training, or once where it has but one optimizer: probe, check, make ready."""

from contextlib import ExitStack
from typing import Any

import torch

from autoaccum.assembly import Parts
from autoaccum.checking.verify import VerifyReport
from autoaccum.model.snapshot import Snapshot
from autoaccum.pipeline import Isolation, checked, probed
from autoaccum.planning.plan import Plan, plan
from autoaccum.probing.isolate import InChild
from autoaccum.probing.probe import Question
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import Ranks
from autoaccum.training.events import Events, Noted
from autoaccum.training.rates import apply_plan, scheduled
from autoaccum.training.schedule import build_schedule
from autoaccum.window.accumulate import Accumulator

__all__ = ["checked_phases", "for_phase", "probed_phases", "ready_to_train"]


def probed_phases(
    parts: Parts,
    question: Question,
    events: Events,
    isolation: Isolation | InChild | None,
    cache: bool,
    **settings: Any,
) -> ProbeReport:
    """`probed` for each phase, with the other optimizers' state in memory: the report of the phase that fits least.

    Raises:
        NothingFitsError: not even the smallest micro-batch fits in one of them.
    """
    if len(parts.turns) == 1:
        return probed(parts, question, events, isolation, cache, **settings)
    reports = []
    with ExitStack() as stack:
        for turn in parts.turns:
            stack.enter_context(Snapshot(turn.model, turn.optimizer, device=turn.device.torch_device))
        for turn in parts.turns:
            _warm(turn)
        for turn in parts.turns:
            assert turn.phase is not None
            events.tell(Noted(f"probing the phase {turn.phase.name!r}"))
            own = {**settings, "clip_norm": turn.phase.clip_norm}
            reports.append(probed(turn, question, events, isolation, cache, **own))
    taken = next((turn.ladder for turn in parts.turns if turn.ladder is not None), None)
    for turn in parts.turns:
        if turn.ladder != taken:
            turn.take(taken)
    return min(reports, key=lambda report: report.micro_batch)


def _warm(turn: Parts) -> None:
    """One step of two samples, so that the optimizer has its state; a snapshot around it takes that back."""
    for group in turn.optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
    accumulator = Accumulator(
        turn.model, turn.optimizer, plan(2, 2, optimizer=turn.optimizer, batch_norm="keep"), objective=turn.objective,
        precision=turn.precision.name, device=turn.device.torch_device, ranks=Ranks(),
    )  # fmt: skip
    accumulator.rehearses = True
    try:
        with turn.running(alone=True):
            batch = turn.source.trial(2)
            accumulator.open([batch])
            accumulator.run([batch])
            accumulator.finish()
    finally:
        accumulator.discard()
        accumulator.close()


def checked_phases(parts: Parts, check: bool | str, made: Plan, events: Events) -> VerifyReport | None:
    """`checked` for each phase in turn: the report of the first that failed, else of the first.

    Raises:
        LossError: one failed, and `check` is not "warn".
    """
    reports = [checked(turn, check, made, events) for turn in parts.turns]
    return next((report for report in reports if report is not None and not report.ok), reports[0])


def for_phase(turn: Parts, first: Plan, lr_rule: str) -> Plan:
    """The plan of a later phase: sizes as the first one's, rates from its own optimizer."""
    lr_batch = (first.lr_batch or turn.source.loader_batch) if turn.lr_given else None
    return plan(
        first.limits, first.target_batch, world_size=first.world_size, rank=first.rank, samples=first.samples,
        optimizer=turn.optimizer, lr_batch=lr_batch, lr_rule=lr_rule, batch_norm=first.batch_norm,
        batch_norm_layers=first.batch_norm_layers, bn_momentum=first.layer_momentum, minimum=first.minimum,
        multiple_of=first.multiple_of, tail=first.tail, reasons={"denominator": turn.objective.reason},
        by_length=first.by_length,
    )  # fmt: skip


def ready_to_train(
    turn: Parts, made: Plan, total: int | None, events: Events, *, schedule: Any, warmup_steps: int,
    clip_norm: float | None, **settings: Any,
) -> Accumulator:  # fmt: skip
    """The accumulator of one phase, or of the whole training, its optimizer at the plan's rates and on its schedule."""
    phase = turn.phase
    if phase is not None:
        schedule, warmup_steps, clip_norm = phase.schedule, phase.warmup_steps, phase.clip_norm
        total = None if total is None else -(-total // phase.every)
    apply_plan(made, turn.optimizer)
    scheduler = scheduled(
        turn.optimizer,
        build_schedule(
            schedule, turn.optimizer, warmup_steps=warmup_steps, total_steps=total,
            tell=events.warn if made.lr_scale != 1 else lambda text: events.tell(Noted(text)),
        ),
    )  # fmt: skip
    return Accumulator(
        turn.model, turn.optimizer, made, objective=turn.objective, scheduler=scheduler,
        precision=turn.asked_precision, clip_norm=clip_norm, batch_norm=made.batch_norm,
        device=turn.device.torch_device, ranks=turn.ranks, **settings,
    )  # fmt: skip

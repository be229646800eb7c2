"""From a plan to an optimizer at the plan's rates, its schedule, and an Accumulator that trains by it."""

from typing import Any

from autoaccum.data.trial_samples import looked_at
from autoaccum.model.rates import apply_plan, scheduled
from autoaccum.planning.plan import Plan, plan
from autoaccum.settings import Settings
from autoaccum.training.events import Events
from autoaccum.training.schedule import build_schedule
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.assembly import Assembly
from autoaccum.window.determinism import settle_loss

__all__ = ["for_phase", "ready_to_train"]


def for_phase(turn: Assembly, first: Plan, lr_rule: str) -> Plan:
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
    turn: Assembly, made: Plan, total: int | None, asked: Settings, events: Events, **settings: Any
) -> Accumulator:
    """The accumulator of one phase, or of the whole training, its optimizer at the plan's rates and on its schedule.

    Args:
        turn, made: what is trained, and its plan.
        total: optimizer steps of the training, where they are known.
        asked: schedule, warm-up and clipping, where there are no phases, which have their own.
        events: told what the schedule warns of.
        settings: others of the Accumulator.
    """
    own: Any = asked if turn.phase is None else turn.phase
    if turn.phase is not None and total is not None:
        total = -(-total // turn.phase.every)
    apply_plan(made, turn.optimizer)
    schedule = build_schedule(
        own.schedule, turn.optimizer, warmup_steps=own.warmup_steps, total_steps=total,
        tell=events.warn if made.lr_scale != 1 else events.note,
    )  # fmt: skip
    accumulator = Accumulator(
        turn.model, turn.optimizer, made, objective=turn.objective, scheduler=scheduled(turn.optimizer, schedule),
        precision=turn.asked_precision, clip_norm=own.clip_norm, batch_norm=made.batch_norm,
        device=turn.device.torch_device, ranks=turn.ranks, **settings,
    )  # fmt: skip
    accumulator.step_inside(turn.in_backward)
    if accumulator.sharded is not None:
        accumulator.sharded.keep_sample([turn.source.trial(made.minimum)], made.minimum)
        few = min(8, *made.limits)  # now, on the same samples everywhere: in a window each rank has its own
        settle_loss(turn.objective, looked_at(turn.source, few), few, turn.device.torch_device)
    return accumulator

"""Each optimizer's turn: the Accumulator that a plan makes of it, and its windows over the same samples.

A training with one optimizer has one turn, and else one for each phase.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from autoaccum.checks import typed
from autoaccum.data.trial_samples import looked_at
from autoaccum.data.windows import Window
from autoaccum.errors import CheckpointError
from autoaccum.model.optimizer import optimizer_name
from autoaccum.model.rates import apply_plan, scheduled
from autoaccum.planning.plan import Plan, plan
from autoaccum.random_state import RandomState
from autoaccum.settings import Settings
from autoaccum.training.events import Events
from autoaccum.training.recover import SafeWindow
from autoaccum.training.schedule import build_schedule
from autoaccum.training.state import accumulator_state, load_accumulator, loading
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.assembly import Assembly
from autoaccum.window.determinism import settle_loss
from autoaccum.window.record import StepRecord

__all__ = ["Turns", "for_phase", "ready_to_train"]


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


def ready_to_train(turn: Assembly, made: Plan, total: int | None, asked: Settings, events: Events) -> Accumulator:
    """The accumulator of one phase, or of the whole training, its optimizer at the plan's rates and on its schedule.

    Args:
        turn, made: what is trained, and its plan.
        total: optimizer steps of the training, where they are known.
        asked: the settings; phases have a schedule, warm-up and clipping of their own.
        events: told what the schedule warns of.
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
        device=turn.device.torch_device, ranks=turn.ranks,
        **asked.some("accumulate", "log_grad_norm", "on_nonfinite"),
    )  # fmt: skip
    accumulator.step_inside(turn.in_backward)
    if accumulator.sharded is not None:
        accumulator.sharded.keep_sample([turn.source.trial(made.minimum)], made.minimum)
        few = min(8, *made.limits)  # now, on the same samples everywhere: in a window each rank has its own
        settle_loss(turn.objective, looked_at(turn.source, few), few, turn.device.torch_device)
    return accumulator


class Turns:
    """All optimizers' parts of each window, in order; all phases' `windows` over the same samples count as one."""

    def __init__(self, turns: Sequence[SafeWindow]) -> None:
        """Begins before the first window."""
        self.all, self.windows, self._at = list(turns), 0, 0

    @property
    def step(self) -> int:
        """Optimizer steps of the phase that took most."""
        return max(turn.accumulator.step for turn in self.all)

    @property
    def inside(self) -> bool:
        """Whether a window is being trained, or some phases of one still are to be."""
        return self._at > 0 or any(turn.inside for turn in self.all)

    @property
    def broken(self) -> str | None:
        """What left weights half updated; None where nothing did."""
        return next((turn.broken for turn in self.all if turn.broken is not None), None)

    def train(self, window: Window, random: RandomState | None = None) -> Iterator[StepRecord]:
        """Trains what is left to train of a window's samples, a record for each phase; raises as SafeWindow.train.

        `random`: the generators as they are, where that is known.

        Iterating again after an error or a break goes on with the phase that was not trained yet. `inside` is false
        from the last record on.
        """
        due = [turn for turn in self.all if turn.phase is None or self.windows % turn.phase.every == 0]
        for turn in due[self._at :]:
            with nullcontext() if turn.phase is None else turn.phase.alone(turn.accumulator.model):
                record, random = turn.train(window, random), None
            self._resize(turn.accumulator.plan)
            self._at += 1
            if self._at == len(due):
                self._at, self.windows = 0, self.windows + 1
            yield record if turn.phase is None else replace(record, phase=turn.phase.name)

    def _resize(self, like: Plan) -> None:
        """Cuts all phases' windows as the one that has just run, which may have run out of memory."""
        for turn in self.all:
            own = turn.accumulator.plan
            if own.limits != like.limits or own.minimum != like.minimum or own.by_length != like.by_length:
                sized = replace(own, limits=like.limits, minimum=like.minimum, by_length=like.by_length)
                reason = like.reasons.get("limit", "as another phase's")
                turn.accumulator.plan = sized.with_limit(max(like.limits), reason)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "windows": self.windows,
            "replays": self.all[0].replays.state_dict(),
            "each": [{"name": _name(turn), **accumulator_state(turn.accumulator)} for turn in self.all],
        }

    def checked(self, state: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """The windows so far and each turn's part of a state, which is of these phases; nothing is changed.

        Raises:
            CheckpointError: it is of other phases.
        """
        with loading("phases"):
            windows, each = typed(state["windows"], int), [typed(saved, dict) for saved in typed(state["each"], tuple)]
            names, own = [saved["name"] for saved in each], [_name(turn) for turn in self.all]
        if names != own:
            raise CheckpointError(
                f"the checkpoint has the phases {names}, and this training {own}: give the same phases as then, "
                "another folder, or resume=False to start anew"
            )
        return windows, each

    def load_state_dict(self, state: Mapping[str, Any], plan: Plan | None) -> None:
        """Goes on from there, by the `plan` that it had, if that still holds; raises as `checked`."""
        windows, each = self.checked(state)
        self._at, self.windows = 0, windows
        for turn, saved in zip(self.all, each):
            load_accumulator(turn.accumulator, saved)
            turn.broken = None
        first = self.all[0]
        if plan is not None:  # before the replays, which tell by it whether theirs is of as many ranks
            first.accumulator.plan = plan
        with loading("replays"):
            first.replays.load_state_dict(state["replays"], first.accumulator.plan)
        self._resize(first.accumulator.plan)


def _name(turn: SafeWindow) -> str:
    """What tells it from other phases, in a checkpoint."""
    phase = turn.phase
    return "" if phase is None else f"{phase.name}, every {phase.every}, {optimizer_name(turn.accumulator.optimizer)}"

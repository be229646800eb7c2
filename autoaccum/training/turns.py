"""The windows of one batch of samples: one where a training has one optimizer, one for each phase that is due else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from autoaccum.checks import typed
from autoaccum.data.windows import Window
from autoaccum.errors import CheckpointError
from autoaccum.model.optimizer import optimizer_name
from autoaccum.planning.plan import Plan
from autoaccum.random_state import RandomState
from autoaccum.training.recover import SafeWindow
from autoaccum.training.state import accumulator_state, load_accumulator, loading
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.phase import Phase
from autoaccum.window.record import StepRecord

__all__ = ["Turn", "Turns"]


@dataclass(frozen=True, eq=False)
class Turn:
    """One optimizer's part of each window: its phase, if there are some, and what runs and guards its windows."""

    phase: Phase | None
    accumulator: Accumulator
    safe: SafeWindow

    def alone(self) -> AbstractContextManager[None]:
        """All but this phase's parameters are frozen inside."""
        return nullcontext() if self.phase is None else self.phase.alone(self.accumulator.model)

    @property
    def name(self) -> str:
        """What tells it from other phases, in a checkpoint."""
        phase = self.phase
        return (
            "" if phase is None else f"{phase.name}, every {phase.every}, {optimizer_name(self.accumulator.optimizer)}"
        )


class Turns:
    """All optimizers' parts of each window, in order; all phases' `windows` over the same samples count as one."""

    def __init__(self, turns: Sequence[Turn]) -> None:
        """Begins before the first window."""
        self.all, self.windows, self._at = list(turns), 0, 0

    @property
    def step(self) -> int:
        """Optimizer steps of the phase that took most."""
        return max(turn.accumulator.step for turn in self.all)

    @property
    def inside(self) -> bool:
        """Whether a window is being trained, or some phases of one still are to be."""
        return self._at > 0 or any(turn.safe.inside for turn in self.all)

    @property
    def broken(self) -> str | None:
        """What left weights half updated; None where nothing did."""
        return next((turn.safe.broken for turn in self.all if turn.safe.broken is not None), None)

    @property
    def overdue(self) -> bool:
        """Whether the first rank wanted a checkpoint when the window ran, which all of them know."""
        return any(turn.safe.overdue for turn in self.all)

    def train(self, window: Window, random: RandomState | None = None) -> Iterator[StepRecord]:
        """Trains what is left to train of a window's samples, a record for each phase; raises as SafeWindow.train.

        `random`: the generators as they are, where that is known.

        Iterating again after an error or a break goes on with the phase that was not trained yet. `inside` is false
        from the last record on.
        """
        self._skip()
        while True:
            turn = self.all[self._at]
            with turn.alone():
                record, random = turn.safe.train(window, random), None
            self._resize(turn.accumulator.plan)
            self._at += 1
            self._skip()
            if self._at == len(self.all):
                self._at, self.windows = 0, self.windows + 1
            yield record if turn.phase is None else replace(record, phase=turn.phase.name)
            if not self._at:
                return

    def _skip(self) -> None:
        """To the next phase that is due."""
        for turn in self.all[self._at :]:
            if turn.phase is None or self.windows % turn.phase.every == 0:
                return
            self._at += 1

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
            "replays": self.all[0].safe.replays.state_dict(),
            "each": [{"name": turn.name, **accumulator_state(turn.accumulator)} for turn in self.all],
        }

    def checked(self, state: Mapping[str, Any]) -> tuple[int, list[dict[str, Any]]]:
        """The windows so far and each turn's part of a state, which is of these phases; nothing is changed.

        Raises:
            CheckpointError: it is of other phases.
        """
        with loading("phases"):
            windows, each = typed(state["windows"], int), [typed(saved, dict) for saved in typed(state["each"], tuple)]
            names, own = [saved["name"] for saved in each], [turn.name for turn in self.all]
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
            turn.safe.broken = None
        first = self.all[0]
        if plan is not None:  # before the replays, which tell by it whether theirs is of as many ranks
            first.accumulator.plan = plan
        with loading("replays"):
            first.safe.replays.load_state_dict(state["replays"], first.accumulator.plan)
        self._resize(first.accumulator.plan)

"""What every trainer is given: its own step probed, a plan, and windows that leave the whole batch's gradient behind.

The trainer's loader delivers the samples of a window, not collated, and its own accumulation is 1. So its counters,
schedules, logs and checkpoints count optimizer steps, and the micro-batch stands in none of them. The trainer's step is
asked for the loss of a piece; backward, weighting, the sum over ranks and the replay after out of memory are the
Accumulator's; clipping and the step are the trainer's again.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.checks import listed
from autoaccum.data.base import Source
from autoaccum.data.sample_lengths import cut
from autoaccum.data.structure import Piece
from autoaccum.data.windows import Window
from autoaccum.errors import CheckpointError, PlanError, SetupError
from autoaccum.integrations.trainers import wanted
from autoaccum.planning.plan import Plan
from autoaccum.planning.split import even_split
from autoaccum.ranks import here
from autoaccum.session import Session, display
from autoaccum.settings import deciding
from autoaccum.training.events import Events, TrainingStarted
from autoaccum.training.recover import SafeWindow
from autoaccum.training.smaller import plan_for
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.noise_scale import advice
from autoaccum.window.record import StepRecord

__all__ = ["Attachment", "Trained"]

SCHEMA = 1


@dataclass(frozen=True)
class Trained:
    """What a trainer has prepared by the time that its training begins.

    Attributes:
        model: without wrappers that communicate.
        optimizer: torch's own, without the trainer's wrapper.
        step: f(model, batch) -> the loss of one collated batch, with its graph.
        source: the trainer's samples; what it collates are Pieces.
        device: where the model is.
        drops: the trainer leaves out a short last batch.
        scaler: what scales the loss under fp16; None where nothing does.
        runs_in: one line on the precision, for the plan.
        code: what decides the step's memory beside the model: the trainer's class and settings.
        preserved: a context in which the trainer forgets what its step noted meanwhile.
        noted: what its step noted so far, which `restore()` goes back to when a pass runs again; None: it forgets by
            itself.
    """

    model: nn.Module
    optimizer: Optimizer
    step: Callable[[nn.Module, Any], torch.Tensor]
    source: Source
    device: torch.device
    drops: bool
    scaler: Any
    runs_in: str
    code: str
    preserved: Callable[[], Any]
    noted: Callable[[], Any] | None = None


class Attachment:
    """One trainer's windows.

    Attributes:
        asked: the keywords of `attach`.
        target_batch: samples of one optimizer step, over all ranks.
        shares: the plan by which windows are dealt to the ranks, the same for the whole training.
        kept: what a checkpoint of the trainer's had of ours, to go on from; None: probe anew.
        pieces: of the last window.
    """

    def __init__(self, keywords: Mapping[str, Any]) -> None:
        """Checks the keywords; nothing runs.

        Raises:
            SetupError, PlanError: an unknown keyword or value, no target, or one that leaves a rank without samples.
        """
        self.asked = wanted(keywords)
        self.target_batch: int = self.asked.target_batch
        if self.target_batch < here().size:
            raise SetupError(
                f"target_batch={self.target_batch} is less than the {here().size} ranks, of which each needs a sample "
                "in every step: raise it, or use fewer processes"
            )
        self.shares: Plan | None = None
        self.kept: Mapping[str, Any] | None = None
        self.pieces: list[Piece] = []
        listeners = listed("callbacks", self.asked.callbacks)
        self.events = Events([*listeners, *display(self.asked.progress, here(), bar=False)])
        self._stack = ExitStack()
        self._windows = 0

    def begin(self, trained: Trained, schedulers: Sequence[Any], *, total_steps: int | None, step: int) -> None:
        """Probes, plans, checks, and makes ready for `window`; by what a checkpoint kept, where there is one.

        Of `schedulers` the rates are scaled once, where `lr_batch` says what they were tuned at.

        Raises:
            NothingFitsError, PlanError, LossError, SetupError, DataError: as `fit`.
        """
        asked = self.asked
        settings = self._settings(trained, self._kept_plan())
        session = Session(trained.model, trained.source, settings, what="attach", events=self.events)
        parts = session.parts
        parts.precision.reason = trained.runs_in
        self._source = trained.source
        with trained.preserved():
            made = session.plan()
            session.check()
        budget = parts.device.budget(asked.memory)
        self._accumulator = Accumulator(
            parts.model, parts.optimizer, made, objective=parts.objective, precision="fp32",
            accumulate=asked.accumulate, batch_norm=made.batch_norm, on_nonfinite=asked.on_nonfinite,
            device=trained.device, ranks=parts.ranks, steps=False,
        )  # fmt: skip
        if trained.scaler is not None:
            self._accumulator.precision.scaler = trained.scaler
        self._safe = SafeWindow(
            self._accumulator, [parts.model], parts.device, self.events, asked.regrow_after, noted=trained.noted
        )
        if self.kept is not None:
            self._safe.replays.load_state_dict(self.kept["replays"], made)
        self.shares = made
        self._by_length = trained.source.by_length(made)
        self._stack.callback(self._accumulator.close)
        self._stack.enter_context(parts.running())
        self._stack.enter_context(parts.device.limit(budget))
        self.events.tell(TrainingStarted(made.to_dict(), total_steps, step, budget.bytes))
        parts.ranks.tally("the beginning of training")  # whoever failed on the way here is heard by all
        if made.lr_scale != 1 and step == 0:
            _scale_rates(made.lr_scale, trained.optimizer, schedulers)

    def _settings(self, trained: Trained, kept: Plan | None) -> dict[str, Any]:
        """A session's, by what `attach` was asked for, what the trainer has, and a checkpoint's plan."""
        asked, count = self.asked, self.asked.reduction
        passed = ("target_batch", "memory", "micro_batch", "lr_batch", "lr_rule", "accumulate", "batch_norm", "prefer",
                  "multiple_of", "max_batch", "cache", "ladder", "on_nonfinite")  # fmt: skip
        plan = asked.plan if kept is None else kept
        fixed = () if kept is None else tuple(deciding("plan"))  # by the plan that goes on, which need not be said
        return {
            **asked.some(*(name for name in passed if name not in fixed)),
            # A declared count counts in the trainer's batch.
            "reduction": (lambda piece: count(piece.batch)) if callable(count) else count,
            "step": _Step(trained), "optimizer": trained.optimizer, "device": trained.device, "precision": "fp32",
            "plan": plan, "check": asked.check if kept is None else False,
            "tail": "drop" if trained.drops and plan is None else "step",
        }  # fmt: skip

    def _kept_plan(self) -> Plan | None:
        """What a checkpoint of the trainer's had, where it is for these ranks."""
        if self.kept is None:
            return None
        made, ranks = plan_for(0, self.kept["plan"]), here()
        if made.target_batch != self.target_batch:
            raise CheckpointError(
                f"the checkpoint was trained with target_batch={made.target_batch}, and attach() says "
                f"{self.target_batch}: give the same, or start a training of its own"
            )
        if made.world_size != ranks.size:
            self.kept = None
            self.events.note(f"the checkpoint is of {made.world_size} ranks, and there are {ranks.size}: probing anew")
            return None
        return made

    def window(self, samples: Sequence[Any], epoch: int = 0) -> StepRecord:
        """One window of this rank's samples: its whole gradient stands in `.grad` afterwards, and no step was taken.

        Raises:
            NothingFitsError: memory ran out at the smallest micro-batch.
            LossError: the loss is not finite.
        """
        self.pieces = pieces = self._cut(samples) if samples else []
        window = Window(pieces, tuple(len(p.samples) for p in pieces), len(samples), len(samples), epoch, self._windows)
        record = self._safe.train(window)
        self._windows += 1
        return record

    def _cut(self, samples: Sequence[Any]) -> list[Piece]:
        plan, by_length, number = self._accumulator.plan, None, len(samples)
        collate: Callable[[list[Any]], Any] = self._source._collated  # names what cannot be collated
        if self._by_length is not None and plan.length_rule is not None:
            by_length = self._by_length._replace(rule=plan.length_rule)
        # A tail of 7 in micro-batches of exactly 2 cannot be: one of them takes 3.
        least = -(-number // max(number // plan.minimum, 1))
        limit = max(plan.limits[plan.rank], least)
        sizes = even_split(number, limit, minimum=plan.minimum, multiple_of=plan.multiple_of)
        places, _ = cut(samples, sizes, by_length, collate)
        return [collate([samples[place] for place in piece]) for piece in places]

    def state_dict(self) -> dict[str, Any]:
        """What to keep beside a checkpoint of the trainer's: plain values, for JSON."""
        return {
            "schema": SCHEMA,
            "plan": self._accumulator.plan.to_dict(),
            "replays": self._safe.replays.state_dict(),
        }

    def load_state_dict(self, state: Any, where: str) -> None:
        """Goes on from what `state_dict` gave.

        Raises:
            CheckpointError: it is none.
        """
        try:
            if state["schema"] != SCHEMA:
                raise PlanError(f"schema {state['schema']!r} instead of {SCHEMA}")
            Plan.from_dict(state["plan"])
            replays = {name: state["replays"][name] for name in ("before", "undisturbed")}
        except (PlanError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{where} is not what attach() keeps beside a checkpoint ({error}): delete it to probe anew"
            ) from error
        self.kept = {**state, "replays": replays}

    def end(self) -> None:
        """Takes everything of ours off the model; says what the noise scale was."""
        if self.shares is not None:
            scale = self._accumulator.noise_scale.value
            if scale is not None:
                self.events.note(advice(scale, self._accumulator.plan, self._accumulator.optimizer))
            self._accumulator.discard()
        self._stack.close()
        self.events.close()
        self.shares = None


def _scale_rates(factor: float, optimizer: Optimizer, schedulers: Sequence[Any]) -> None:
    for group in optimizer.param_groups:
        for name in group.keys() & {"lr", "initial_lr"}:
            group[name] *= factor
    for scheduler in schedulers:
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the first log reads


class _Step:
    """The trainer's step on a piece; what its code and settings are is in an attribute, for the cache's key."""

    def __init__(self, trained: Trained) -> None:
        self.code, self._step, self._autoaccum_noted = trained.code, trained.step, trained.noted

    def __call__(self, model: nn.Module, piece: Piece) -> torch.Tensor:
        return self._step(model, piece.batch)

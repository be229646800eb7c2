"""Model, data and settings, put together: what each public function does is a few of a session's steps.

A session is assembled once. Then `probe` finds what fits, `plan` decides how windows are cut, `check` compares the
gradients, and `loop` makes the training; each does one thing, once, and calls what it needs before it.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import DataLoader

from autoaccum.checking.padding import padding_error
from autoaccum.checking.verify import VerifyReport, verify_gradient
from autoaccum.checks import check_counts, check_switches, listed, one_of
from autoaccum.data.trial_samples import looked_at
from autoaccum.errors import AutoaccumError, LossError, PlanError, SetupError, shown
from autoaccum.model.given_model import unwrapped
from autoaccum.model.memory_savers import RUNGS
from autoaccum.planning.given_plan import (
    beside_own_rate,
    differs,
    for_ranks,
    given_plan,
    on_other_ranks,
    share_of,
    target_of,
    total_steps,
)
from autoaccum.planning.plan import Plan
from autoaccum.probing.answered import stored
from autoaccum.probing.isolate import InChild, Isolation, Send, isolation
from autoaccum.probing.outcome import Trial
from autoaccum.probing.planned import planned
from autoaccum.probing.probe import Question
from autoaccum.probing.prober import Prober
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import Ranks, here, join, ranks_given, sharing
from autoaccum.settings import SETTINGS, Settings, deciding, taken_by
from autoaccum.training.evaluate import Evaluator, check_metrics
from autoaccum.training.events import Event, Events, Listener, Noted, TrialRan
from autoaccum.training.loop import TrainingLoop
from autoaccum.training.run_folder import open_run
from autoaccum.training.schedule import check_schedule
from autoaccum.training.state import kept_answers
from autoaccum.training.turns import for_phase, ready_to_train
from autoaccum.units import check_memory
from autoaccum.window.agreement import agree_on_copies
from autoaccum.window.assembly import Assembly, assemble

__all__ = ["Session", "check_settings", "display"]

READ_AWAY = (
    "the data can be read only once, and the samples that this probe read are gone with it: give it an iterable of its "
    "own; fit and prepare train on what their probe reads"
)
_PLANNING = ("lr_batch", "lr_rule", "batch_norm", "tail", "multiple_of")
_CHECKED = 8  # samples of a gradient check


class Session:
    """One training, from what was given to a loop that may begin.

    Attributes:
        settings: of `prepare`; those not given at their defaults.
        parts: the model, the data, the loss and the optimizer, on the device.
        events: tells listeners what is going on.
        report: the probe's; None before it, and where none was needed.
    """

    def __init__(
        self, model: Any, data: Any, settings: Mapping[str, Any], *, what: str = "prepare",
        events: Events | None = None,
    ) -> None:  # fmt: skip
        """Checks everything, then puts it together; nothing runs yet.

        Args:
            model, data: as in `prepare`.
            settings: any keywords of `prepare`.
            what: "prepare" where a training follows, else what is asked: "probe", "verify" or "attach".
            events: where somebody listens already; None: to `sinks`, `callbacks` and the display.

        Raises:
            AutoaccumError: what cannot be trained with, as in `prepare`.
        """
        asked = self.settings = Settings(settings)
        self._what, self._trains = what, what == "prepare"
        self._given = None if asked.plan is None else given_plan(asked.plan, asked.target_batch)
        if self._trains or self._given is not None:
            asked["target_batch"] = target_of(self._given, asked.target_batch)
        listeners = [*listed("sinks", asked.sinks), *listed("callbacks", asked.callbacks)]
        check_settings(asked)
        given = self._given
        # The plan's rate is scaled already; an optimizer that is there has its own.
        if given is not None and given.lr is not None and asked.lr is None:
            asked["lr"] = None if isinstance(asked.optimizer, Optimizer) else given.lr / given.lr_scale
        # Before anything touches them: a child gets copies of the model and the data as they were given.
        self._isolation = isolation(asked.isolate, _probe_in_child, unwrapped(model), data, asked)
        self._in_child = isinstance(self._isolation, Isolation)
        join()
        ranks = here(group=ranks_given(asked.group, asked.device_mesh))
        self._share_samples(model, data)
        if given is not None:
            self._given = for_ranks(given, ranks.rank, ranks.size)
        self.events = events or Events([*listeners, *display(asked.progress, ranks)])
        self.parts = assemble(model, data, asked, ranks, what=what, stays=self._in_child, note=self.events.note)
        self.report: ProbeReport | None = None
        self._found_by: str | None = None
        self._plan: Plan | None = None
        self._verdict: VerifyReport | None = None
        self._folder, self._kept = open_run(asked.checkpoint, asked.checkpoint_every, asked.resume, ranks, self.events)
        if self._kept is not None:
            given, self.report, self._verdict = kept_answers(self._kept, asked.target_batch, ranks)
            if self._given is not None and differs(self._given, given):
                self.events.note("plan= is set aside: the training goes on with the plan of its checkpoint")
            self._given = given

    def _share_samples(self, model: Any, data: Any) -> None:
        """Where a mesh has dimensions along which ranks have the same samples, sees that each can train a copy alone.

        Raises:
            SetupError: they begin differently, or would come to draw different samples, or write to one folder.
        """
        asked, others = self.settings, sharing(self.settings.device_mesh)
        if others and self._trains:
            against = [
                (asked.seed is None, "seed= is not given, from which each draws the order of samples"),
                (isinstance(data, DataLoader), "data is a DataLoader, which may draw apart on each: give a dataset"),
                (asked.checkpoint is not None, "checkpoint= is given, and all of them would write to it: give the "
                 "mesh's dimension of data alone as device_mesh=, and each copy a folder of its own"),
            ]  # fmt: skip
            for stands, why in against:
                if stands:
                    raise SetupError(f"along some dimension of device_mesh= ranks have the same samples, and {why}")
        agree_on_copies(others, model, {"target_batch": asked.target_batch, "seed": asked.seed})

    def probe(self, target: int | None = None, *, runs: bool = True) -> ProbeReport:
        """What fits, found on real steps that leave no trace; `target` in the place of the settings' target batch.

        With `runs` False the answer for a sharded model is forecast only.

        Raises:
            NothingFitsError: not even the smallest micro-batch fits.
        """
        if self.report is not None:
            return self.report
        asked, parts = self.settings, self.parts
        target = target if target is not None else asked.target_batch
        share = None if target is None else share_of(target, parts.source.length, parts.ranks.size)
        prober = Prober(
            parts, asked.some("accumulate", "clip_norm", "batch_norm", "on_nonfinite"), asked.ladder, asked.cache,
            self._isolation,
            ran=lambda trial: self.events.tell(TrialRan(trial.to_dict())),
            note=self.events.note,
        )  # fmt: skip
        question = Question(share, runs=runs, **asked.some("memory", "max_batch", "multiple_of", "prefer"))
        report = prober.report(question, target)
        if self._what == "probe" and self._reads_away and not self._in_child:
            report = replace(report, notes=(*report.notes, READ_AWAY))
        self.report = report
        return report

    def found(self, report: ProbeReport, by: str) -> None:
        """Goes on from the report of another session with the same memory; `by` says whose."""
        self.report, self._found_by = report, by

    def plan(self) -> Plan:
        """How each window is cut: as given, as a checkpoint has it, or by what fits.

        Raises:
            PlanError: a target that cannot be cut, with the nearest that can.
            NothingFitsError: as `probe`.
        """
        if self._plan is None:
            given = self._given
            if given is None or given.world_size != self.parts.ranks.size:
                found = self._planned()
                self._plan = found if given is None else on_other_ranks(given, found)
            else:
                self._plan = self._as_given(given)
        return self._plan

    def _planned(self) -> Plan:
        asked, parts = self.settings, self.parts
        report = None if asked.micro_batch is not None else self.probe()
        for name, value in asked.some("prefer", "isolate", "ladder").items() if report is None else ():
            if value != SETTINGS[name].default and (name != "ladder" or value == "auto"):
                skips = f"micro_batch={asked.micro_batch} skips the probe, which it is for"
                self.events.note(f"{name}={shown(value)} is set aside: {skips}")
        self._settle()
        settles = self._what != "probe" or not self._in_child or (parts.device.type == "cpu" and not self._reads_away)
        made = planned(parts, report, asked.micro_batch, asked.target_batch, asked.some(*_PLANNING), settles=settles)
        if report is None or self._found_by is None:
            return made
        why = f"{made.micro_batch}: at most {report.micro_batch} samples fit at once, by {self._found_by}"
        return replace(made, reasons={**made.reasons, "micro_batch": why})

    def _as_given(self, given: Plan) -> Plan:
        asked, parts = self.settings, self.parts
        self._settle()
        if given.ladder is not None and given.ladder != parts.ladder:
            one_of("the plan's ladder", given.ladder, tuple(RUNGS))
            why = parts.obstacle(given.ladder)
            if why is None or given.ladder == parts.asked_precision:
                parts.take(given.ladder)
            else:
                self.events.note(f"the plan is for a model under {given.ladder}, which is left out here: {why}")
        if self._kept is None and self._trains:
            given = beside_own_rate(given, parts.optimizer)
        for name in deciding("plan"):
            value = asked[name]
            if value != SETTINGS[name].default and value != getattr(given, name, None):
                has = f"{name}={getattr(given, name)!r}" if hasattr(given, name) else "its sizes"
                self.events.note(
                    f"{name}={shown(value)} is set aside: the plan has {has}, and make another plan to change it"
                )
        return given

    def check(self) -> VerifyReport | None:
        """Whether the accumulated gradient is the large batch's, at most at the plan's size, where there is one.

        The ranks agree on the verdict: the report of the first phase that failed, else of the first. Where nothing
        could be seen and the loss is a function whose mean is not known, a Python warning says so. Where the whole
        batch runs at once nothing is accumulated, and a failure is only told.

        Raises:
            LossError: it failed, and `check` is not "warn".
        """
        if self._verdict is None and self._kept is None and self.settings.check is not False:
            reports = [self._checked(turn) for turn in self.parts.turns]
            self._verdict = next((report for report in reports if not report.ok), reports[0])
            self._tell_of_padding()
        return self._verdict

    def _checked(self, parts: Assembly) -> VerifyReport:
        made = self._plan
        accumulates = made is not None and (made.accumulation_steps > 1 or made.world_size > 1)
        most = _CHECKED if made is None else max(made.limits)
        size = min(_CHECKED, most, parts.source.length or most)
        # What holds the model still sees each operator: compiles nothing.
        with parts.running(compiled=False, alone=True):
            report = verify_gradient(
                parts.objective, looked_at(parts.source, size), device=parts.device.torch_device,
                precision=parts.precision.name, most=size,
            )  # fmt: skip
        failed = made is not None and parts.ranks.any("the gradient check", not report.ok and accumulates)
        if failed and self.settings.check != "warn":
            other = "the accumulated gradient is not the large batch's on another rank"
            raise LossError(f'{other if report.ok else report.text}; check="warn" trains all the same')
        if parts.objective.reading.unseen is not None and report.ok and accumulates:
            self.events.warn(
                f"{report.text}\nif the loss is a mean over anything but samples, such as tokens, declare it: "
                'reduction="token_mean", or reduction=f(batch)'
            )
        elif not report.ok or not report.verifiable:
            self.events.note(report.text)
        return report

    def _tell_of_padding(self) -> None:
        """Where windows are cut by length: says whether the loss of a sample depends on what it is padded beside."""
        parts = self.parts
        batches = parts.source.short_and_long() if self._plan is not None and self._plan.by_length else None
        if batches is None:
            return
        with parts.running(alone=True):
            error = padding_error(parts.objective, *batches, parts.device.torch_device, parts.precision)
        if error is not None:
            self.events.warn(
                f"padding changes a sample's loss, by {error:.1%} in the one looked at, and windows that are cut by "
                "length pad less: leave padding out by an attention mask and labels of -100 or a mask in the loss, or "
                "give micro_batch= to keep micro-batches of one size"
            )

    def loop(self) -> TrainingLoop:
        """The training, planned and checked, not yet begun; from a checkpoint, at that moment."""
        asked, parts, made = self.settings, self.parts, self.plan()
        verdict = self.check()
        if parts.compiled is not None:
            parts.compiled.single = made.micro_batch <= 1
        total = total_steps(made, parts.source.length, asked.epochs, asked.max_steps)
        accumulators = [
            ready_to_train(
                turn, made if turn is parts else for_phase(turn, made, asked.lr_rule), total, asked, self.events
            )
            for turn in parts.turns
        ]
        evaluator = Evaluator(
            parts.objective, parts.device, accumulators[0].precision, parts.ranks, max(made.micro_batch, 1),
            parts.validation, asked.metrics or {}, accumulators[0].sharded,
        )  # fmt: skip
        loop = TrainingLoop(
            [(turn.phase, each) for turn, each in zip(parts.turns, accumulators)], parts.source, parts.device,
            evaluator, asked, total_steps=total, budget=parts.device.budget(asked.memory), events=self.events,
            probe=self.report, verify=verdict, folder=self._folder,
            running=replace(parts, phase=None).running,  # each turn freezes the others' parameters itself
        )  # fmt: skip
        if self._kept is not None:
            with parts.under(parts.ladder):  # an optimizer whose state is on the host has no room for it elsewhere
                loop.load_state_dict(self._kept)
        parts.ranks.tally("the end of prepare")  # whoever failed on the way here is heard by all
        return loop

    @property
    def _reads_away(self) -> bool:
        return self.parts.source.one_shot and self.settings.worst_case is None

    def _settle(self) -> None:
        """Once a child has probed, with the device's memory to itself, the model that is trained goes there."""
        if self._in_child and self._trains:
            self.parts.settle()


def check_settings(asked: Settings, of_plan: type[AutoaccumError] = PlanError) -> None:
    """Refuses values that are plainly wrong, before anything is touched; words of a plan's with an error `of_plan`."""
    check_counts(**asked.some("max_batch", "micro_batch", "epochs", "max_steps", "multiple_of", "checkpoint_every",
                              "regrow_after", "lr_batch"), target_batch=asked.target_batch)  # fmt: skip
    if asked.max_batch is not None and (asked.micro_batch or 0) > asked.max_batch:
        raise PlanError(
            f"micro_batch={asked.micro_batch} is above max_batch={asked.max_batch}, above which no micro-batch may be: "
            "leave one of them out"
        )
    one_of("check", asked.check, (True, False, "warn"))
    one_of("resume", asked.resume, ("auto", True, False))
    check_schedule(asked.schedule, asked.warmup_steps)
    for name in ("prefer", "on_nonfinite", "accumulate"):
        one_of(name, asked[name], SETTINGS[name].choices)
    for name in ("batch_norm", "lr_rule"):
        one_of(name, asked[name], SETTINGS[name].choices, of_plan)
    one_of("ladder", asked.ladder, (None, False, *SETTINGS["ladder"].choices))
    check_switches(**asked.some("cache", "compile", "log_grad_norm"))
    check_memory(asked.memory)
    check_metrics(asked.metrics, asked.step, val_data=None if asked.loss is None else asked.val_data)


def display(progress: bool | None, ranks: Ranks, *, bar: bool = True) -> list[Listener]:
    """Who shows a person what happens: on the first rank, where `progress` or a terminal asks for it."""
    one_of("progress", progress, (None, True, False))
    if ranks.rank != 0 or not (sys.stderr.isatty() if progress is None else progress):
        return []
    from autoaccum.display.narrator import Narrator

    return [Narrator(bar=bar)]


def _probe_in_child(
    send: Send, factory: Callable[[], Mapping[str, Any]], asked: Mapping[str, Any], killed: list[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the child does: builds everything anew and probes; each trial is sent as it ends."""
    os.environ["WORLD_SIZE"] = "1"  # of several ranks each has a child of its own, which answers for its device alone
    taken = {"model", "data", *taken_by("probe")} - {"group", "device_mesh"}
    arguments = {name: value for name, value in factory().items() if name in taken}
    arguments |= {
        **asked,
        "isolate": InChild(send, climbs=False),
        "progress": False,
        "callbacks": [lambda e: _heard(e, send)],
    }
    session = Session(arguments.pop("model"), arguments.pop("data"), arguments, what="a probe in a child")
    report = session.probe()
    return stored(replace(report, trials=(*(Trial(**trial) for trial in killed), *report.trials)))


def _heard(event: Event, send: Send) -> None:
    if isinstance(event, TrialRan):
        send("trial", event.trial)
    elif isinstance(event, Noted):
        send("note", event.text)

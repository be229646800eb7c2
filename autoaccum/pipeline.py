"""From the user's parts to a loop that may begin: the probe, the plan, the gradient check, one after another."""

import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from autoaccum.assembly import Parts
from autoaccum.batch_norm.pooled_statistics import expect_equal_counts, needs_two
from autoaccum.checking.padding import padding_error
from autoaccum.checking.verify import VerifyReport, verify_gradient
from autoaccum.checks import check_counts, one_of
from autoaccum.data import tree
from autoaccum.data.trial_samples import KEPT_BYTES, LOOKED_AT
from autoaccum.errors import (
    LossError,
    NothingFitsError,
    PlanError,
    ProbeError,
    SetupError,
    StateNotRestoredError,
    shown,
)
from autoaccum.interrupts import interruptible
from autoaccum.model.compiled import Compiled
from autoaccum.model.memory_savers import RUNGS, obstacle
from autoaccum.model.modes import TrainingMode
from autoaccum.model.torchscript import layer_class
from autoaccum.model.untouched import Untouched
from autoaccum.planning.learning_rate import number
from autoaccum.planning.length_rule import Room, narrowest
from autoaccum.planning.plan import Plan, plan
from autoaccum.planning.reasons import format_sizes
from autoaccum.probing.cache import Cache, Lines, training_key
from autoaccum.probing.climb import Tried, climb, told
from autoaccum.probing.fastest import Alternatives
from autoaccum.probing.isolate import InChild, answer_of_children
from autoaccum.probing.journal import Journal, cache_folder
from autoaccum.probing.outcome import OVER_BUDGET, Trial
from autoaccum.probing.probe import Question, run_probe
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import Ranks
from autoaccum.settings import SETTINGS, deciding
from autoaccum.training.events import Events, Noted, TrialRan
from autoaccum.training.state import gathered, optimizer_name
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.settling import settle_loss

__all__ = [
    "Isolation",
    "adopt",
    "beside_own_rate",
    "check_arithmetic",
    "checked",
    "compile_model",
    "for_ranks",
    "given_plan",
    "planned",
    "probed",
    "share_of",
    "target_of",
    "told_of_padding",
    "told_of_the_plans",
    "total_steps",
    "verified",
]

# A probe puts the process's generators back at its end, and PyTorch's profiler has one session a process.
_PROBING = threading.RLock()


@dataclass(frozen=True)
class Isolation:
    """A probe in a child process: the function that probes there, and the user's, which builds the model anew."""

    work: Callable[..., Any]
    factory: bool | Callable[[], Mapping[str, Any]]


def verified(parts: Parts, most: int = 8) -> VerifyReport:
    """The gradient check on a few of the user's own samples, at most `most` at once."""
    size = min(8, most) if parts.source.length is None else min(8, most, parts.source.length)
    with parts.running(compiled=False, alone=True):  # what holds the model still sees each operator: compiles nothing
        return verify_gradient(
            parts.model,
            parts.objective,
            _looked_at(parts, size),
            device=parts.device.torch_device,
            precision=parts.precision.name,
            most=size,
        )


def _looked_at(parts: Parts, size: int) -> Any:
    """What the check chooses its samples from: more of them where their labels may count unequally, and are small."""
    few = parts.source.trial(size)
    room = min(LOOKED_AT, KEPT_BYTES * size // max(1, tree.nbytes(few)), parts.source.length or LOOKED_AT)
    return parts.source.trial(room) if room > size else few


def checked(parts: Parts, check: bool | str, made: Plan, events: Events) -> VerifyReport | None:
    """Checks the gradient before training, at most at the plan's size; the ranks agree on the verdict.

    Where nothing could be seen and the loss is a function whose mean is not known, a Python warning says so. Where the
    whole batch runs at once nothing is accumulated, and what it said is only told.

    Raises:
        LossError: it failed, and `check` is not "warn".
    """
    if check is False:
        return None
    report = verified(parts, max(made.limits))
    accumulates = made.accumulation_steps > 1 or made.world_size > 1  # over micro-batches, or over ranks
    if parts.ranks.any("the gradient check", not report.ok and accumulates) and check != "warn":
        text = report.text if not report.ok else "the accumulated gradient is not the large batch's on another rank"
        raise LossError(f'{text}; check="warn" trains all the same')
    if parts.objective.unseen is not None and report.ok and accumulates:
        events.warn(
            f"{report.text}\nif the loss is a mean over anything but samples, such as tokens, declare it: "
            'reduction="token_mean", or reduction=f(batch)'
        )
    elif not report.ok or not report.verifiable:
        events.tell(Noted(report.text))
    return report


def told_of_padding(parts: Parts, made: Plan, check: bool | str, events: Events) -> None:
    """Where windows are cut by length: says whether the loss of a sample depends on what it is padded beside."""
    batches = parts.source.short_and_long() if made.by_length and check is not False else None
    if batches is None:
        return
    with parts.running(alone=True):
        error = padding_error(parts.objective, *batches, parts.device.torch_device, parts.precision)
    if error is not None:
        events.warn(
            f"padding changes a sample's loss, by {error:.1%} in the one looked at, and windows that are cut by length "
            "pad less: leave padding out by an attention mask and labels of -100 or a mask in the loss, or give "
            "micro_batch= to keep micro-batches of one size"
        )


def compile_model(parts: Parts, events: Events) -> None:
    """The model's forward is compiled from here on, wherever `parts` runs it."""
    if hasattr(parts.model, "_orig_mod") or getattr(parts.model, "_compiled_call_impl", None) is not None:
        events.tell(Noted("compile=True changes nothing, since the model is compiled already, as its owner chose"))
        return
    if isinstance(parts.model, torch.jit.ScriptModule):
        events.tell(Noted("compile=True changes nothing, since a TorchScript model cannot be compiled a second time"))
        return
    parts.compiled = Compiled(parts.model, lambda text: events.tell(Noted(text)))


def probed(
    parts: Parts,
    question: Question,
    events: Events,
    isolation: Isolation | InChild | None,
    cache: bool,
    *,
    ladder: str | bool | None = None,
    **settings: Any,
) -> ProbeReport:
    """The probe, here or in a child, by what was found before where that still holds; up the ladder if nothing fits.

    With ladder=None the error says which rungs would fit; with "auto" the cheapest that fits on all ranks is taken.

    Raises:
        NothingFitsError: not even the smallest micro-batch fits; which rungs would is said.
    """
    refusal, report = None, None
    if ladder is not False and parts.ladder is None and question.prefer == "fastest" and parts.ranks.size == 1:
        savers = Alternatives.of(parts.model, parts.device.torch_device, parts.asked_precision)
        question = replace(question, alternatives=savers)
    try:
        report = _probe(parts, question, events, isolation, cache, settings)
    except NothingFitsError as error:
        if parts.ladder is not None or ladder is False:
            raise
        refusal = str(error)
    # Outside the except block, where nothing holds what the failed step held.
    stuck = parts.ranks.any("the probe", refusal is not None) if ladder == "auto" else refusal is not None
    if report is not None and not stuck:
        parts.take(report.ladder)  # prefer="fastest" may have found one
        return report
    return _climbed(parts, question, events, isolation, cache, ladder == "auto", refusal, settings)


def _climbed(
    parts: Parts, question: Question, events: Events, isolation: Isolation | InChild | None, cache: bool, takes: bool,
    refusal: str | None, settings: Mapping[str, Any],
) -> ProbeReport:  # fmt: skip
    # BatchNorm may need two samples; which it does is not tried here, where memory is what lacks.
    smallest = replace(question, share=None, max_batch=2 if _has_batch_norm(parts) else 1, prefer="fewest")

    def attempt(rung: str) -> Tried:
        why = obstacle(rung, parts.model, parts.device.torch_device, parts.asked_precision)
        if why is not None:
            return Tried(rung, obstacle=why)
        events.tell(Noted(f"not even the smallest micro-batch fits: looking at it under {rung}"))
        trials: list[Trial] = []
        here = replace(parts)
        here.take(rung)
        try:
            _probe(here, smallest, events, isolation, cache, settings, trials.append)
        except NothingFitsError:
            return Tried(rung, max((trial.peak_bytes or 0 for trial in trials), default=0) or None)
        except StateNotRestoredError:
            raise
        except (ProbeError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            # The model's own code need not bear it, such as a cache that is filled a second time.
            return Tried(rung, obstacle=f"cannot be run, {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        return Tried(rung, max(trial.peak_bytes or 0 for trial in trials if trial.fits), fits=True)

    tried, taken = climb(RUNGS, attempt, lambda fits: takes and not parts.ranks.any("a rung of the ladder", not fits))
    if taken is None and refusal is None:
        raise NothingFitsError("not even the smallest micro-batch fits on another rank, under any rung of the ladder: "
                               "the error that it raised says what was tried")  # fmt: skip
    if taken is None:
        raise NothingFitsError(f"{refusal}. {told(tried)}")
    parts.take(taken)
    events.tell(Noted(f"the ladder's {taken} is taken, the cheapest that fits: {RUNGS[taken]}"))
    return _probe(parts, question, events, isolation, cache, settings)


def _probe(
    parts: Parts,
    question: Question,
    events: Events,
    isolation: Isolation | InChild | None,
    cache: bool,
    settings: Mapping[str, Any],
    also: Callable[[Trial], None] = lambda trial: None,
) -> ProbeReport:
    """One probe of the model as `parts` runs it."""
    device, precision = parts.device, parts.precision.name

    def listener(trial: Trial) -> None:
        also(trial)
        events.tell(TrialRan(trial.to_dict()))

    how = {"ladder": parts.ladder, "compile": parts.compiled is not None}
    beside = {"beside": [optimizer_name(optimizer) for optimizer in parts.beside]} if parts.beside else {}
    if isinstance(isolation, Isolation):
        asked = {
            "target_batch": question.share, "memory": question.memory, "max_batch": question.max_batch,
            "multiple_of": question.multiple_of, "prefer": question.prefer, "device": str(device.torch_device),
            "precision": parts.asked_precision, "cache": cache, **how, **settings,
            "ladder": parts.ladder or False,  # the child looks at this rung only: it may be killed on any
        }  # fmt: skip
        return interruptible(_probe_in_child, isolation, asked, listener, events)
    key = training_key(
        parts.model, parts.optimizer, parts.source.trial(2), parts.objective.loss or parts.objective.step,
        {"precision": precision, **how, **settings, **beside}, f"{device.torch_device} {device.name} {device.total()}",
    )  # fmt: skip
    # A child's teaches the next one, whatever becomes of the answer.
    journal = Journal(cache_folder() / f"{key}.journal" if cache or isolation else None, key)
    if isolation is not None:
        isolation.keeps(journal)
    alone = Ranks()  # a trial waits for nobody: each rank probes its own device
    first = plan(1, 1, optimizer=parts.optimizer, batch_norm=settings["batch_norm"])
    accumulator = Accumulator(
        parts.model, parts.optimizer, first, objective=parts.objective, precision=precision,
        device=device.torch_device, ranks=alone, **settings,
    )  # fmt: skip
    accumulator.beside = parts.beside
    with _PROBING, parts.running(alone=True), journal.probing(clears=isolation is None):
        report = run_probe(
            accumulator, parts.objective, parts.source, device, question,
            journal=journal, cache=Cache(key) if cache else None, listener=listener,
        )  # fmt: skip
    return replace(report, ladder=parts.ladder or report.ladder)


def _probe_in_child(
    isolation: Isolation, asked: Mapping[str, Any], listener: Callable[[Trial], None], events: Events
) -> ProbeReport:
    """A new child for each that is killed, until the journal has taught them enough."""
    if not callable(isolation.factory):
        raise SetupError(
            "isolate=True has nothing to build the model with in the child process: pass isolate=f, a function at a "
            "module's top level that returns fit's arguments as a dict, or use the command line with a TARGET"
        )

    def heard(kind: str, value: Any) -> None:
        if kind == "trial":
            listener(Trial(**value))
        else:
            events.tell(Noted(value))

    answer = answer_of_children(isolation.work, (isolation.factory, dict(asked)), heard, listener)
    lines = Lines.from_dict(answer["lines"]) if answer["lines"] else None
    return ProbeReport.from_dict(answer["report"], lines)


def check_arithmetic(parts: Parts, **settings: Any) -> None:
    """Refuses settings of the plan's, by the PlanError that it raises, before a probe is spent on them."""
    plan(1, 1, optimizer=parts.optimizer, **settings)


def planned(
    parts: Parts, report: ProbeReport | None, micro_batch: int | None, target_batch: int, *, lr_batch: int | None,
    lr_rule: str, batch_norm: str, tail: str, multiple_of: int, settles: bool = True,
) -> Plan:  # fmt: skip
    """The plan over all ranks, by the micro-batch that each has run, or was given; `settles` reads samples for that."""
    layers = [module for module in parts.model.modules() if isinstance(module, _BatchNorm)]
    if settles:
        few = min(8, report.micro_batch if report is not None else micro_batch or target_batch)
        with parts.running(compiled=False, alone=True), parts.precision.autocast():
            settle_loss(parts.model, parts.objective, _looked_at(parts, few), few, parts.device.torch_device)
    reasons = _reasons(parts, report)
    if lr_batch is None and parts.lr_given and parts.source.loader_batch is not None:
        lr_batch = parts.source.loader_batch
        reasons["lr_batch"] = f"{lr_batch}: the DataLoader's batch_size, since the rate given was tuned at it"
    if parts.source.drop_last:
        tail = "drop"
    size = report.micro_batch if report is not None else micro_batch or target_batch
    made = plan(
        parts.ranks.gather("the plan", size), target_batch, world_size=parts.ranks.size, rank=parts.ranks.rank,
        samples=parts.source.length, optimizer=parts.optimizer, lr_batch=lr_batch, lr_rule=lr_rule,
        batch_norm=batch_norm, batch_norm_layers=len(layers), bn_momentum=layers[0].momentum if layers else None,
        minimum=report.floor if report is not None else _floor(parts), multiple_of=multiple_of, tail=tail,
        reasons=reasons, by_length=_by_length(parts, report),
    )  # fmt: skip
    if parts.ranks.size > 1:
        expect_equal_counts(parts.model, made)
    return replace(_explained(made, report), ladder=parts.ladder if report is None else report.ladder)


def _by_length(parts: Parts, report: ProbeReport | None) -> Room:
    """What fits on every rank at each length, so that one table is in everybody's plan and checkpoint."""
    own = () if report is None else report.by_length
    tables = gathered({"by_length": [list(pair) for pair in own]}, parts.ranks, "the plan")
    return narrowest([tuple((length, size) for length, size in each["by_length"]) for each in tables])


def _has_batch_norm(parts: Parts) -> bool:
    return any(issubclass(layer_class(module), _BatchNorm) for module in parts.model.modules())


def _floor(parts: Parts) -> int:
    """The smallest micro-batch the model takes, where no probe has found it: 2 where a BatchNorm needs two samples."""
    if not _has_batch_norm(parts):
        return 1
    device = parts.device.torch_device
    with Untouched(parts.model, device=device), parts.running(compiled=False, alone=True):
        TrainingMode(parts.model).on()
        try:
            # With gradients on: a model may ask for some inside its forward, as force fields do.
            with parts.precision.autocast():
                parts.objective.forward(tree.move(parts.source.trial(1), device))
        except (ValueError, RuntimeError, torch.jit.Error) as error:  # a compiled model wraps the layer's ValueError
            if not needs_two(error):
                raise
            return 2
    return 1


def _reasons(parts: Parts, report: ProbeReport | None) -> dict[str, str]:
    reasons = {"denominator": parts.objective.reason, "precision": parts.precision.reason}
    rung = parts.ladder if report is None else report.ladder
    if rung is not None:
        reasons["ladder"] = f"{rung}: {RUNGS[rung]}"
    if rung == "bf16":
        reasons["precision"] = "bf16 autocast: a rung of the ladder"
    if report is None:
        return reasons
    reasons["budget"] = report.budget_reason
    if report.limit is not None:
        proof = {
            "forecast": f"{report.limit + 1} is forecast to overrun the budget",
            "out of memory": f"{report.limit + 1} ran out of memory",
            "cap": "nothing larger was looked for",
            None: "the largest that was run: larger ones did not fit where the forecast let them",
        }
        if all(trial.fits for trial in report.trials):
            proof[None] = "the largest that was run: the little more that may fit was not worth a step near the limit"
        if any(trial.batch == report.limit + 1 and trial.outcome == OVER_BUDGET for trial in report.trials):
            proof["forecast"] = f"a step at {report.limit + 1} went over the budget"
        which = "of the longest samples seen fit" if report.by_length else "samples fit"
        reasons["limit"] = f"{report.limit} {which} at once; {proof[report.limit_proof]}"
    return reasons


def _explained(made: Plan, report: ProbeReport | None) -> Plan:
    """The plan with the probe's own words on the micro-batch: what was run is below what would fit."""
    if report is None:
        return made
    count, sizes = made.accumulation_steps, format_sizes(made.micro_batches)
    most = f"{report.limit} samples fit at once" if report.limit is not None else f"{report.micro_batch} samples fit"
    why = "measured to be the fastest" if report.throughput else f"the fewest that fit, since at most {most}"
    several = f"{count} micro-batch{'es' if count > 1 else ''} of {sizes}"
    if made.by_length:
        return made  # its own words speak of lengths
    return replace(
        made,
        reasons={
            **made.reasons,
            "micro_batch": f"{made.micro_batch}: was run, and fits in the budget",
            "accumulation_steps": f"{several}: {why}",
        },
    )


def given_plan(given: Plan | str | os.PathLike[str], target_batch: int | None) -> Plan:
    """The plan that the user gave, or its file.

    Raises:
        PlanError: it is for another target batch, or cannot be read.
    """
    made = given if isinstance(given, Plan) else Plan.load(given)
    if target_batch is not None and target_batch != made.target_batch:
        raise PlanError(f"target_batch={target_batch}, but the plan given is for {made.target_batch}: give one of them")
    return made


def target_of(given: Plan | None, target_batch: int | None) -> int:
    """The target batch, which a plan knows.

    Raises:
        PlanError: neither says it, or it is not a whole number above 0.
    """
    if given is not None:
        return given.target_batch
    if target_batch is None:
        raise PlanError("target_batch is missing: give the samples of one optimizer step, such as target_batch=256")
    check_counts(target_batch=target_batch)
    return target_batch


def adopt(parts: Parts, made: Plan, events: Events) -> None:
    """Takes the rung of a plan that was given or saved; where it cannot be taken, as on another device, that is said.

    Raises:
        SetupError: there is no such rung.
    """
    if made.ladder is None or made.ladder == parts.ladder:
        return
    one_of("the plan's ladder", made.ladder, tuple(RUNGS))
    why = obstacle(made.ladder, parts.model, parts.device.torch_device, parts.asked_precision)
    if why is None or made.ladder == parts.asked_precision:
        parts.take(made.ladder)
    else:
        events.tell(Noted(f"the plan is for a model under {made.ladder}, which is left out here: {why}"))


def beside_own_rate(given: Plan, parts: Parts) -> Plan:
    """The plan with the rate that is trained with: its factor on the optimizer's own, which need not be the plan's."""
    rates = {float(group["lr"]) for group in parts.optimizer.param_groups if group.get("lr") is not None}
    if given.lr is None or len(rates) != 1:
        return given
    (own,) = rates
    lr = own * given.lr_scale
    if math.isclose(lr, given.lr, rel_tol=1e-9):
        return given
    factor = number(given.lr_scale)
    reason = f"{number(lr)} = {number(own)}, the rate given beside the plan, × {factor}, the plan's factor"
    return replace(given, lr=lr, reasons={**given.reasons, "lr": reason})


def told_of_the_plans(given: Plan, events: Events, **asked: Any) -> None:
    """Says which of the settings asked for are set aside, since the plan has them already.

    Args:
        asked: every setting that a plan fixes, as it was given.
    """
    for name in deciding("plan"):
        value = asked[name]
        if value != SETTINGS[name].default and value != getattr(given, name, None):
            has = f"the plan has {name}={getattr(given, name)!r}" if hasattr(given, name) else "the plan has its sizes"
            events.tell(Noted(f"{name}={shown(value)} is set aside: {has}, and make another plan to change it"))


def for_ranks(given: Plan, ranks: Ranks) -> Plan:
    """The plan as this rank has it.

    Raises:
        PlanError: it is for another number of ranks.
    """
    if given.world_size != ranks.size:
        raise PlanError(
            f"the plan given is for {given.world_size} ranks, and there are {ranks.size}: make one for these"
        )
    return given.on_rank(ranks.rank)


def share_of(target_batch: int, length: int | None, ranks: Ranks) -> int:
    """The most samples of a window that one of equal ranks takes: of the target, or of an epoch that has fewer."""
    return -(-min(target_batch, length or target_batch) // ranks.size)


def total_steps(made: Plan, length: int | None, epochs: int, max_steps: int | None) -> int | None:
    """Optimizer steps in the whole training; None for a stream without a length."""
    if max_steps is not None:
        return max_steps
    return None if length is None else sum(count for _, count in made.window_runs(length)) * epochs

"""From the user's parts to a loop that may begin: the probe, the plan, the gradient check, one after another."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autoaccum.assembly import Parts
from autoaccum.checks import check_counts
from autoaccum.data import tree
from autoaccum.errors import LossError, PlanError, ProbeError, SetupError
from autoaccum.planning.plan import Plan, plan
from autoaccum.planning.reasons import format_sizes
from autoaccum.probing.cache import Cache, Lines, training_key
from autoaccum.probing.isolate import Killed, run_in_child
from autoaccum.probing.journal import Journal, cache_folder
from autoaccum.probing.probe import Question, run_probe
from autoaccum.probing.report import KILLED, ProbeReport, Trial
from autoaccum.ranks import Ranks
from autoaccum.training.events import Events, Noted, TrialRan
from autoaccum.training.recover import WindowStart
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.batch_norm import needs_two
from autoaccum.window.verify import VerifyReport, verify_gradient

__all__ = [
    "Isolation",
    "apply_plan",
    "checked",
    "for_ranks",
    "given_plan",
    "planned",
    "probed",
    "share_of",
    "target_of",
    "total_steps",
    "verified",
]

MOST_CHILDREN = 12  # a probe that is killed more often will not find an answer


@dataclass(frozen=True)
class Isolation:
    """A probe in a child process: the function that probes there, and the user's, which builds the model anew."""

    work: Callable[..., Any]
    factory: bool | Callable[[], Mapping[str, Any]]


def verified(parts: Parts, most: int = 8) -> VerifyReport:
    """The gradient check on a few of the user's own samples, at most `most` at once."""
    size = min(8, most) if parts.source.length is None else min(8, most, parts.source.length)
    return verify_gradient(
        parts.model,
        parts.objective,
        parts.source.trial(size),
        device=parts.device.torch_device,
        precision=parts.precision.name,
    )


def checked(parts: Parts, check: bool | str, most: int, events: Events) -> VerifyReport | None:
    """The same before training, with no more samples at once than are known to fit; the ranks agree on the verdict.

    Raises:
        LossError: it failed, and `check` is not "warn".
    """
    if check is False:
        return None
    report = verified(parts, most)
    if parts.ranks.any(not report.ok) and check != "warn":
        text = report.text if not report.ok else "the accumulated gradient is not the large batch's on another rank"
        raise LossError(f'{text}; check="warn" trains all the same')
    if not report.ok or not report.verifiable:
        events.tell(Noted(report.text))
    return report


def probed(
    parts: Parts, question: Question, events: Events, isolation: Isolation | None, cache: bool, **settings: Any
) -> ProbeReport:
    """The probe, here or in a child, by what was found before where that still holds."""
    device, precision = parts.device, parts.precision.name

    def listener(trial: Trial) -> None:
        events.tell(TrialRan(trial.to_dict()))

    key = training_key(
        parts.model, parts.optimizer, parts.source.trial(2), parts.objective.loss or parts.objective.step,
        {"precision": precision, **settings}, f"{device.torch_device} {device.name} {device.total()}",
    )  # fmt: skip
    journal_path = cache_folder() / f"{key}.journal" if cache or isolation else None
    journal = Journal(journal_path, key)
    if isolation is not None:
        asked = {
            "target_batch": question.share, "memory": question.memory, "max_batch": question.max_batch,
            "multiple_of": question.multiple_of, "prefer": question.prefer, "device": str(device.torch_device),
            "precision": precision, "cache": cache, **settings,
        }  # fmt: skip
        return _probe_in_child(isolation, asked, journal, listener)
    alone = Ranks()  # a trial waits for nobody: each rank probes its own device
    first = plan(1, 1, optimizer=parts.optimizer, batch_norm=settings["batch_norm"])
    accumulator = Accumulator(
        parts.model, parts.optimizer, first, objective=parts.objective, precision=precision,
        device=device.torch_device, ranks=alone, **settings,
    )  # fmt: skip
    return run_probe(
        accumulator, parts.objective, parts.source, device, question,
        journal=journal, cache=Cache(key) if cache else None, listener=listener,
    )  # fmt: skip


def _probe_in_child(
    isolation: Isolation, asked: Mapping[str, Any], journal: Journal, listener: Callable[[Trial], None]
) -> ProbeReport:
    """A new child for each that is killed, until the journal has taught them enough."""
    if not callable(isolation.factory):
        raise SetupError(
            "isolate=True has nothing to build the model with in the child process: pass isolate=f, a function at a "
            "module's top level that returns fit's arguments as a dict, or use the command line with a TARGET"
        )

    def heard(_: str, trial: Mapping[str, Any]) -> None:
        listener(Trial(**trial))

    killed: list[Trial] = []
    for _ in range(MOST_CHILDREN):
        before = Counter(journal.unfinished())
        try:
            answer = run_in_child(isolation.work, (isolation.factory, dict(asked)), heard)
        except Killed as error:
            lost = [Trial(size, kind, None, None, 0.0, KILLED) for size, kind in Counter(journal.unfinished()) - before]
            if not lost:
                raise ProbeError(f"the probe's child process ended before any trial: {error}") from error
            killed += lost
            for trial in lost:
                listener(trial)
            continue
        journal.clear()
        lines = (
            Lines(**{**answer["lines"], "lines": tuple(map(tuple, answer["lines"]["lines"]))})
            if answer["lines"]
            else None
        )
        report = ProbeReport.from_dict(answer["report"], lines)
        return replace(report, trials=(*killed, *report.trials))
    raise ProbeError(f"{MOST_CHILDREN} child processes were killed one after another: give memory= a smaller budget")


def planned(
    parts: Parts, report: ProbeReport | None, micro_batch: int | None, target_batch: int, *, lr_batch: int | None,
    lr_rule: str, batch_norm: str, tail: str, multiple_of: int,
) -> Plan:  # fmt: skip
    """The plan over all ranks; each rank's limit is the micro-batch that it has run, or was given."""
    layers = [module for module in parts.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    reasons = _reasons(parts, report)
    if lr_batch is None and parts.lr_given and parts.source.loader_batch is not None:
        lr_batch = parts.source.loader_batch
        reasons["lr_batch"] = f"{lr_batch}: the DataLoader's batch_size, since the rate given was tuned at it"
    if parts.source.drop_last:
        tail = "drop"
    size = report.micro_batch if report is not None else micro_batch or target_batch
    made = plan(
        parts.ranks.gather(size), target_batch, world_size=parts.ranks.size, rank=parts.ranks.rank,
        samples=parts.source.length, optimizer=parts.optimizer, lr_batch=lr_batch, lr_rule=lr_rule,
        batch_norm=batch_norm, batch_norm_layers=len(layers), bn_momentum=layers[0].momentum if layers else None,
        minimum=report.floor if report is not None else _floor(parts, layers), multiple_of=multiple_of, tail=tail,
        reasons=reasons,
    )  # fmt: skip
    return _explained(made, report)


def _floor(parts: Parts, layers: Sequence[nn.Module]) -> int:
    """The smallest micro-batch the model takes, where no probe has found it: 2 where a BatchNorm needs two samples."""
    if not layers:
        return 1
    device = parts.device.torch_device
    start, training = WindowStart([parts.model], device), [part for part in parts.model.modules() if part.training]
    start.mark()
    parts.model.train()
    try:
        with torch.no_grad(), parts.precision.autocast():
            parts.objective.forward(tree.move(parts.source.trial(1), device))
    except ValueError as error:
        if not needs_two(error):
            raise
        return 2
    finally:
        start.restore()
        parts.model.eval()
        for part in training:
            part.training = True
    return 1


def _reasons(parts: Parts, report: ProbeReport | None) -> dict[str, str]:
    reasons = {"denominator": parts.objective.reason, "precision": parts.precision.reason}
    if report is None:
        return reasons
    reasons["budget"] = report.budget_reason
    if report.limit is not None:
        proof = {
            "forecast": f"{report.limit + 1} is forecast to overrun the budget",
            "out of memory": f"{report.limit + 1} ran out of memory",
            "cap": "nothing larger was looked for",
        }
        reasons["limit"] = f"{report.limit} samples fit at once; {proof[report.limit_proof or 'cap']}"
    return reasons


def _explained(made: Plan, report: ProbeReport | None) -> Plan:
    """The plan with the probe's own words on the micro-batch: what was run is below what would fit."""
    if report is None:
        return made
    count, sizes = made.accumulation_steps, format_sizes(made.micro_batches)
    most = f"{report.limit} samples fit at once" if report.limit is not None else f"{report.micro_batch} samples fit"
    why = "measured to be the fastest" if report.throughput else f"the fewest that fit, since at most {most}"
    several = f"{count} micro-batch{'es' if count > 1 else ''} of {sizes}"
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


def share_of(target_batch: int, ranks: Ranks) -> int:
    """The most samples of a window that one of equal ranks takes."""
    return -(-target_batch // ranks.size)


def apply_plan(made: Plan, optimizer: Optimizer) -> None:
    """Puts the plan's rates and settings into every parameter group alike."""
    for group in optimizer.param_groups:
        group.update(made.group_settings(group))


def total_steps(made: Plan, length: int | None, epochs: int, max_steps: int | None) -> int | None:
    """Optimizer steps in the whole training; None for a stream without a length."""
    if max_steps is not None:
        return max_steps
    return None if length is None else sum(1 for _ in made.window_sizes(length)) * epochs

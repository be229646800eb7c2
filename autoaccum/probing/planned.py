"""The plan for a target, by what a probe found or a micro-batch that was given, with the reasons for its values."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from autoaccum.batch_norm.pooled_statistics import expect_equal_counts
from autoaccum.data.trial_samples import looked_at
from autoaccum.errors import PlanError
from autoaccum.model.given_model import TrainingMode, has_batch_norm
from autoaccum.model.memory_savers import RUNGS
from autoaccum.model.snapshot import Snapshot
from autoaccum.planning.length_rule import Room, narrowest
from autoaccum.planning.plan import Plan, plan
from autoaccum.planning.reasons import format_sizes
from autoaccum.probing.probe import smallest_micro_batch
from autoaccum.probing.report import ProbeReport
from autoaccum.window.assembly import Assembly
from autoaccum.window.determinism import settle_loss

__all__ = ["planned"]


def planned(
    parts: Assembly, report: ProbeReport | None, micro_batch: int | None, target_batch: int,
    settings: Mapping[str, Any], *, settles: bool = True,
) -> Plan:  # fmt: skip
    """The plan over all ranks, by the micro-batch that each has run, or was given.

    Args:
        parts: what is trained.
        report: the probe's; None: `micro_batch` samples are used, or where that is None too the whole target.
        target_batch: samples of one step, over all ranks.
        settings: lr_batch, lr_rule, batch_norm, tail and multiple_of, as in `prepare`.
        settles: whether samples may be read to settle what the loss divides by.

    Raises:
        PlanError: a target that cannot be cut, with the nearest that can.
    """
    settings = dict(settings)
    size = report.micro_batch if report is not None else micro_batch or target_batch
    sizes = parts.ranks.gather("the plan", size)
    if settles:
        few = min(8, *sizes)  # alike on all ranks: those of a sharded model meet in each forward
        with parts.running(compiled=False, alone=True), parts.precision.autocast():
            batch = looked_at(parts.source, few)
            settle_loss(parts.objective, batch, few, parts.device.torch_device)
    reasons = _reasons(parts, report)
    if settings["lr_batch"] is None and parts.lr_given and parts.source.loader_batch is not None:
        settings["lr_batch"] = parts.source.loader_batch
        reasons["lr_batch"] = (
            f"{parts.source.loader_batch}: the DataLoader's batch_size, since the rate given was tuned at it"
        )
    if parts.source.drop_last:
        settings["tail"] = "drop"
    layers = [module for module in parts.model.modules() if isinstance(module, _BatchNorm)]
    made = plan(
        sizes, target_batch, world_size=parts.ranks.size, rank=parts.ranks.rank,
        samples=parts.source.length, optimizer=parts.optimizer, batch_norm_layers=len(layers),
        bn_momentum=layers[0].momentum if layers else None,
        minimum=report.floor if report is not None else _floor(parts), reasons=reasons,
        by_length=_by_length(parts, report), **settings,
    )  # fmt: skip
    rung = parts.ladder if report is None else report.ladder
    if rung == "step_in_backward" and made.accumulation_steps > 1:
        raise PlanError(
            f"ladder={rung!r} takes each step in the one backward pass of its window, and {target_batch} samples take "
            f"{made.accumulation_steps} micro-batches, since {size} fit at once: give target_batch={size} or less, or "
            "another saver"
        )
    if parts.ranks.size > 1:
        expect_equal_counts(parts.model, made)
    sync = made.gradient_sync if report is None or report.gradient_sync is None else report.gradient_sync.split(":")[0]
    return replace(made, ladder=rung, gradient_sync=sync, reasons={**made.reasons, **_explained(made, report)})


def _floor(parts: Assembly) -> int:
    """Where no probe has found it."""
    if not has_batch_norm(parts.model):
        return 1
    device = parts.device.torch_device
    with Snapshot(parts.model, device=device, parameters=False), parts.running(compiled=False, alone=True):
        TrainingMode(parts.model).on()
        return smallest_micro_batch(parts.objective, parts.source, device, parts.precision)


def _by_length(parts: Assembly, report: ProbeReport | None) -> Room:
    """What fits on every rank at each length, so that one table is in everybody's plan and checkpoint."""
    own = () if report is None else report.by_length
    tables = [json.loads(told) for told in parts.ranks.collect("the plan", json.dumps(own).encode())]
    return narrowest([tuple((length, size) for length, size in table) for table in tables])


def _reasons(parts: Assembly, report: ProbeReport | None) -> dict[str, str]:
    reasons = {"denominator": parts.objective.reason, "precision": parts.precision.reason}
    rung = parts.ladder if report is None else report.ladder
    if rung is not None:
        reasons["ladder"] = f"{rung}: {RUNGS[rung]}"
    if rung == "bf16":
        reasons["precision"] = "bf16 autocast: a rung of the ladder"
    if report is None:
        return reasons
    reasons["budget"] = report.budget_reason
    if report.gradient_sync is not None:
        reasons["gradient_sync"] = report.gradient_sync
    if report.limit is not None:
        which = "of the longest samples seen fit" if report.by_length else "samples fit"
        reasons["limit"] = f"{report.limit} {which} at once; {report.limit_reason}"
    return reasons


def _explained(made: Plan, report: ProbeReport | None) -> dict[str, str]:
    """The probe's own words on the micro-batch, since what was run is below what would fit."""
    if report is None or made.by_length:  # whose reasons speak of lengths already
        return {}
    count, sizes = made.accumulation_steps, format_sizes(made.micro_batches)
    most = f"{report.limit} samples fit at once" if report.limit is not None else f"{report.micro_batch} samples fit"
    why = "measured to be the fastest" if report.throughput else f"the fewest that fit, since at most {most}"
    return {
        "micro_batch": f"{made.micro_batch}: was run, and fits in the budget",
        "accumulation_steps": f"{count} micro-batch{'es' if count > 1 else ''} of {sizes}: {why}",
    }

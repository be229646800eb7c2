"""Ranks with unequal memory: each probes for an equal share, and then runs what sharing by the limits gives it."""

from collections.abc import Callable
from dataclasses import replace

from autoaccum.errors import PlanError
from autoaccum.planning.split import counts, even_split, shares
from autoaccum.probing.probe import Question
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import Ranks

__all__ = ["shared_out"]


def shared_out(
    probed: Callable[[Question], ProbeReport],
    question: Question,
    ranks: Ranks,
    target: int | None,
    length: int | None,
    together: bool = False,
) -> ProbeReport:
    """Probes; and once more on ranks that can take more than an equal share, where that makes fewer micro-batches.

    With limits of 140 and 46 samples and a window of 120, equal shares take two micro-batches of 30 on the second rank;
    90 and 30 take one on each. All ranks call this.

    Args:
        probed: probes for a question.
        question: of an equal share.
        ranks: this process among others.
        target: samples of a window over all ranks; None: each rank asks for itself.
        length: samples of an epoch, where they are known.
        together: the ranks meet in each trial, and have shared out already.
    """
    samples = None if target is None else min(target, length or target)
    report = probed(replace(question, window=samples))
    if ranks.size == 1 or samples is None or together:
        return report
    limits = ranks.gather("the limits", report.limit or report.micro_batch)
    ran = ranks.gather("the limits", report.micro_batch)
    if ranks.any("the limits", bool(report.by_length or report.throughput)):
        return report
    floor = report.floor
    try:
        fewer = max(counts(samples, limits, minimum=floor)) < max(counts(samples, ran, minimum=floor))
    except PlanError:  # the plan will say which windows can be shared
        return report
    share = shares(samples, limits, minimum=floor)[ranks.rank]
    size = max(even_split(share, limits[ranks.rank], minimum=floor), default=0)
    if not fewer or size <= report.micro_batch:
        return report
    found = probed(replace(question, share=size, max_batch=size))
    note = f"the ranks' limits are {', '.join(map(str, limits))}: this one takes {share} samples of a window"
    return replace(
        found, trials=(*report.trials, *found.trials), notes=(*found.notes, note), limit=report.limit,
        limit_proof=report.limit_proof,
    )  # fmt: skip

"""What fits how on several ranks: a replica of the model on each, or its shards, or its shards with checkpointing.

Each rank builds TARGET anew for each way, so that nothing of one stands in the memory of the next. All ways are
forecast; the first that fits on all ranks is run, and answers.
"""

import gc
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from autoaccum.probing.report import ProbeReport
    from autoaccum.ranks import Ranks

__all__ = ["SHARD", "what_fits"]

SHARD = {
    "none": ("replicated",),
    "full": ("sharded",),
    "auto": ("replicated", "sharded", "sharded with checkpointing"),
}
"""The ways that each word of --shard looks at, in this order."""


@dataclass
class _Look:
    """What one rank found out of a way.

    Attributes:
        way: its name.
        report: where it fits, or is forecast to.
        peak_bytes: of the smallest micro-batch here: forecast, or measured where even that does not fit.
        why_not: in words, what stands against it.
        code: what the program ends with for that.
        error: what was raised for another reason than that nothing fits so.
        blocks: those that were sharded.
    """

    way: str
    report: "ProbeReport | None" = None
    peak_bytes: int | None = None
    why_not: str | None = None
    code: int = 0
    error: Exception | None = None
    blocks: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """For the other ranks."""
        report = self.report
        return {"limit": None if report is None else report.limit or report.micro_batch, "why_not": self.why_not,
                "peak_bytes": self.peak_bytes, "floor": 1 if report is None else report.floor,
                "code": self.code, "failed": self.error is not None}  # fmt: skip


def what_fits(build: Callable[[], dict[str, Any]], shard: str) -> "tuple[ProbeReport, list[dict[str, Any]]]":
    """(the report of the first way that fits on all ranks, a row for each way); all ranks call this.

    Args:
        build: makes a probe's arguments, "model" and "data" among them, anew.
        shard: a key of SHARD.

    Raises:
        NothingFitsError: nothing fits in any way.
        SetupError: no way can be gone, and why.
        click.UsageError: there are more ranks than devices.
    """
    from autoaccum.errors import AutoaccumError, NothingFitsError, SetupError
    from autoaccum.ranks import here, join, told

    join()
    ranks = here()
    taken: ProbeReport | None = None
    rows: list[dict[str, Any]] = []
    worst = 0
    for way in SHARD[shard]:
        look = _looked(way, build, ranks, runs=taken is None)
        everyone = [json.loads(each) for each in ranks.collect("what fits how", json.dumps(look.facts()).encode())]
        if look.error is not None:
            raise look.error
        failed = [rank for rank, each in enumerate(everyone) if each["failed"]]
        if failed:
            raise told(AutoaccumError(f"rank {failed[0]} failed, so rank {ranks.rank} stops as well"))
        against = max(everyone, key=lambda each: each["code"])  # a rank that only heard of it has none
        worst = max(worst, against["code"])
        fits = all(each["why_not"] is None for each in everyone)
        # The limits of all ranks, and what the smallest micro-batch takes on each.
        rows.append({
            "way": way, "fits": fits, "taken": fits and taken is None,
            "limits": [each["limit"] for each in everyone] if fits else None, "smallest": everyone[0]["floor"],
            "peak_bytes": [each["peak_bytes"] for each in everyone], "blocks": look.blocks,
            "why_not": None if fits else against["why_not"],
        })  # fmt: skip
        if rows[-1]["taken"]:
            taken = _explained(look)
    if taken is not None:
        return taken, rows
    against = [row["why_not"] for row in rows]
    said = against[0] if len(set(against)) == 1 else "; ".join(f"{row['way']}: {row['why_not']}" for row in rows)
    raise (NothingFitsError if worst == NothingFitsError.exit_code else SetupError)(said)


def _looked(way: str, build: Callable[[], dict[str, Any]], ranks: "Ranks", *, runs: bool) -> _Look:
    """Probes one way; whatever is raised is kept, for all ranks to hear of it."""
    from autoaccum.errors import AutoaccumError, NothingFitsError, PlanError, SetupError
    from autoaccum.memory.oom import Verdict, out_of_memory
    from autoaccum.ranks import LostRankError, ends_all, was_told

    look, peaks = _Look(way), dict[int, int]()

    def heard(event: Any) -> None:
        if event.name == "trial" and event.trial["peak_bytes"]:
            peaks[event.trial["batch"]] = event.trial["peak_bytes"]

    try:
        with ends_all():
            _probed(look, build(), ranks, heard, runs=runs)
            ranks.tally(f"the end of {way}")
    except LostRankError:
        raise
    except (NothingFitsError, PlanError, SetupError) as error:
        look.why_not, look.code = str(error), error.exit_code
    except AutoaccumError as error:
        look.error = None if was_told(error) else error
        look.why_not = str(error)
    except Exception as error:
        if out_of_memory(error) is Verdict.SURELY:
            look.why_not, look.code = f"the model alone ran out of memory: {error}", NothingFitsError.exit_code
        else:
            look.error = error
    if look.why_not is not None:
        look.report = None
    look.peak_bytes = look.peak_bytes or peaks.get(min(peaks, default=0))
    gc.collect()  # the model of this way, before the next
    return look


def _probed(
    look: _Look, arguments: dict[str, Any], ranks: "Ranks", heard: Callable[[Any], None], *, runs: bool
) -> None:
    from autoaccum.memory.device import open_device
    from autoaccum.model.given_model import device_of, unwrapped
    from autoaccum.session import Session
    from autoaccum.training.events import Noted

    model, data = unwrapped(arguments.pop("model")), arguments.pop("data")
    device = arguments.get("device") or device_of(model, ranks)
    _expect_devices(device, ranks)
    sharded, _, saver = look.way.partition(" with ")
    ladder = arguments.get("ladder")
    arguments |= {"isolate": False, "ladder": saver or (False if ladder is None else ladder)}
    arguments["callbacks"] = [*(arguments.get("callbacks") or ()), heard]
    for listener in arguments["callbacks"]:
        listener(Noted(f"the model {look.way}"))
    _shard(look, model, arguments, open_device(device).torch_device, ranks, shards=sharded == "sharded")
    session = Session(model, data, arguments, what="probe")
    look.report = report = session.probe(runs=runs)
    if report.forecaster is not None:  # else sizes were searched for by running them: the smallest that ran will do
        look.peak_bytes = int(report.forecast(report.floor))
    if arguments.get("target_batch") is not None and runs:
        look.report = replace(report, plan=session.plan())


def _shard(look: _Look, model: Any, arguments: Mapping[str, Any], device: Any, ranks: "Ranks", *, shards: bool) -> None:
    """Shards the model where the way says so and TARGET has not."""
    from torch.optim import Optimizer

    from autoaccum.errors import SetupError
    from autoaccum.model.shards import is_sharded, shard

    if is_sharded(model):
        if not shards:
            raise SetupError("TARGET returns a sharded model already")
    elif shards:
        if isinstance(arguments.get("optimizer"), Optimizer):
            raise SetupError(
                "TARGET's optimizer holds the parameters of the model as it was before it is sharded: return a class "
                'or a factory f(params, lr=lr), or a name such as "adamw"'
            )
        look.blocks = shard(model, device, ranks.size)


def _expect_devices(device: Any, ranks: "Ranks") -> None:
    """One for each rank of this machine."""
    import torch

    if (device is not None and torch.device(device).type == "cpu") or not torch.cuda.is_available():
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    if here > torch.cuda.device_count():
        raise click.UsageError(
            f"{here} ranks on a machine with {torch.cuda.device_count()} GPUs: give --nproc at most that, or --device "
            "cpu to look at it in host memory"
        )


def _explained(look: _Look) -> "ProbeReport":
    """The report, with how the model was sharded."""
    report = look.report
    assert report is not None
    if not look.blocks:
        return report
    names = look.blocks[0] if len(look.blocks) == 1 else f"{look.blocks[0]} to {look.blocks[-1]}"
    note = (
        f"fully_shard was called on each of {len(look.blocks)} repeated blocks ({names}), and then on the whole model; "
        "do so in your training before fit, prepare or an optimizer gets the model"
    )
    return replace(report, notes=(*report.notes, note))

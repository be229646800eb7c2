"""What fits how on several ranks: a replica of the model on each, or its shards, or its shards with checkpointing.

Each rank builds TARGET anew for each way, so that nothing of one stands in the memory of the next. All ways are
forecast; the first that fits on all ranks is run, and answers.
"""

import gc
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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


def what_fits(build: Callable[[], dict[str, Any]], shard: str) -> "tuple[ProbeReport, list[dict[str, Any]]]":
    """(the report of the first way that fits on all ranks, a row for each way); all ranks call this.

    Args:
        build: makes fit's arguments anew, of which a probe takes its own.
        shard: a key of SHARD.

    Raises:
        NothingFitsError: nothing fits in any way.
        SetupError: no way can be gone, and why; or there are more ranks than devices.
    """
    from autoaccum.errors import AutoaccumError, NothingFitsError, SetupError
    from autoaccum.ranks import here, join, told

    join()
    ranks = here()
    taken: ProbeReport | None = None
    rows: list[dict[str, Any]] = []
    for way in SHARD[shard]:
        report, error, facts = _looked(way, build, ranks, runs=taken is None)
        everyone = [json.loads(each) for each in ranks.collect("what fits how", json.dumps(facts).encode())]
        if error is not None:
            raise error
        failed = [rank for rank, each in enumerate(everyone) if each["failed"]]
        if failed:
            raise told(AutoaccumError(f"rank {failed[0]} failed, so rank {ranks.rank} stops as well"))
        against = max(everyone, key=lambda each: each["code"])  # a rank that only heard of it has none
        fits = all(each["why_not"] is None for each in everyone)
        # The limits of all ranks, and what the smallest micro-batch takes on each.
        rows.append({
            "way": way, "fits": fits, "taken": fits and taken is None,
            "limits": [each["limit"] for each in everyone] if fits else None, "smallest": everyone[0]["floor"],
            "peak_bytes": [each["peak_bytes"] for each in everyone], "blocks": facts["blocks"],
            "why_not": None if fits else against["why_not"], "code": against["code"],
        })  # fmt: skip
        taken = report if rows[-1]["taken"] else taken
    codes, why_not = [row.pop("code") for row in rows], [row["why_not"] for row in rows]
    if taken is not None:
        return taken, rows
    said = why_not[0] if len(set(why_not)) == 1 else "; ".join(f"{row['way']}: {row['why_not']}" for row in rows)
    raise (NothingFitsError if max(codes) == NothingFitsError.exit_code else SetupError)(said)


def _looked(
    way: str, build: Callable[[], dict[str, Any]], ranks: "Ranks", *, runs: bool
) -> "tuple[ProbeReport | None, Exception | None, dict[str, Any]]":
    """What this rank finds out of a way: (where it fits so, or is forecast to, the report; what was raised for another
    reason than that nothing fits; what the other ranks hear of it).
    """
    from autoaccum.errors import AutoaccumError, NothingFitsError, PlanError, SetupError
    from autoaccum.memory.oom import Verdict, out_of_memory
    from autoaccum.ranks import LostRankError, ends_all, was_told

    peaks: dict[int, int] = {}  # by size, as measured: what the smallest takes where nothing fits
    facts: dict[str, Any] = {"peak_bytes": None, "blocks": [], "limit": None, "floor": 1}
    report: ProbeReport | None = None
    failed: Exception | None = None
    why_not, code = None, 0

    def heard(event: Any) -> None:
        if event.name == "trial" and event.trial["peak_bytes"]:
            peaks[event.trial["batch"]] = event.trial["peak_bytes"]

    try:
        with ends_all():
            report = _probed(way, facts, build(), ranks, heard, runs=runs)
            ranks.tally(f"the end of {way}")
    except LostRankError:
        raise
    except (NothingFitsError, PlanError, SetupError) as error:
        why_not, code = str(error), error.exit_code
    except AutoaccumError as error:
        failed, why_not = (None if was_told(error) else error), str(error)
    except Exception as error:
        if out_of_memory(error) is Verdict.SURELY:
            why_not, code = f"the model alone ran out of memory: {error}", NothingFitsError.exit_code
        else:
            failed = error
    if report is not None and why_not is None:
        facts |= {"limit": report.limit or report.micro_batch, "floor": report.floor}
    facts["peak_bytes"] = facts["peak_bytes"] or peaks.get(min(peaks, default=0))
    gc.collect()  # the model of this way, before the next
    return report, failed, {**facts, "why_not": why_not, "code": code, "failed": failed is not None}


def _probed(
    way: str, facts: dict[str, Any], arguments: dict[str, Any], ranks: "Ranks", heard: Callable[[Any], None], *,
    runs: bool,
) -> "ProbeReport":  # fmt: skip
    """The probe of one way; `facts` get the blocks that were sharded and what the smallest micro-batch takes."""
    from autoaccum.model.given_model import device_of, unwrapped
    from autoaccum.session import Session
    from autoaccum.settings import taken_by
    from autoaccum.training.events import Noted

    model, data = unwrapped(arguments["model"]), arguments["data"]
    arguments = {name: arguments[name] for name in taken_by("probe") if name in arguments}
    device = arguments.get("device") or device_of(model, ranks)
    _expect_devices(device, ranks)
    sharded, _, saver = way.partition(" with ")
    ladder = arguments.get("ladder")
    listeners = [*(arguments.get("callbacks") or ()), heard]
    arguments |= {
        "isolate": False, "ladder": saver or (False if ladder is None else ladder), "callbacks": listeners
    }  # fmt: skip
    for listener in listeners:
        listener(Noted(f"the model {way}"))
    blocks = facts["blocks"] = _sharded(model, arguments, device, ranks, shards=sharded == "sharded")
    session = Session(model, data, arguments, what="probe")
    report = session.probe(runs=runs)
    if report.forecaster is not None:  # else sizes were searched for by running them: the smallest that ran will do
        facts["peak_bytes"] = int(report.forecast(report.floor))
    if arguments.get("target_batch") is not None and runs:
        report = replace(report, plan=session.plan())
    if not blocks:
        return report
    names = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
    note = (
        f"fully_shard was called on each of {len(blocks)} repeated blocks ({names}), and then on the whole model; "
        "do so in your training before fit, prepare or an optimizer gets the model"
    )
    return replace(report, notes=(*report.notes, note))


def _sharded(model: Any, arguments: Mapping[str, Any], device: Any, ranks: "Ranks", *, shards: bool) -> list[str]:
    """Shards the model where the way says so and TARGET has not; the blocks that were sharded."""
    from torch.optim import Optimizer

    from autoaccum.errors import SetupError
    from autoaccum.memory.device import open_device
    from autoaccum.model.shards import is_sharded, shard

    if is_sharded(model):
        if not shards:
            raise SetupError("TARGET returns a sharded model already")
        return []
    if not shards:
        return []
    if isinstance(arguments.get("optimizer"), Optimizer):
        raise SetupError(
            "TARGET's optimizer holds the parameters of the model as it was before it is sharded: return a class "
            'or a factory f(params, lr=lr), or a name such as "adamw"'
        )
    return shard(model, open_device(device).torch_device, ranks.size)


def _expect_devices(device: Any, ranks: "Ranks") -> None:
    """One for each rank of this machine."""
    import torch

    from autoaccum.errors import SetupError

    if (device is not None and torch.device(device).type == "cpu") or not torch.cuda.is_available():
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    if here > torch.cuda.device_count():
        raise SetupError(
            f"{here} ranks on a machine with {torch.cuda.device_count()} GPUs: give --nproc at most that, or --device "
            "cpu to look at it in host memory"
        )

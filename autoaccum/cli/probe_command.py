"""`autoaccum probe`: answered in this process, in a child process that a kill may take, or on several ranks.

A child does all of the command's work, from the user's code to the picture, and gives back what is to be printed: so
that the user's model is built once, and nothing of it lies in the parent's memory or on its device while the child
probes. The parent starts another child for each that is killed, and prints.
"""

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from autoaccum.cli.command import FAILED, INTERRUPTED, Answer, ChildFailed, Command, exit_code, one_line, saved
from autoaccum.cli.options import COUNT, new_file, takes_all, target_argument
from autoaccum.cli.target import arguments_of, call, need_target_batch
from autoaccum.cli.ways import SHARD

if TYPE_CHECKING:
    from autoaccum.probing.isolate import Send
    from autoaccum.probing.report import ProbeReport

__all__ = ["probe"]

_OWN = ("target", "isolate", "progress", "save_plan", "plot", "cards", "nproc", "shard")
"""Options of the command; the others are keywords of `probe`."""

Asked = Mapping[str, Any]
Found = tuple[dict[str, Any], bool]
"""What is to be printed, and whether all files could be written."""


@click.command(cls=Command, short_help="Find the micro-batch that fits, and the plan for a target batch.")
@target_argument
@takes_all("probe", but=("isolate",))
# On for this command alone. A child of `fit` would not see what the training's own process holds already or will hold
# beside it (its data, a context, libraries), and would take that for somebody else's.
@click.option(
    "--isolate/--no-isolate",
    default=None,
    help="Work in a child process, which a kill may take; on if not given. A debugger needs --no-isolate.",
)
@click.option("--nproc", type=COUNT, metavar="N", help="Answer for N ranks on this machine, which are started for it.")
@click.option(
    "--shard", type=click.Choice(list(SHARD)),
    help="On several ranks: the model whole on each, sharded (fully_shard), or the first that fits; auto with --nproc.",
)  # fmt: skip
@new_file("save-plan", "Save the plan, for fit --plan FILE.")
@new_file("plot", "Draw the forecast and the trials: .png, .svg or .pdf.", picture=True)
@click.option(
    "--for", "cards", multiple=True, metavar="CARD", help="Say what would fit on a card, such as 'RTX 4090' or 24GiB."
)
def probe(**asked: Any) -> Answer:
    """Find the largest micro-batch that fits, by running the real training step on small batches.

    Without a target batch it looks for the largest that fits at all; with one, for the fewest even micro-batches.

    On several ranks (--nproc, or under torchrun with --shard) it tells what fits how, and runs the first that does.
    """
    nproc, shard, isolate = (asked.get(name) for name in ("nproc", "shard", "isolate"))
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    _expect_ranks(nproc, shard, isolate, under_torchrun=several)
    if asked["cards"]:
        from autoaccum.probing.elsewhere import known_card

        asked["cards"] = tuple(map(known_card, asked["cards"]))  # an unknown one is refused before the probe, not after
    found: Found | None
    if nproc is not None:
        from autoaccum.cli.launching import on_ranks

        found = _first(on_ranks(nproc, _on_rank, asked))
    elif shard is not None:
        found = _sharded(asked)
    elif isolate is False or several:
        # Of several ranks each has to exchange what it found with the others, and a new child could not join them.
        found = _found(asked, _arguments(asked, **({} if isolate is None else {"isolate": isolate})))
    else:
        from autoaccum.probing.isolate import answer_of_children

        found = _first([answer_of_children(_in_child, (asked,), lambda name, value: None)])
    values, done = found or _found(asked, _arguments(asked, isolate=False))
    return Answer(values, "probe_view", 0 if done else FAILED)


def _expect_ranks(nproc: int | None, shard: str | None, isolate: bool | None, *, under_torchrun: bool) -> None:
    """Usage errors for options that say different things of how many processes there are."""
    if nproc is not None and under_torchrun:
        raise click.UsageError(f"--nproc {nproc}: torchrun has started the ranks already; leave it out")
    if shard is not None and nproc is None and not under_torchrun:
        raise click.UsageError(f"--shard {shard} is about several ranks: give --nproc N, or start this by torchrun")
    if isolate is not None and (nproc is not None or shard is not None):
        raise click.UsageError("the ranks are processes of their own: leave --isolate and --no-isolate out")


def _arguments(asked: Asked, **more: Any) -> dict[str, Any]:
    """`probe`'s, as TARGET and the options say, with who tells of each trial: not by `progress`, since those that
    killed a child are told as well.
    """
    import autoaccum

    options = {name: value for name, value in asked.items() if name not in _OWN}
    arguments = arguments_of(autoaccum.probe, asked["target"], {**options, **more})
    if "save_plan" in asked:
        need_target_batch(asked["target"], arguments, "--save-plan")
    if asked.get("progress", arguments["progress"]):
        from autoaccum.display.narrator import Narrator

        arguments["callbacks"] = (*(arguments.get("callbacks") or ()), Narrator())
    return {**arguments, "progress": False}


def _found(asked: Asked, arguments: Mapping[str, Any], killed: Sequence[Mapping[str, Any]] = ()) -> Found:
    """The answer of a probe in this process; `killed` are the trials that earlier ones did not survive."""
    import autoaccum
    from autoaccum.probing.outcome import Trial
    from autoaccum.training.events import TrialRan

    lost = [Trial(**trial) for trial in killed]
    for listener in (arguments.get("callbacks") or ()) if lost else ():
        listener(TrialRan(lost[-1].to_dict()))  # the others were told before
    report = call(autoaccum.probe, arguments)
    return _written(asked, replace(report, trials=(*lost, *report.trials)) if lost else report)


def _sharded(asked: Asked) -> Found:
    """The answer on one of several ranks."""
    from autoaccum.cli.ways import what_fits

    report, rows = what_fits(lambda: _arguments(asked), asked.get("shard", "auto"))
    return _written(asked, report, ways=rows)


def _written(asked: Asked, report: "ProbeReport", **more: Any) -> Found:
    """What is to be printed, `more` with it, after the files were written."""
    plan = report.plan
    done = saved(asked.get("plot"), "the plot", report.plot)
    if plan is not None:
        done &= saved(asked.get("save_plan"), "the plan", plan.save)
    values = {**({} if plan is None else plan.to_dict()), **report.to_dict(), **more}
    if asked["cards"]:
        from autoaccum.probing.elsewhere import elsewhere

        values["elsewhere"] = [elsewhere(report, card) for card in asked["cards"]]
    return values, done


# --- other processes ---


def _in_child(send: "Send", asked: Asked, killed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The child's part; it finds nothing where TARGET wants no child."""
    from autoaccum.probing.isolate import InChild

    def work() -> Found | None:
        arguments = _arguments(asked)
        if "isolate" not in asked and arguments.get("isolate") is False:
            return None
        return _found(asked, {**arguments, "isolate": InChild(send)}, killed)

    return _told(work)


def _on_rank(asked: Asked) -> dict[str, Any]:
    """One rank's part."""
    from autoaccum.ranks import leave

    answer = _told(lambda: _sharded(asked))
    leave()
    return answer


def _told(work: Callable[[], Found | None]) -> dict[str, Any]:
    """What `work` finds or fails with, as plain values: an error's text names a line of the user's code, which is known
    in the process that ran it.
    """
    try:
        return {"found": work()}
    except BaseException as error:
        from autoaccum.ranks.places import was_told

        code = INTERRUPTED if isinstance(error, KeyboardInterrupt) else exit_code(error)
        return {"line": one_line(error), "code": code, "trace": "".join(traceback.format_exception(error)),
                "savers": list(getattr(error, "savers", ())), "told": was_told(error)}  # fmt: skip


def _first(answers: Sequence[Mapping[str, Any]]) -> Found | None:
    """What the first process found, or what one of them failed with by itself."""
    failed = [answer for answer in answers if "code" in answer]
    if any(answer["code"] == INTERRUPTED for answer in failed):
        raise KeyboardInterrupt
    if failed:
        raise ChildFailed(min(failed, key=lambda answer: bool(answer["told"])))
    return answers[0]["found"]  # type: ignore[no-any-return]  # as `_told` has it

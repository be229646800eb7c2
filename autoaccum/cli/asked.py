"""What `autoaccum probe` was asked, and the answer: found here, or in a child process that a kill may take.

The child does all of the command's work, from the user's code to the picture, and gives back what is to be printed: so
that the user's model is built once, and nothing of it lies in the parent's memory or on its device while the child
probes. The parent starts another child for each that is killed, and prints.
"""

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoaccum.cli.calling import arguments_of, call, keywords_of, need_target_batch
from autoaccum.cli.command import first_rank, saved
from autoaccum.cli.endings import ChildFailed, exit_code, one_line

if TYPE_CHECKING:
    from autoaccum.probing.isolate import Send
    from autoaccum.probing.report import ProbeReport

__all__ = ["Asked"]


@dataclass(frozen=True)
class Asked:
    """A probe as the command line asks for it; None where it does not say.

    Attributes:
        target, options: TARGET, and `probe`'s keywords.
        isolate, progress: whether in a child, and whether each trial is told.
        plot, save_plan: files that are written at the end.
        cards: what would fit on them is told.
        nproc, shard: ranks to start on this machine, and how the model may lie on them, a key of SHARD.
    """

    target: str
    options: Mapping[str, Any]
    isolate: bool | None = None
    progress: bool | None = None
    plot: Path | None = None
    save_plan: Path | None = None
    cards: tuple[str, ...] = ()
    nproc: int | None = None
    shard: str | None = None

    def answer(self) -> tuple[dict[str, Any], bool]:
        """(what is to be printed, whether all files were written); in a child unless someone says otherwise.

        A ChildFailed: what the child failed with, in the words that it would have had here.
        """
        if self.nproc is not None:
            from autoaccum.cli.launching import on_ranks

            answers = on_ranks(self.nproc, _on_rank, self)
        elif self.shard is not None:
            return self.found_sharded()
        elif self.isolate is False or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # Of several ranks each has to exchange what it found with the others, and a new child could not join them.
            return self.found(self.arguments(isolate=self.isolate))
        else:
            from autoaccum.probing.isolate import answer_of_children

            answers = [answer_of_children(_in_child, (self,), lambda name, value: None)]
        found = _first(answers)
        return self.found(self.arguments(isolate=False)) if found is None else found

    def arguments(self, **more: Any) -> dict[str, Any]:
        """`probe`'s, as TARGET and the options say."""
        import autoaccum

        return arguments_of(autoaccum.probe, self.target, {**self.options, **more})

    def found(self, arguments: dict[str, Any], killed: Sequence[Mapping[str, Any]] = ()) -> tuple[dict[str, Any], bool]:
        """The answer of a probe in this process; `killed` are the trials that earlier ones did not survive."""
        import autoaccum

        arguments = self._listening(arguments)
        lost = _told(killed, arguments.get("callbacks") or ())
        report = call(autoaccum.probe, arguments)
        return self._written(replace(report, trials=(*lost, *report.trials)) if lost else report, {})

    def found_sharded(self) -> tuple[dict[str, Any], bool]:
        """The answer on one of several ranks."""
        import autoaccum
        from autoaccum.cli.ways import what_fits

        known = keywords_of(autoaccum.probe) or []

        def build() -> dict[str, Any]:
            return {name: value for name, value in self._listening(self.arguments()).items() if name in known}

        report, rows = what_fits(build, self.shard or "auto")
        return self._written(report, {"ways": rows})

    def _listening(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, with who tells of each trial; not by `progress`, since a killed child's are told as well."""
        if self.save_plan is not None:
            need_target_batch(self.target, arguments, "--save-plan")
        if self.progress if self.progress is not None else arguments["progress"]:
            from autoaccum.display.narrator import Narrator

            arguments["callbacks"] = (*(arguments.get("callbacks") or ()), Narrator())
        return {**arguments, "progress": False}

    def _written(self, report: "ProbeReport", more: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """(what is to be printed, `more` with it, whether all files could be written)."""
        done = True
        if first_rank():
            done &= saved(self.plot, "the plot", report.plot)
            done &= saved(self.save_plan, "the plan", lambda path: report.plan.save(path))  # type: ignore[union-attr]  # noqa: PLW0108 (None without a target)
        plan = report.plan.to_dict() if report.plan is not None else {}
        values = {**plan, **report.to_dict(), **more}
        if self.cards:
            from autoaccum.probing.elsewhere import elsewhere

            on_cpu = report.device_type == "cpu"
            values["elsewhere"] = [elsewhere(report, card, on_cpu=on_cpu) for card in self.cards]
        return values, done


def _told(killed: Sequence[Mapping[str, Any]], callbacks: Sequence[Any]) -> list[Any]:
    """The trials that were killed; the last one is news to whoever listens, the others were told before."""
    if not killed:
        return []
    from autoaccum.probing.outcome import Trial
    from autoaccum.training.events import TrialRan

    trials = [Trial(**trial) for trial in killed]
    for listener in callbacks:
        listener(TrialRan(trials[-1].to_dict()))
    return trials


def _first(answers: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], bool] | None:
    """What the first child found, or what one of them failed with by itself; None where TARGET wants no child."""
    if any(answer.get("interrupted") for answer in answers):
        raise KeyboardInterrupt
    for failed in sorted(answers, key=lambda answer: bool(answer.get("told"))):
        if "usage" in failed:
            raise click.UsageError(failed["usage"])
        if "failed" in failed:
            raise ChildFailed(**failed["failed"])
    return answers[0].get("found")


def _in_child(send: "Send", asked: Asked, killed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The child's part: what was found, or how it failed."""
    from autoaccum.probing.isolate import InChild

    answer: dict[str, Any] = {}
    with _failing_into(answer):
        arguments = asked.arguments()
        if asked.isolate is not None or arguments.get("isolate") is not False:
            answer["found"] = asked.found({**arguments, "isolate": InChild(send)}, killed)
    return answer


def _on_rank(asked: Asked) -> dict[str, Any]:
    """One rank's part: what was found, or how it failed."""
    from autoaccum.ranks import leave

    answer: dict[str, Any] = {}
    with _failing_into(answer):
        answer["found"] = asked.found_sharded()
    leave()
    return answer


@contextmanager
def _failing_into(answer: dict[str, Any]) -> Iterator[None]:
    """What is raised inside becomes plain values; its text names a line of the user's code, which the child ran."""
    try:
        yield
    except KeyboardInterrupt:
        answer["interrupted"] = True
    except click.ClickException as error:
        answer["usage"] = error.format_message()
    except (Exception, SystemExit) as error:
        from autoaccum.ranks.places import was_told

        text = "".join(traceback.format_exception(error))
        answer["told"] = was_told(error)
        savers = list(getattr(error, "savers", ()))
        answer["failed"] = {"line": one_line(error), "code": exit_code(error), "trace": text, "savers": savers}

"""A probe in a child process: a hard kill takes the child, not the training.

The child writes each trial into the journal before it starts, and tells which journal that is. When the system kills
it, the next child reads there which trial that was, tries it once more, and takes a second kill for a size that does
not fit. What the child has to say comes back as JSON: nothing is unpickled here.
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoaccum.errors import NothingFitsError, ProbeError, SetupError, shown
from autoaccum.probing.child_process import Killed, before_ending_with_the_parent, check_sendable, run_in_child
from autoaccum.probing.journal import Journal, Owner
from autoaccum.probing.outcome import KILLED, Trial
from autoaccum.settings import taken_by

__all__ = ["InChild", "Isolation", "Send", "answer_of_children", "isolation"]

Send = Callable[[str, Any], None]

# Two for each size that kills: halving a size from the largest that any probe starts with comes to one in 16 steps.
MOST_KILLS = 40


@dataclass(frozen=True)
class InChild:
    """What a probe has to know that runs in a child: how it tells its parent which journal it keeps; and whether it
    looks at the ladder's rungs itself where nothing fits, or its parent does, by a child each.
    """

    send: Send
    climbs: bool = True

    def keeps(self, journal: Journal) -> None:
        """Tells which one. The parent takes it away at the end: a ladder's later rungs rest on the kills before."""
        before_ending_with_the_parent(journal.forgive)  # which is no kill of the trial's
        self.send("journal", {"path": str(journal.path), "key": journal.key, "owner": journal.owner._asdict()})


@dataclass(frozen=True)
class Isolation:
    """A probe in a child process: the function that probes there, and what gives it fit's arguments there."""

    work: Callable[..., Any]
    factory: Callable[[], Mapping[str, Any]]


class Packed:
    """The arguments themselves, for a child process: its copies share no memory with what is trained here."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Packs them; a SetupError names the one that cannot be pickled."""
        try:
            self._bytes = _packed(arguments)
        except Exception:  # whatever a class of the user's raises where it is pickled
            for name, value in arguments.items():
                try:
                    _packed(value)
                except Exception as error:
                    raise SetupError(
                        f"isolate=True: {name}={shown(value)} cannot be sent to a child process: {error}. Define it at "
                        "a module's top level, or give isolate=f, a function there that returns fit's arguments anew"
                    ) from error
            raise

    def __call__(self) -> dict[str, Any]:
        """Copies of them, in the host's memory; a SetupError where a class or function is not found again here."""
        import torch

        try:
            found: dict[str, Any] = torch.load(io.BytesIO(self._bytes), map_location="cpu", weights_only=False)
        except (AttributeError, ImportError) as error:
            raise SetupError(
                f"what isolate=True sent to a child process is not found there ({error}): define it in a file that can "
                "be imported, or give isolate=f, a function that returns fit's arguments anew"
            ) from error
        return found


def _packed(value: Any) -> bytes:
    import torch  # in here: the command line's parent does without it

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def isolation(
    isolate: Any, work: Callable[..., Any], model: Any, data: Any, asked: Mapping[str, Any]
) -> Isolation | InChild | None:
    """How a probe runs that `isolate` asks for; `work` probes in the child.

    A child gets copies of the model (without a wrapper that communicates), the data and what was asked where isolate is
    True. A SetupError where it gets nothing that it could build the model with, or arguments that cannot be sent there.
    """
    if isolate is None or isolate is False:
        return None
    if isinstance(isolate, InChild):
        return isolate
    if isolate is not True and not callable(isolate):
        raise SetupError(
            f"isolate={shown(isolate)}: give True, or a function at a module's top level that returns fit's arguments "
            "as a dict, with which a child process builds a model of its own"
        )
    if isolate is not True:
        return Isolation(work, isolate)
    here = {"isolate", "callbacks", "progress", "group", "cache", "memory", "device"}  # which the child is told or not
    names = [name for name in taken_by("probe") if name in asked and name not in here]
    return Isolation(work, Packed({"model": model, "data": data, **{name: asked[name] for name in names}}))


def answer_of_children(
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    listen: Callable[[str, Any], None],
    lost: Callable[[Trial], None] = lambda trial: None,
) -> Any:
    """What `work(send, *arguments, killed)` returns in a child that lives to its end; a new one for each killed.

    Args:
        work: probes with an InChild, and is given the trials that killed a child before; else as `run_in_child`.
        arguments: picklable.
        listen: called for what the children send beside their journals.
        lost: told of each trial that killed a child.

    Raises:
        ProbeError: a child was killed outside of any trial, or too many were.
        AutoaccumError: as `run_in_child`, or that an argument cannot be pickled.
    """
    check_sendable(arguments, "isolate= takes a function with a name, at a module's top level, for a child process")
    killed: list[Trial] = []
    journals: list[Journal] = []
    answered = False

    def heard(name: str, value: Any) -> None:
        if name == "journal":
            journals.append(Journal(Path(value["path"]), value["key"], Owner.of(value["owner"])))
        else:
            listen(name, value)

    try:
        while len(killed) < MOST_KILLS:
            before = len(journals)
            try:
                answer = run_in_child(work, (*arguments, [trial.to_dict() for trial in killed]), heard)
                answered = True
                return answer
            except NothingFitsError:
                answered = True
                raise
            except Killed as error:
                trials = _killed_in(journals[before:], str(error))
            except BaseException:  # an interrupt, or what a listener raises: the child was stopped, and did not fail
                for journal in journals[before:]:
                    journal.forgive()
                raise
            killed += trials
            for trial in trials:
                lost(trial)
        raise ProbeError(
            f"{len(killed)} child processes were killed one after another, the last at {killed[-1].batch} samples: "
            "give memory= a smaller budget, or max_batch= a smaller size"
        )
    finally:
        for journal in journals:
            journal.close(answered=answered)


def _killed_in(journals: list[Journal], why: str) -> list[Trial]:
    """The trial that a child was in when it was killed, by the journals that it kept; a ProbeError where in none."""
    begun = dict.fromkeys(trial for journal in journals if (trial := journal.begun()) is not None)
    if not begun:
        raise ProbeError(
            f"the probe's child process ended outside of any trial: {why}; it was killed while the model was built, or "
            "its trials could not be written down: look at what builds it, or probe without a child (isolate=False, "
            "--no-isolate)"
        )
    return [Trial(size, kind, None, None, 0.0, KILLED, length) for size, kind, length in begun]

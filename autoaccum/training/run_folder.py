"""A run's folder: when checkpoints are saved to it and found in it, and the record of the run beside them.

    plan.json          the plan as it is now
    report.json        what the probe found; null where it did not run
    environment.json   versions, device and command, each time the run was started
    metrics.jsonl      every event, a line each; steps that a resumed run takes again are dropped
    step-*/            the checkpoints

- Checkpoints come every so many steps where that was asked for, else at the end of each epoch and whenever ten minutes
  have passed since the last: an epoch may take days. The first rank's clock decides that for all.
- Nothing that fails here ends a training. It is said each time, the training goes on, and `unsaved` says so at the end.
- A folder that could not be readied is not saved to: what a restart finds there would be another training's. Each save
  tries to ready it again.
- Only the first rank writes, and sends the others what it resumes from: their machines may share no disk. Of a sharded
  model all ranks write their shards, to a folder that the first one makes, and read them.
- What torchrun restarts after a failure goes on also with resume=False, which its first start has obeyed.
"""

import contextlib
import io
import json
import math
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from autoaccum.checks import check_kind, typed
from autoaccum.data.mapped import is_dead_worker
from autoaccum.errors import CheckpointError, SetupError
from autoaccum.files import partial_path, read_json, write_json
from autoaccum.memory.budget import Device
from autoaccum.planning.plan import Plan
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import Ranks, told
from autoaccum.training.checkpoint import STATE, Checkpoints, Entry, Failure
from autoaccum.training.events import CheckpointSaved, Events, JsonlSink
from autoaccum.training.locks import FolderLock
from autoaccum.training.shard_files import without_shards, write_shards
from autoaccum.training.state import loading

__all__ = ["PATIENCE_SECONDS", "RunFolder", "open_run"]

PATIENCE_SECONDS = 600.0


class RunFolder:
    """Where one training is saved; this rank `writes` there."""

    def __init__(self, folder: str | os.PathLike[str], every: int | None, ranks: Ranks, events: Events) -> None:
        """Nothing is read or written yet; a CheckpointError where the path is a file.

        `folder` need not be there. `every`: optimizer steps between checkpoints; None: as this file's beginning says.
        """
        self.checkpoints = Checkpoints(folder)
        self.folder, self.every = self.checkpoints.folder, every
        self._ranks, self._events = ranks, events
        self.writes = ranks.rank == 0
        self._resumed: Entry | None = None
        self._cut = 0
        self._saved = Entry(0, 0, 0)  # the last one that was begun
        self._tried = self._failed = 0
        self._why = ""
        self._saved_at = time.monotonic()
        self._plan: Plan | None = None  # as the record has it
        self._metrics: JsonlSink | None = None
        self._lock = FolderLock(self.folder, "run")
        self._seen: set[Entry] | None = None  # the checkpoints there when this training was there last; None: never
        self._begun: tuple[Plan, ProbeReport | None, Device]  # with what this training last began

    @property
    def unsaved(self) -> str | None:
        """What could not be saved, in one line; None where all was."""
        found = []
        if self._failed:
            found.append(f"{self._failed} of {self._tried} saves to {str(self.folder)!r} failed, the last: {self._why}")
        if self._metrics is not None and self._metrics.failed:
            found.append(f"metrics.jsonl lacks lines: {self._metrics.failed}")
        return "; ".join(found) or None

    def where(self) -> str:
        """Where the training can go on from, in words that end an error's message; waits for what is being finished."""
        self.poll(wait=True)
        last = self.checkpoints.last
        if not self.writes:  # the first rank's, as far as its folder is seen from here
            entries = self.checkpoints.entries()
            last = self.checkpoints.path(entries[-1]) if entries else last
        return f"nothing was saved yet in {self.folder}" if last is None else f"the last checkpoint is {last}"

    # --- finding ---

    def find(self, resume: bool | str) -> dict[str, Any] | None:
        """What the newest whole checkpoint holds; None where the training begins anew. All ranks call this.

        A CheckpointError where `resume` is True and there is none; or one has code in it.
        """
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        if resume is False and not restarted:
            return None
        state: dict[str, Any] = {}
        try:
            self._seen = set(self.checkpoints.entries())
            # With resume=False only what was saved since torchrun began: its first start set all else aside.
            since = psutil.Process(os.getppid()).create_time() if resume is False else 0.0
            old = any(self.checkpoints.path(entry).stat().st_mtime < since for entry in self._seen)
            found = self.checkpoints.newest(self._events.warn) if self.writes and not old else None
            if self.writes and found is None and resume is True:
                raise CheckpointError(
                    f"resume=True, and there is no checkpoint in {str(self.folder)!r} to go on from: give the folder "
                    'of the training, or resume="auto" to begin where there is none'
                )
        except BaseException:
            self._ranks.fail()
            raise
        mine = [0, 0, 0, 0] if found is None else [1, *found[0]]
        there, *place = map(int, self._ranks.tally("resuming", mine))
        if not there:
            return None
        self._resumed = self._saved = Entry(*place)
        path = self.checkpoints.last = self.checkpoints.path(self._resumed)
        if self._ranks.size > 1:  # sent, since a folder on another machine may be another folder
            sent = self._ranks.send("resuming", (path / STATE).read_bytes() if self.writes else b"")
            state = torch.load(io.BytesIO(sent), map_location="cpu", weights_only=True)
        else:
            state = found[1] if found is not None else {}
        with loading("place in metrics.jsonl"):
            self._cut = typed(state["metrics"], int)
        return {**state, "shards": path}

    # --- saving ---

    def begin(self, plan: Plan, probe: ProbeReport | None, device: Device) -> None:
        """Keeps other trainings out of the folder. The first time, readies it and begins the record.

        A CheckpointError where another training writes there, or has done so since this one was prepared or left.
        """
        if not self.writes:
            return
        self._begun = plan, probe, device
        try:
            self._enter()
        except Failure as error:
            then = "The training goes on, and nothing of it is saved there until that is mended"
            self._lost("the record of the run", error, then)

    def _enter(self) -> JsonlSink:
        """Takes the folder, unless another training has it or had it meanwhile, and readies it where that is to be
        done.
        """
        was_here = self._lock.held
        other = self._lock.holder()
        if other is not None:
            raise CheckpointError(
                f"another training, {other}, writes to {str(self.folder)!r}: give this one a folder of its own, or "
                "start it again once that has ended (or its iterator was closed), to go on from there"
            )
        if not was_here and self._seen is not None and not self._seen.issuperset(self.checkpoints.entries()):
            self._lock.release()
            raise CheckpointError(
                f"another training has saved to {str(self.folder)!r} since this one was there: give this one a folder "
                "of its own, or prepare it anew to go on from what is there now"
            )
        return self._make_ready(*self._begun) if self._metrics is None else self._metrics

    def _make_ready(self, plan: Plan, probe: ProbeReport | None, device: Device) -> JsonlSink:
        import autoaccum

        aside = self.checkpoints.begin(self._resumed)
        metrics = JsonlSink(self.folder / "metrics.jsonl", follow=False)
        metrics.cut(self._cut)
        if aside is not None:
            self._events.note(f"an earlier training was in {self.folder}, and is in {aside} now")
        report = self.folder / "report.json"
        if self._resumed is None or not report.exists():  # a resumed run knows less of the probe than the first one
            write_json(report, None if probe is None else probe.to_dict())
        path, runs = self.folder / "environment.json", []
        if self._resumed is not None:
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # gone or damaged: begun anew
                runs = list(read_json(path)["runs"])
        start = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "resumed_at": 0 if self._resumed is None else self._resumed.step,
            "autoaccum": autoaccum.__version__, "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": platform.python_version(), "platform": platform.platform(),
            "device": device.name, "device_bytes": device.total(), "ranks": self._ranks.size, "command": sys.argv,
        }  # fmt: skip
        write_json(path, {"runs": [*runs, start]}, private=True)  # a command may have a password in it
        self._record_plan(plan)
        self._metrics = metrics
        self._events.add(metrics)
        text = f"the run's record is in {self.folder}"
        if self._resumed is not None:
            text += (
                f", and the training goes on from {self.checkpoints.path(self._resumed)}, with the plan and the "
                f"learning rate it had: micro-batches of {plan.micro_batch}"
            )
        self._events.note(text)
        return metrics

    def due(self, step: int) -> bool:
        """Whether so many steps have passed since the last checkpoint; the same on all ranks."""
        return self.every is not None and step - self._saved.step >= self.every

    def overdue(self) -> bool:
        """Whether so much time has passed that it is time for another; this rank's opinion."""
        return self.every is None and time.monotonic() - self._saved_at >= PATIENCE_SECONDS

    def save(self, entry: Entry, state_dict: Callable[[], dict[str, Any]], plan: Plan, loss: float | None) -> None:
        """Saves a checkpoint; where that fails, the training goes on. All ranks call this, and take part in
        `state_dict`.

        The plan is as it is now, for the record; `loss` is of the validation at that very moment, if there was one.
        """
        if entry == self._saved:
            return
        self._saved, self._saved_at = entry, time.monotonic()
        self.poll(wait=True)
        self._tried += 1
        try:
            try:
                self._write(entry, state_dict, plan, loss)
            except RuntimeError as error:
                # torch raises the death of a DataLoader's worker wherever the program happens to be, once.
                if not is_dead_worker(error):
                    raise
                self._write(entry, state_dict, plan, loss)
        except (*Failure, CheckpointError) as error:
            self._lost(f"the checkpoint of {entry}", error)

    def _write(self, entry: Entry, state_dict: Callable[[], dict[str, Any]], plan: Plan, loss: float | None) -> None:
        state, shards = without_shards(state_dict())
        folder = self._write_shards(entry, shards) if shards else None
        if self.writes:
            position = self._enter().position()
            about = {} if loss is None or not math.isfinite(loss) else {"loss": loss}
            self.checkpoints.write(entry, {**state, "metrics": position}, about, folder)
            self._record_plan(plan)

    def _write_shards(self, entry: Entry, shards: Mapping[str, Tensor]) -> Path:
        """The checkpoint's folder, of a half-written name, with the shards of all ranks; all ranks call this.

        A CheckpointError on all of them where one of them could not; nothing of it is left.
        """
        folder, why = partial_path(self.checkpoints.path(entry)), ""
        if self.writes:
            try:
                self._enter()
                folder.mkdir(mode=0o700, parents=True)
            except (*Failure, CheckpointError) as error:
                why = str(error)
        name, why = json.loads(self._ranks.send("saving", json.dumps([folder.name, why]).encode()))
        if why:
            raise told(CheckpointError(why))
        folder = folder.with_name(name)
        try:
            write_shards(shards, folder, self._ranks)
        except CheckpointError:
            if self.writes:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _record_plan(self, plan: Plan) -> None:
        """Where it has changed: forcing a file to the disk takes longer than many a window."""
        if plan != self._plan:
            write_json(self.folder / "plan.json", plan.to_dict(), checksum=True)
            self._plan = plan

    def poll(self, *, wait: bool = False) -> None:
        """Tells of the checkpoint that was finished beside the training, if one was."""
        try:
            entry = self.checkpoints.settle(wait=wait)
        except Failure as error:
            self._lost("a checkpoint", error)
            return
        if entry is not None:
            self._events.tell(CheckpointSaved(entry.step, str(self.checkpoints.path(entry))))

    def close(self) -> None:
        """Waits for what is being saved, and lets others into the folder."""
        self.poll(wait=True)
        if self._lock.held:
            self._seen = set(self.checkpoints.entries())
            self._lock.release()

    def _lost(self, what: str, error: BaseException, then: str = "The training goes on") -> None:
        self._failed += 1
        self._tried = max(self._tried, self._failed)
        self._why = " ".join(str(error).split()) or type(error).__name__
        self._events.warn(f"{what} could not be saved to {str(self.folder)!r}: {self._why}. {then}")


def open_run(
    folder: str | os.PathLike[str] | None, every: int | None, resume: bool | str, ranks: Ranks, events: Events
) -> tuple[RunFolder | None, dict[str, Any] | None]:
    """The run's folder, where one is wanted, and what the checkpoint in it holds that the training goes on from.

    A SetupError for settings that need a folder where none is given, or that is no path.
    """
    if folder is None:
        if every is not None or resume is True:
            given = f"checkpoint_every={every}" if every is not None else "resume=True"
            raise SetupError(f"{given}, and no folder to save to: give checkpoint=FOLDER")
        return None, None
    check_kind("checkpoint", folder, (str, os.PathLike), 'the path of a folder, such as "run"')
    run = RunFolder(folder, every, ranks, events)
    return run, run.find(resume)

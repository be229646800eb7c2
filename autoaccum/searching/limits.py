"""How many samples fit at once, probed once for all trials that need the same memory.

What decides the memory is the key of the probe's cache: the model's structure, the batch's shapes, the optimizer, the
formats, the device. Learning rates, schedules and target batches are not in it, so most searches probe a single time.
The answers lie in the run's folder, where all workers find them, and one worker probes at a time.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

from autoaccum.errors import NothingFitsError
from autoaccum.files import read_json, write_json
from autoaccum.interrupts import uninterrupted
from autoaccum.probing.cache import training_key
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import ends_all
from autoaccum.session import Session
from autoaccum.settings import SETTINGS, deciding
from autoaccum.training.locks import FolderLock

__all__ = ["Limits"]

_SCHEMA = 1


class Limits:
    """The probe's answers by key: in memory, and in the run's folder for the other workers and the next start."""

    def __init__(self, folder: Path, ceiling: int) -> None:
        # The ceiling is the largest target batch, up to which the probe looks.
        self._folder, self._ceiling = folder / "probes", ceiling
        self._known: dict[str, dict[str, Any]] = {}

    def key(self, session: Session) -> str:
        """A name for all that decides how many samples fit."""
        asked = session.settings
        settings = {name: asked[name] for name in deciding("memory") if asked[name] != SETTINGS[name].default}
        settings.pop("precision", None)  # the one that was decided on counts
        return training_key(session.parts, {**settings, "ranks": session.parts.ranks.size})

    def report(self, key: str, session: Session) -> ProbeReport:
        """The probe's report, whose `micro_batch` is the most samples that trials may run at once.

        A NothingFitsError where not even one sample fits, now or when it was probed.
        """
        share = max(self._ceiling, session.settings.target_batch)
        found = self._read(key, share)
        if found is None:
            with FolderLock(self._folder, "probe"):
                # Another worker may have found out meanwhile.
                found = self._read(key, share) or self._probe(key, session, share)
        self._known[key] = found
        if found["nothing"] is not None:
            raise NothingFitsError(found["nothing"])
        return ProbeReport.from_dict(found["report"])

    def memory(self, key: str, micro_batch: int) -> int | None:
        """The peak in bytes at a micro-batch, of a key that was asked for: by the forecast, else the most measured."""
        report = self._known[key]["report"]
        points: list[tuple[int, int]] = report["curve"]
        for (a, at_a), (b, at_b) in pairwise(points):
            if a <= micro_batch <= b:
                return round(at_a + (at_b - at_a) * (micro_batch - a) / max(b - a, 1))
        peaks = [trial["peak_bytes"] for trial in report["trials"] if trial["peak_bytes"] is not None]
        return points[-1][1] if points else max(peaks, default=None)

    @uninterrupted
    def _probe(self, key: str, session: Session, share: int) -> dict[str, Any]:
        found: dict[str, Any] = {"schema": _SCHEMA, "share": share, "nothing": None, "report": None}
        try:
            with ends_all():
                report = session.probe(share)
            found["report"] = report.to_dict() | {"timeline": None}
            if not report.throughput:  # else the size is the fastest, and larger ones would only be slower
                found["report"]["micro_batch"] = max(report.micro_batch, report.limit or 0)
        except NothingFitsError as error:
            found["nothing"] = str(error)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"{key}.json", found, checksum=True, private=True)
        return found

    def _read(self, key: str, share: int) -> dict[str, Any] | None:
        """What is known and reaches as far as `share`; a file that is no answer is as good as none."""
        found = self._known.get(key)
        if found is None:
            try:
                found = dict(read_json(self._folder / f"{key}.json"))
                if found["schema"] != _SCHEMA:
                    return None
                if found["nothing"] is None:
                    ProbeReport.from_dict(found["report"])
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                return None
        enough = found["nothing"] is not None or found["share"] >= share
        return found if enough or found["report"]["limit_proof"] in ("forecast", "out of memory") else None

"""How many samples fit at once, probed once for all trials that need the same memory.

What decides the memory is the key of the probe's cache: the model's structure, the batch's shapes, the optimizer, the
formats, the device. Learning rates, schedules and target batches are not in it, so most searches probe a single time.
The answers lie in the run's folder, where all workers find them, and one worker probes at a time.
"""

from dataclasses import replace
from pathlib import Path

from autoaccum.errors import NothingFitsError
from autoaccum.files import read_json, write_json
from autoaccum.interrupts import uninterrupted
from autoaccum.probing.answered import restored, stored
from autoaccum.probing.cache import training_key
from autoaccum.probing.report import ProbeReport
from autoaccum.ranks import ends_all
from autoaccum.session import Session
from autoaccum.settings import SETTINGS, deciding
from autoaccum.training.locks import FolderLock

__all__ = ["Limits"]

_SCHEMA = 2


class Limits:
    """The probe's answers by key, in the run's folder."""

    def __init__(self, folder: Path, ceiling: int) -> None:
        # The ceiling is the largest target batch, up to which the probe looks.
        self._folder, self._ceiling = folder / "probes", ceiling

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
        if isinstance(found, str):
            raise NothingFitsError(found)
        return found

    @uninterrupted
    def _probe(self, key: str, session: Session, share: int) -> ProbeReport | str:
        """The report, or why nothing fits; kept for all other trials."""
        found: ProbeReport | str
        try:
            with ends_all():
                found = session.probe(share)
            if not found.throughput:  # else the size is the fastest, and larger ones would only be slower
                found = replace(found, micro_batch=max(found.micro_batch, found.limit or 0))
        except NothingFitsError as error:
            found = str(error)
        told = {"nothing": found} if isinstance(found, str) else {"nothing": None, **stored(found)}
        self._folder.mkdir(parents=True, exist_ok=True)
        values = {"schema": _SCHEMA, "share": share, **told}
        write_json(self._folder / f"{key}.json", values, checksum=True, private=True)
        return found

    def _read(self, key: str, share: int) -> ProbeReport | str | None:
        """What is known and reaches as far as `share`; a file that is no answer is as good as none."""
        try:
            values = read_json(self._folder / f"{key}.json")
            if values["schema"] != _SCHEMA:
                return None
            found: ProbeReport | str = values["nothing"] or restored(values)
            enough = isinstance(found, str) or found.limit_proof in ("forecast", "out of memory")
            return found if enough or values["share"] >= share else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None

"""Where a study is kept: a journal file, SQLite, PostgreSQL or another database by URL, or a gRPC proxy.

Without a URL it is a journal file: one machine and no server. What a storage raises is one SetupError with its name
and the remedy; passwords in URLs are never shown.
"""

import contextlib
import errno
import importlib.util
import os
import re
import shlex
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoaccum.errors import AutoaccumError, SetupError, shown
from autoaccum.interrupts import uninterrupted
from autoaccum.searching.extra import optuna

__all__ = ["dashboard_line", "open_storage", "place_of", "telling_of"]

RACES = 10  # tries to open a database that others open for the first time
CONNECT = 10  # seconds to wait for a server
PACKAGES = ("sqlalchemy", "sqlite3", "psycopg", "psycopg2", "grpc", "optuna", "alembic")
FULL = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = {*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # of a journal, while the search runs


def place_of(storage: Any) -> str:
    """The path or URL of what the user wrote, with its password struck out."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", str(storage))


@uninterrupted
def open_storage(storage: Any) -> Any:
    """Optuna's storage for what the user wrote: a path (a journal), a URL, or a storage.

    A SetupError where it is unknown, unreachable, locked, damaged, or without its driver.
    """
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    text = str(storage)
    scheme, colon, rest = text.partition("://")
    with telling_of(storage, opening=True):
        if not colon:
            return _journal(Path(text).absolute())
        if scheme == "grpc":
            host, _, port = rest.rstrip("/").rpartition(":")
            proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
            proxy.wait_server_ready(CONNECT)
            return proxy
        return _database(text)


@contextlib.contextmanager
def telling_of(storage: Any, *, opening: bool = False) -> Iterator[None]:
    """Turns what storages raise into one error that names the storage, as the user wrote it, and what to do.

    While one is opened and read, every error is about it: those who read a damaged journal stumble in many ways. Later
    only those of its packages are, and those of a full or broken disk.
    """
    try:
        yield
    except (AutoaccumError, MemoryError):
        raise
    except Exception as error:
        of_its_packages = type(error).__module__.split(".")[0] in PACKAGES
        if not (opening or of_its_packages or (isinstance(error, OSError) and error.errno in UNWRITABLE)):
            raise
        place = place_of(storage)
        raise SetupError(f"storage {shown(place)} {_trouble(place, error)}") from error


def _trouble(place: str, error: Exception) -> str:
    """What is the matter, and what to do about it."""
    cause = place_of(" ".join(str(error.__cause__ or error).split()))[:300]
    raised = f"({type(error).__name__}: {cause})"
    if isinstance(error, ImportError):
        hint = 'pip install "psycopg[binary]"' if place.startswith("postgresql") else "install it with pip"
        return f"needs a driver {raised}: {hint}"
    if "locked" in cause:
        return f"is locked by another process {raised}: end the process that holds it, or wait for it"
    if "disk is full" in cause or (isinstance(error, OSError) and error.errno in FULL):
        return f"cannot be written {raised}: free some space there; the same call then goes on"
    return (
        f"cannot be used {raised}: check that it is whole and can be reached, or give another: a path for a journal "
        "file, sqlite:///study.db, postgresql://user@host/name, or grpc://host:port where that answers (start it with "
        "optuna.storages.run_grpc_proxy_server)"
    )


def _journal(path: Path) -> Any:
    """Optuna's storage over this file, which is made where it is not there."""
    journal = optuna.storages.journal
    lock = journal.JournalFileSymlinkLock(str(path))
    if path.exists():
        lock.acquire()  # whoever may be writing its last line now is done after this
        try:
            text = path.read_bytes()
            if text and not text.startswith(b"{"):
                raise SetupError(
                    f"storage={str(path)!r} is not a journal file: give another path, or sqlite:///{path} where it is "
                    "an SQLite database"
                )
            kept = text.rfind(b"\n") + 1
            if kept < len(text):  # whoever wrote a line without its end was killed before it counted
                os.truncate(path, kept)
                warnings.warn(
                    f"the journal {path} ended in the middle of a line, which a crash had cut off: its last "
                    f"{len(text) - kept} bytes were dropped",
                    stacklevel=2,
                )
        finally:
            lock.release()
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=lock))


def _database(url: str) -> Any:
    if re.fullmatch(r"sqlite[^:]*://(/(:memory:)?)?(\?.*)?", url):
        raise SetupError(
            f"storage={url!r} is a database in memory, which every process and thread would have for itself: name a "
            "file, such as sqlite:///study.db, or leave storage out"
        )
    arguments: dict[str, Any] = {}
    if url.startswith("sqlite") and "timeout=" not in url:
        arguments["connect_args"] = {"timeout": 60}  # seconds that a worker waits for the others' writes
    if url.startswith("postgresql"):
        arguments = {"connect_args": {"connect_timeout": CONNECT}, "pool_pre_ping": True}
        if url.startswith("postgresql://") and importlib.util.find_spec("psycopg2") is None:
            url = url.replace("postgresql://", "postgresql+psycopg://", 1)
    from sqlalchemy.exc import DatabaseError

    for _ in range(RACES):
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=arguments)
        except DatabaseError as error:  # other processes may be making the same tables at this moment
            failed = error
            if not re.search("already exists|unique|duplicate", str(error), re.IGNORECASE):
                break
        time.sleep(0.3)
    raise failed


def dashboard_line(storage: Any) -> str | None:
    """How a person looks at the study in a browser; None for a storage object, whose address is not known."""
    if not isinstance(storage, (str, Path)) or str(storage).startswith("grpc://"):
        return None
    return f"optuna-dashboard {shlex.quote(place_of(storage))}"

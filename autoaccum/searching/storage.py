"""Where a study is kept: a journal file, SQLite, PostgreSQL or another database by URL, or a gRPC proxy.

Choices:
- Without a URL it is a journal file: one machine, no server, and no lock that a kill can leave in the data.
- Heartbeats where the storage has them (the databases), so that other machines' dead trials are noticed too.
- What a storage raises is one SetupError with its name and the remedy; passwords in URLs are never shown.
"""

import contextlib
import errno
import importlib.util
import os
import re
import shlex
import stat
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoaccum.errors import AutoaccumError, SetupError, shown
from autoaccum.searching.extra import load_optuna, quiet
from autoaccum.searching.journal_file import broken_line, open_journal

__all__ = ["dashboard_line", "has_heartbeats", "is_shared", "open_storage", "telling_of", "without_password"]

HEARTBEAT, GRACE = 60, 240  # seconds between signs of life, and until a trial without one counts as dead
RACES = 10  # tries to open a database that others open for the first time
CONNECT = 10  # seconds to wait for a server
SCHEMES = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql")
FULL = {errno.ENOSPC, errno.EDQUOT}
UNWRITABLE = {*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}  # of a journal, while the search runs


def open_storage(storage: Any, folder: Path) -> Any:
    """Optuna's storage for what the user wrote.

    Args:
        storage: None (a journal in `folder`), a path (a journal), a URL, or a storage of Optuna's.
        folder: of the run.

    Raises:
        SetupError: unknown, unreachable, locked, damaged, or without its driver.
    """
    optuna = load_optuna()
    if isinstance(storage, optuna.storages.BaseStorage):
        return storage
    text = str(folder / "journal.log") if storage is None else str(storage)
    scheme, colon, rest = text.partition("://")
    with telling_of(text):
        if not colon:
            return open_journal(Path(text))
        if scheme == "grpc":
            return _proxy(text, rest)
        if scheme.split("+")[0] in SCHEMES:
            return _database(text)
    raise SetupError(
        f"storage={shown(without_password(text))}: {shown(scheme + colon)} is not known; write a path for a journal "
        "file, sqlite:///study.db, postgresql://user@host/name or grpc://host:port"
    )


def without_password(text: str) -> str:
    """A URL with its password struck out."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", text)


@contextlib.contextmanager
def telling_of(text: str, *, opening: bool = True) -> Iterator[None]:
    """Turns what storages raise into one error that names the storage and what to do.

    While one is opened, every error of reading and of values is about it; later only those of its packages are, and
    those of a full or broken disk.
    """
    try:
        yield
    except (AutoaccumError, MemoryError):
        raise
    except ImportError as error:
        raise SetupError(
            f"storage {shown(without_password(text))} needs a driver: {error}; {_driver_hint(text)}"
        ) from error
    except Exception as error:
        culprit = _culprit(error, opening)
        if culprit is None:
            raise
        raise SetupError(f"storage {shown(without_password(text))} {_trouble(text, culprit)}") from error


def _culprit(error: BaseException, opening: bool) -> Exception | None:
    """The error of a storage that one is, or that one arose from: Optuna stumbles over some of them itself."""
    one: BaseException | None = error
    while one is not None:
        if isinstance(one, Exception) and _of_a_storage(one, opening):
            return one
        if not (isinstance(one, AssertionError) and _raised_by_optuna(one)):
            return None
        one = one.__cause__ or one.__context__
    return None


def _raised_by_optuna(error: BaseException) -> bool:
    return _frames(error)[-1:] != [] and _frames(error)[-1].startswith("optuna.")


def _frames(error: BaseException) -> list[str]:
    """The modules in which an error arose and through which it came, the innermost last."""
    return [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]


def _of_a_storage(error: Exception, opening: bool) -> bool:
    """Whether an error is one that storages raise, by the packages that they are made of."""
    home = type(error).__module__.split(".")[0]
    packages = ("sqlalchemy", "sqlite3", "psycopg", "psycopg2", "grpc", "optuna", "alembic")
    if home in packages or (opening and isinstance(error, OSError)):
        return True
    readers = ("optuna.storages.", "autoaccum.searching.study", "autoaccum.searching.search_result")
    if opening and any(name.startswith(readers) for name in _frames(error)):
        return True  # whatever it is: those who read a damaged journal stumble in many ways
    return isinstance(error, OSError) and error.errno in UNWRITABLE


def _trouble(text: str, error: Exception) -> str:
    """What is the matter, and what to do about it."""
    cause = without_password(" ".join(str(error.__cause__ or error).split()))[:300]
    raised = f"({type(error).__name__}: {cause})"
    if "locked" in cause:
        return f"is locked by another process {raised}: end the process that holds it, or wait for it"
    if "disk is full" in cause or (isinstance(error, OSError) and error.errno in FULL):
        return f"cannot be written {raised}: free some space there; the same call then goes on"
    line = None if "://" in text else broken_line(Path(text))
    if line is not None:
        return (
            f"is a damaged journal, in line {line} {raised}: give another path, or keep its first {line - 1} lines "
            "alone, which hold what was found until then"
        )
    return f"cannot be used {raised}: check that it is there and can be reached, or give another storage"


def has_heartbeats(storage: Any) -> bool:
    """Whether Optuna keeps signs of life of running trials in this storage."""
    return isinstance(storage, str) and storage.partition("://")[0].split("+")[0] in SCHEMES


def _driver_hint(text: str) -> str:
    return 'pip install "psycopg[binary]"' if text.startswith("postgresql") else "install it with pip"


def _database(url: str) -> Any:
    optuna = load_optuna()
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
            with quiet():
                return optuna.storages.RDBStorage(
                    url, engine_kwargs=arguments, heartbeat_interval=HEARTBEAT, grace_period=GRACE
                )
        except DatabaseError as error:
            # Other processes may be making the same tables at this moment.
            if not re.search("already exists|unique|duplicate", str(error), re.IGNORECASE):
                raise
        time.sleep(0.3)
    raise SetupError(f"storage {shown(without_password(url))} is not as Optuna makes it: give a database of its own")


def _proxy(text: str, address: str) -> Any:
    optuna = load_optuna()
    host, colon, port = address.rstrip("/").rpartition(":")
    if not colon or not port.isdigit() or not host:
        raise SetupError(f"storage={text!r}: write grpc://host:port, such as grpc://localhost:13000")
    if importlib.util.find_spec("grpc") is None:
        raise SetupError(f"storage {text!r} needs a package that is not installed: pip install grpcio")
    import grpc  # type: ignore[import-untyped, unused-ignore]

    try:
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            grpc.channel_ready_future(channel).result(timeout=CONNECT)
    except grpc.FutureTimeoutError as error:
        raise SetupError(
            f"storage {text!r} does not answer within {CONNECT} seconds: start it with "
            f"optuna.storages.run_grpc_proxy_server(storage, host={host!r}, port={port})"
        ) from error
    with quiet():
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port))


def is_shared(storage: Any, folder: Path) -> bool:
    """Whether anybody but this user may write to a study there: a server's, or a file that its permissions open."""
    if isinstance(storage, load_optuna().storages.BaseStorage):
        return not isinstance(storage, load_optuna().storages.InMemoryStorage)
    text = str(folder / "journal.log") if storage is None else str(storage)
    scheme, colon, rest = text.partition("://")
    if colon and not scheme.startswith("sqlite"):
        return True
    path = Path(rest.removeprefix("/").partition("?")[0] if colon else text).absolute()
    return _others_write(path) or _others_write(path.parent)


def _others_write(path: Path) -> bool:
    try:
        found = path.stat()
    except FileNotFoundError:
        return False  # this search makes it
    if not hasattr(os, "getuid"):
        return False  # permissions are not told so there
    opened = found.st_mode & (stat.S_IWOTH | (0 if _is_own_group(found.st_gid) else stat.S_IWGRP))
    # In a sticky folder, such as /tmp, nobody replaces another's file.
    mine = found.st_uid in (0, os.getuid())
    return not mine or bool(opened and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX))


def _is_own_group(number: int) -> bool:
    """Whether a group is one that a system makes for a single user, of the user's own name."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.getuid())
    except KeyError:
        return False
    return group.gr_name == user.pw_name and not set(group.gr_mem) - {user.pw_name}


def dashboard_line(storage: Any, folder: Path) -> str | None:
    """How a person looks at the study in a browser; None for a storage object, whose address is not known."""
    if storage is None:
        storage = folder / "journal.log"
    if not isinstance(storage, (str, Path)) or str(storage).startswith("grpc://"):
        return None
    return f"optuna-dashboard {shlex.quote(without_password(str(storage)))}"

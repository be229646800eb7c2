"""Where a study is kept: a journal file, SQLite, PostgreSQL or another database by URL, or a gRPC proxy.

Choices:
- Without a URL it is a journal file: one machine, no server, and no lock that a kill can leave in the data.
- A journal whose last line was cut off by a crash is mended before use: that line was never acknowledged to anyone.
- Heartbeats where the storage has them (the databases), so that other machines' dead trials are noticed too.
- What a storage raises is one SetupError with its name and the remedy; passwords in URLs are never shown.
"""

import contextlib
import importlib.util
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autoaccum.errors import AutoaccumError, SetupError
from autoaccum.searching.extra import load_optuna, quiet

__all__ = ["dashboard_line", "has_heartbeats", "open_storage", "shown", "telling_of"]

HEARTBEAT, GRACE = 60, 240  # seconds between signs of life, and until a trial without one counts as dead
LOCK_GRACE = 10  # seconds until a journal's lock whose holder is gone is broken; a line takes milliseconds to write
RACES = 10  # tries to open a database that others open for the first time
CONNECT = 10  # seconds to wait for a server
SCHEMES = ("sqlite", "postgresql", "mysql", "mariadb", "oracle", "mssql")


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
            return _journal(Path(text))
        if scheme == "grpc":
            return _proxy(text, rest)
        if scheme.split("+")[0] in SCHEMES:
            return _database(text)
    raise SetupError(
        f"storage={shown(text)!r}: {scheme}:// is not known; write a path for a journal file, sqlite:///study.db, "
        "postgresql://user@host/name or grpc://host:port"
    )


def shown(text: str) -> str:
    """A URL with its password struck out."""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", text)


@contextlib.contextmanager
def telling_of(text: str, *, opening: bool = True) -> Iterator[None]:
    """Turns what storages raise into one error that names the storage and what to do.

    While one is opened, every error of reading and of values is about it; later only those of its packages are.
    """
    try:
        yield
    except (AutoaccumError, MemoryError):
        raise
    except ImportError as error:
        raise SetupError(f"storage {shown(text)!r} needs a driver: {error}; {_driver_hint(text)}") from error
    except Exception as error:
        if not _of_a_storage(error, opening):
            raise
        cause = shown(" ".join(str(error.__cause__ or error).split()))[:300]
        locked = "locked" in cause
        what = "is locked by another process" if locked else "cannot be used"
        remedy = (
            "end the process that holds it, or wait for it"
            if locked
            else "check that it is there and can be reached, or give another storage"
        )
        raise SetupError(f"storage {shown(text)!r} {what} ({type(error).__name__}: {cause}): {remedy}") from error


def _of_a_storage(error: Exception, opening: bool) -> bool:
    """Whether an error is one that storages raise, by the packages that they are made of."""
    home = type(error).__module__.split(".")[0]
    packages = ("sqlalchemy", "sqlite3", "psycopg", "psycopg2", "grpc", "optuna", "alembic")
    return home in packages or (opening and isinstance(error, (OSError, ValueError, KeyError)))


def has_heartbeats(storage: Any) -> bool:
    """Whether Optuna keeps signs of life of running trials in this storage."""
    return isinstance(storage, str) and storage.partition("://")[0].split("+")[0] in SCHEMES


def _driver_hint(text: str) -> str:
    return 'pip install "psycopg[binary]"' if text.startswith("postgresql") else "install it with pip"


def _journal(path: Path) -> Any:
    optuna = load_optuna()
    if path.is_dir():
        raise SetupError(f"storage={str(path)!r} is a folder: give the path of a journal file in it")
    if not path.parent.is_dir():
        raise SetupError(f"storage={str(path)!r}: there is no folder {str(path.parent)!r}; make it first")
    if path.exists():
        with path.open("rb") as file:
            head = file.read(16)
        if head.startswith(b"SQLite format 3"):
            raise SetupError(f"storage={str(path)!r} is an SQLite database: write sqlite:///{path}")
        if head and not head.startswith(b"{"):
            raise SetupError(f"storage={str(path)!r} is not a journal file: give another path")
    journal = optuna.storages.journal
    lock = journal.JournalFileSymlinkLock(str(path.absolute()), grace_period=LOCK_GRACE)
    _mend(path, lock)
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(path), lock_obj=lock))


def _mend(path: Path, lock: Any) -> None:
    """Cuts off a last line without its end: whoever wrote it was killed before it counted."""
    if not path.exists() or not _torn(path):
        return
    lock.acquire()  # whoever may be writing that line now is done after this
    try:
        if _torn(path):
            text = path.read_bytes()
            kept = text.rfind(b"\n") + 1
            warnings.warn(
                f"the journal {path} ended in the middle of a line, which a crash had cut off: its last "
                f"{len(text) - kept} bytes were dropped",
                stacklevel=2,
            )
            with path.open("r+b") as file:
                file.truncate(kept)
    finally:
        lock.release()


def _torn(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, 2)
        if file.tell() == 0:
            return False
        file.seek(-1, 2)
        return file.read(1) != b"\n"


def _database(url: str) -> Any:
    optuna = load_optuna()
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
    raise SetupError(f"storage {shown(url)!r} is not as Optuna makes it: give a database of its own")


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


def dashboard_line(storage: Any, folder: Path) -> str | None:
    """How a person looks at the study in a browser; None for a storage object, whose address is not known."""
    if storage is None:
        return f"optuna-dashboard {folder / 'journal.log'}"
    if not isinstance(storage, (str, Path)) or str(storage).startswith("grpc://"):
        return None
    return f"optuna-dashboard {shown(str(storage))}"

"""Files that are written whole or not at all, and opened only where they are what they seem.

Choices made here:

- A half-written file lies beside its target under a name with 128 random bits: nobody can put something there first,
  and what a kill leaves behind is told from any file of the user's.
- What the package writes in a folder is never written through a symbolic link.
- What need not be shared (locks, journals, states) is readable for its owner alone; else the umask decides.
- JSON is read with bounds: no infinity, no number above 64 bits, no nesting that a recursion would die of. Where a file
  carries a checksum, it has to be that of the values in it.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

__all__ = [
    "open_own",
    "partial_of",
    "partial_path",
    "plain_json",
    "read_json",
    "sync_folder",
    "whole_file",
    "write_json",
]

CHECKSUM = "checksum"
DEEPEST = 32  # containers in containers; what the package writes has five
_PARTIAL = re.compile(r"\.(.+)\.[0-9a-f]{32}\.tmp")


def partial_path(path: Path) -> Path:
    """A name beside `path` for its half-written self; another one each time."""
    return path.with_name(f".{path.name}.{secrets.token_hex(16)}.tmp")


def partial_of(path: Path) -> str | None:
    """The name of the file that `path` is a half-written form of; None where it is none of ours."""
    found = _PARTIAL.fullmatch(path.name)
    return None if found is None else found[1]


def open_own(path: Path, mode: str, *, private: bool = False, **settings: Any) -> IO[Any]:
    """`open` for a file of the package's own: a symbolic link is refused with an OSError, never followed.

    A new file that is `private` is its owner's alone; else the umask decides.
    """

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o600 if private else 0o666)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise OSError(errno.ELOOP, "it is a symbolic link, which is not written through", name) from None

    return open(path, mode, opener=opener, **settings)


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """A file to write: at `path` once the block has ended well, and on the disk; else what was there before stays.

    Written beside it under a name of its own, so that several processes may write at once: the last one counts.
    """
    partial = partial_path(path)
    try:
        with open_own(partial, "xb", private=private) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk's own error is the one to tell
            partial.unlink()
        raise
    sync_folder(path.parent)


def write_json(path: Path, values: Any, *, checksum: bool = False, private: bool = False) -> None:
    """Plain values as JSON in a file, whole or not at all. A `private` one is its owner's alone.

    A `checksum` is added to the values, a dict, under that name; `read_json` compares it.
    """
    if checksum:
        values = {**values, CHECKSUM: _checksum(values)}
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path, private=private) as file:
        file.write(text.encode("utf-8"))


def read_json(path: Path) -> Any:
    """The JSON value in a file, without its checksum where it has one.

    A ValueError: not JSON, a number that is not finite or too large, nested too deep, or of another checksum.
    """
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"brackets are nested more than {DEEPEST} deep") from None
    _check_depth(values)
    if isinstance(values, dict) and CHECKSUM in values:
        said = values.pop(CHECKSUM)
        if said != _checksum(values):
            raise ValueError(
                f"its checksum is not that of its values (where you changed them on purpose, delete the line "
                f'"{CHECKSUM}")'
            )
    return values


def plain_json(value: Any) -> Any:
    """`value` as JSON can write it: what is not finite becomes null, what is no plain value its text."""
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return str(value)


def _checksum(values: Mapping[str, Any]) -> str:
    """Of the values, however they are laid out in the file."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is not finite")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text[:40]}{'...' * (len(text) > 40)} has more than 64 bits")
    return int(text)


def _check_depth(values: Any) -> None:
    level = [values]
    for _ in range(DEEPEST):
        containers = [each for each in level if isinstance(each, (dict, list))]
        if not containers:
            return
        level = [part for each in containers for part in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(f"brackets are nested more than {DEEPEST} deep")


def sync_folder(folder: Path) -> None:
    """Forces a renaming itself to the disk, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

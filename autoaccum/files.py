"""Files that are written whole or not at all."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["PARTIAL", "sync_folder", "whole_file", "write_json"]

PARTIAL = ".tmp"  # what the name of a half-written file ends in; it begins with a dot


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write: at `path` once the block has ended well, and on the disk; else what was there before stays.

    Written beside it under a name of its own, so that several processes may write at once: the last one counts.

    Raises:
        OSError: it cannot be written there.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the disk's own error is the one to tell
            partial.unlink()
        raise
    sync_folder(path.parent)


def write_json(path: Path, values: Any) -> None:
    """Plain values as JSON in a file, whole or not at all.

    Raises:
        OSError: it cannot be written there.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode("utf-8"))


def sync_folder(folder: Path) -> None:
    """Forces a renaming itself to the disk, where the system lets a folder be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

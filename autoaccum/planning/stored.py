"""A plan as plain JSON values and in a file: reading checks every value's kind, writing is whole or not at all."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from autoaccum.checks import typed
from autoaccum.errors import PlanError, shown
from autoaccum.files import read_json, write_json
from autoaccum.planning.plan_fields import PlanFields

__all__ = ["SCHEMA", "read_file", "read_values", "write_file"]

SCHEMA = 1
_LONGEST_PATH = 1000  # characters that a message repeats


def read_values(data: Any) -> dict[str, Any]:
    """A plan's fields out of what was JSON; where an object holds the plan under "plan", out of that."""
    if isinstance(data, Mapping) and isinstance(data.get("plan"), Mapping):
        data = data["plan"]
    if not isinstance(data, Mapping):
        raise PlanError(f"a plan is a JSON object, and this is a {type(data).__name__}: give what Plan.to_dict wrote")
    if data.get("schema") != SCHEMA or isinstance(data["schema"], bool):
        raise PlanError(
            f"this plan has schema {data.get('schema')!r:.40}, and this version of autoaccum reads schema {SCHEMA}: "
            "make the plan anew, or use the version that wrote it"
        )
    # A plan that was written before a field came has that field's default.
    data = {each.name: each.default for each in fields(PlanFields) if each.default is not MISSING} | {**data}
    missing = [each.name for each in fields(PlanFields) if each.name not in data]
    if missing:
        raise PlanError(f"this plan lacks {', '.join(missing)}: make it anew with autoaccum.plan")
    values = {}
    for each in fields(PlanFields):
        try:
            values[each.name] = typed(data[each.name], each.type)
        except (TypeError, OverflowError) as error:
            raise PlanError(f"this plan's {each.name} is {data[each.name]!r:.80}, not {error}: make it anew") from None
    return values


def read_file(path: Path) -> Any:
    """The JSON value in a file; a PlanError where it cannot be read, or is not JSON."""
    try:
        return read_json(path)
    except OSError as error:
        why = error.strerror or str(error)
        raise PlanError(f"the plan {_named(path)} cannot be read: {why}; give a file saved by Plan.save") from error
    except ValueError as error:  # not UTF-8, not JSON, out of bounds, or of another checksum
        raise PlanError(f"the plan {_named(path)} is damaged: {error}; make it anew and save it again") from error


def write_file(path: Path, values: Mapping[str, Any]) -> None:
    """The values as JSON in the file, whole or not at all, which is a PlanError."""
    try:
        write_json(path, values, checksum=True)
    except OSError as error:
        why = error.strerror or str(error)
        raise PlanError(
            f"the plan cannot be saved at {shown(str(path))}: {why}; choose a folder that exists and is writable"
        ) from error


def _named(path: Path) -> str:
    """The path whole, as people look for it; the beginning of what is too long to be one."""
    text = str(path)
    return text if len(text) < _LONGEST_PATH and text.isprintable() else shown(text)

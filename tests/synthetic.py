"""Traces written by hand: a script of operators with what they allocate and free -> memory.trace.Trace.

    play([("mm", "+a", 400), ("relu", "+b", 100), ("", "-a", 0), ("mark", "optimizer", 0)])

Consecutive entries of one name are one call; a name ending in "'" is another call of the same operator.
"""

from collections.abc import Iterable
from typing import Any

from autoaccum.memory.cuda_history import NO_OPERATOR, RawEvent
from autoaccum.memory.trace import Trace, assemble

__all__ = ["play"]

Entry = tuple[str, str, int]


def play(script: Iterable[Entry], *, earlier: bool = False, **extra: Any) -> Trace:
    """The trace of a script: ("operator", "+block", bytes), ("operator", "-block", any), ("mark", name, any).

    An operator "backward: name" was called by autograd's engine; "" is outside of any operator.
    """
    found: list[RawEvent] = []
    marks: list[tuple[int, str]] = []
    addresses: dict[str, int] = {}
    held: dict[str, int] = {}
    call, last = 0, ""
    for time, (name, what, size) in enumerate(script):
        if name == "mark":
            marks.append((time, what))
            continue
        call += name != last
        last = name
        plain = name.rstrip("'").removeprefix("backward: ")
        sign, block = what[0], what[1:]
        held.setdefault(block, size)
        if sign == "+":
            held[block] = size
        address = addresses.setdefault(block, len(addresses) + 1)
        found.append(
            RawEvent(
                time,
                size if sign == "+" else -held[block],
                address,
                call if name else -1,
                plain,
                plain or NO_OPERATOR,
                name.startswith("backward: "),
            )
        )
    return assemble(found, marks, earlier=earlier, **extra)

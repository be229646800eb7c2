"""What counts as out of memory, as a table.

An error is judged by its type and by its message, together with the errors it was raised from: a library that
catches an allocation error and raises its own has still run out of memory. Only `RuntimeError`s are read, for they
are what PyTorch and the libraries below it raise; a `ValueError` that mentions memory is somebody's argument check.

Three answers are about memory, in falling certainty; the fourth bounds the size for another reason:

- SURELY: the words or the type say so.
- PERHAPS: libraries report a failed allocation as an internal error, but report other faults so too. Believe it only
  where memory was near the budget and a smaller size succeeds; otherwise raise the error as it is.
- GRID: a launch grid, an index or one buffer is too large, whatever is free: no size above this one can run.
- NO: anything else. Among these are the errors that poison the device's context (`poisons`): every later call in the
  process fails too, so that nothing can be learnt from trying again there.
"""

import enum
import errno
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch

from autoaccum.errors import AutoaccumError

__all__ = ["RULES", "Rule", "Verdict", "out_of_memory", "poisons", "unusable"]


class Verdict(enum.Enum):
    """What an error says about memory; see the top of this file."""

    SURELY = "out of memory"
    PERHAPS = "perhaps out of memory"
    GRID = "too large, whatever is free"
    NO = "not about memory"


class Rule(NamedTuple):
    """One row of the table: a message that matches `pattern` (any case, anywhere in it) means `verdict`."""

    verdict: Verdict
    pattern: str
    source: str


# Read before anything else: the message of a poisoned context may quote an allocation, too.
_POISON = (
    Rule(Verdict.NO, r"device-side assert", "CUDA and HIP: an index or a label out of range in a kernel"),
    Rule(Verdict.NO, r"illegal memory access|illegal address|misaligned address", "CUDA and HIP: a faulty kernel"),
    Rule(Verdict.NO, r"illegal instruction|unspecified launch failure|launch timed out", "CUDA and HIP: a dead kernel"),
    Rule(Verdict.NO, r"uncorrectable|ERROR_DEVICE_LOST", "a failed memory cell; XPU: the driver lost the device"),
)

# Read from the top: the first row that matches decides.
RULES = (
    *_POISON,
    Rule(Verdict.SURELY, r"out[ _]of[ _]memory", "every backend, and NCCL, that says it in words"),
    Rule(Verdict.SURELY, r"ErrorOutOfMemory|ErrorMemoryAllocation", "the names of CUDA's and HIP's error codes"),
    Rule(Verdict.SURELY, r"out[ _]of[ _](device|host)[ _]memory", "XPU: Level Zero and Unified Runtime"),
    Rule(Verdict.SURELY, r"ALLOC(ATION)?_FAILED|StatusAllocFailed", "cuBLAS, cuSOLVER, cuFFT, cuDNN, hipBLAS, MIOpen"),
    Rule(Verdict.SURELY, r"DefaultCPUAllocator: can't allocate memory", "PyTorch on a POSIX host"),
    Rule(Verdict.SURELY, r"DefaultCPUAllocator: not enough memory", "PyTorch on Windows"),
    Rule(Verdict.SURELY, r"bad_alloc|bad allocation", "C++, as GCC and MSVC name it"),
    Rule(Verdict.SURELY, r"unable to mmap.*cannot allocate memory", "PyTorch: a tensor shared between processes"),
    Rule(Verdict.GRID, r"invalid configuration argument", "CUDA and HIP: more blocks than a grid can have"),
    Rule(Verdict.GRID, r"32-?bit ?index ?math", "kernels that index with 32 bits"),
    Rule(Verdict.GRID, r"storage size calculation overflowed", "a tensor of more than 2**63 bytes"),
    Rule(Verdict.GRID, r"invalid buffer size", "MPS: one buffer larger than Metal allows"),
    Rule(Verdict.GRID, r"supported by the MPS backend.*2\*\*32|dims larger than INT_MAX", "MPS: 32-bit sizes"),
    Rule(Verdict.PERHAPS, r"CUDNN_STATUS_(NOT_SUPPORTED|INTERNAL_ERROR|EXECUTION_FAILED)", "cuDNN without a workspace"),
    Rule(Verdict.PERHAPS, r"unable to find an engine", "cuDNN, when every engine's workspace is too large"),
    Rule(Verdict.PERHAPS, r"(CUBLAS|CUSOLVER|CUSPARSE)_STATUS_NOT_INITIALIZED", "a handle that found no memory"),
    Rule(Verdict.PERHAPS, r"could not (create|execute) a (primitive|memory)", "oneDNN, whatever the reason was"),
    Rule(Verdict.PERHAPS, r"ERROR_OUT_OF_RESOURCES", "XPU: registers, or memory"),
)
_COMPILED = tuple((rule, re.compile(rule.pattern, re.IGNORECASE | re.DOTALL)) for rule in RULES)

# A user's Ctrl-C during the handling of an allocation error is still Ctrl-C, and our own errors say what they mean.
_NEVER = (AutoaccumError, KeyboardInterrupt, SystemExit, GeneratorExit)


def out_of_memory(error: BaseException) -> Verdict:
    """What `error`, or an error that it was raised from, says about memory.

    The outermost error that says anything decides, but a poisoned context anywhere in the chain means NO.
    """
    if isinstance(error, _NEVER):
        return Verdict.NO
    rows = [_judge(link) for link in _chain(error)]
    if any(rule in _POISON for _, rule in rows):
        return Verdict.NO
    return next((verdict for verdict, _ in rows if verdict is not Verdict.NO), Verdict.NO)


def poisons(error: BaseException) -> bool:
    """Whether `error` leaves the device's context unusable, so that only another process can go on with it."""
    return any(_judge(link)[1] in _POISON for link in _chain(error))


def unusable(error: BaseException, then: str) -> str:
    """An error that `poisons`, in our words; `then` says how to go on."""
    said = next(str(link).splitlines()[0] for link in _chain(error) if _judge(link)[1] in _POISON)
    return (
        f"the device can no longer be used by this process ({said[:200]}), and everything on it is lost. An index or a "
        f"label out of range is the usual cause; CUDA_LAUNCH_BLOCKING=1 in the environment shows where. {then}"
    )


def _judge(error: BaseException) -> tuple[Verdict, Rule | None]:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return Verdict.SURELY, None
    if isinstance(error, OSError):
        # A fork or a mapping that failed: the size of the whole process counts there, not that of the batch alone.
        return (Verdict.PERHAPS if error.errno == errno.ENOMEM else Verdict.NO), None
    if isinstance(error, RuntimeError):
        message = str(error)
        for rule, pattern in _COMPILED:
            if pattern.search(message):
                return rule.verdict, rule
    return Verdict.NO, None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, then what Python would print above it: its cause, or else its context unless that was suppressed."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)

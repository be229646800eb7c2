"""SIGKILL to one rank or to all of a sharded training in the middle of a save, then the same call again.

Each trial is one training of two forked ranks over gloo. One of them, or both, are killed at a random moment of a save,
and as often as not again after they resumed. Who is left must end by itself, and soon. Then the training is left to
come to its end, which must be bit for bit that of one that nobody disturbed.
"""

import gc
import hashlib
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from tests.shards_saved import came_to, prepared
from tests.shards_work import grouped
from tests.torture.kills import Result

__all__ = ["run"]

RANKS, SAVES = 2, 6
PATIENCE = 60.0  # seconds that a rank has to see that another one is gone
SAVE = 0.1  # seconds that a save takes, and the window after it


def run(count: int, seed: int = 0) -> Result:
    """`count` trainings, one after another, each killed at least once."""
    chance, result, began = random.Random(seed), Result(), time.perf_counter()
    import torch.distributed.checkpoint
    import torch.distributed.fsdp  # noqa: F401  # here too, so that each child finds them loaded

    gc.freeze()  # a collection of garbage would copy all of this into each child
    with tempfile.TemporaryDirectory(prefix="autoaccum-kills-") as name:
        place = Path(name)
        wanted = _left_alone(place, None)
        if _left_alone(place, place / "saved") != wanted:
            result.failures.append("saving changes the training")
        while result.trials < count:
            _trial(wanted, place, chance, result)
    result.seconds = time.perf_counter() - began
    return result


def _trial(wanted: str, place: Path, chance: random.Random, result: Result) -> None:
    folder = place / f"run-{result.trials}"
    killed = 0
    while killed == 0 or (killed < 3 and chance.random() < 0.5):
        earlier = _half_written(folder)
        children = _forked(place, folder)
        _wait_for_save(folder, children, chance.randint(1, SAVES - 1), earlier)
        time.sleep(chance.uniform(0.0, SAVE))
        doomed = chance.choice([children, children[:1], children[1:]])
        for child in doomed:
            os.kill(child, signal.SIGKILL)
        statuses = [_ended(child) for child in children]
        if None in statuses:
            result.failures.append(f"rank {statuses.index(None)} waits for one that was killed")
        if any(status is not None and os.WIFSIGNALED(status) for status in statuses):
            killed += 1
            result.in_a_save += any(folder.glob(".*.tmp"))
            result.before_the_first += not any(folder.glob("step-*"))
        else:
            shutil.rmtree(folder)  # it came to its end before that: begin again, so that something is left to kill
    result.trials += 1
    result.kills += killed
    got = _left_alone(place, folder)
    if got == wanted:
        result.same += 1
    else:
        result.failures.append(f"killed {killed} times: another end ({got[-2000:]})")
    shutil.rmtree(folder)


def _half_written(folder: Path) -> set[Path]:
    return set(folder.glob(".step-*.tmp"))


def _wait_for_save(folder: Path, children: list[int], number: int, earlier: set[Path]) -> None:
    """Returns when so many saves have begun beside the `earlier` ones, when no more come, or the ranks have ended."""
    begun, deadline = set(earlier), time.monotonic() + PATIENCE
    while len(begun) - len(earlier) < number and time.monotonic() < deadline:
        before = len(begun)
        begun |= _half_written(folder)
        if len(begun) > before:
            deadline = time.monotonic() + 10 * SAVE
        if all(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) for child in children):
            return
        time.sleep(0.001)


def _left_alone(place: Path, folder: Path | None) -> str:
    """What both ranks of a training come to that nobody disturbs: a digest, alike on both."""
    for child in _forked(place, folder):
        if _ended(child) is None:
            return "a rank did not come to its end"
    answers = [(place / f"answer-{rank}").read_text() for rank in range(RANKS)]
    return answers[0] if len(set(answers)) == 1 else "the ranks end apart: " + " | ".join(answers)


def _forked(place: Path, folder: Path | None) -> list[int]:
    """The processes of the ranks, which meet in a folder of their own."""
    meeting = tempfile.mkdtemp(dir=place)
    return [_fork(rank, meeting, folder, place / f"answer-{rank}") for rank in range(RANKS)]


def _fork(rank: int, meeting: str, folder: Path | None, answer: Path) -> int:
    child = os.fork()
    if child:
        return child
    warnings.simplefilter("ignore")
    try:
        with grouped(rank, RANKS, meeting):
            loop = prepared(folder)
            loop.run()
            found = came_to(loop)
            values = [found["records"], [tensor.tolist() for tensor in found["tensors"]]]
        text = hashlib.sha256(pickle.dumps(repr(values))).hexdigest()
    except BaseException:  # the child's end: what went wrong is its answer
        text = traceback.format_exc()
    answer.write_text(text)
    sys.stderr.flush()
    os._exit(0)


def _ended(child: int) -> int | None:
    """The child's status; None, and an end, where it has not ended after all."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

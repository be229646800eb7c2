"""Ranks on this machine, started by torchrun's own launcher: each calls a function, and gives back what it returns."""

import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from autoaccum.cli.command import Ended
from autoaccum.errors import ProbeError

__all__ = ["on_ranks"]

_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")  # for which the launcher puts handlers of its own


def on_ranks(number: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(*arguments)` returns in each of `number` new processes, which find each other as under torchrun.

    `work`, what it takes and what it returns can be pickled; it raises nothing. A ProbeError where a process was
    killed; a signal that ends this one has ended the others first.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=number, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=0, monitor_interval=0.1, start_method="spawn",
    )  # fmt: skip
    try:
        with _quiet_and_put_back():
            answers: dict[int, Any] = elastic_launch(config, _rank)(work, *arguments)
            return [answers[rank] for rank in range(number)]
    except SignalException as error:
        raise KeyboardInterrupt if error.sigval == signal.SIGINT else Ended(error.sigval) from None
    except ChildFailedError as error:
        raise ProbeError(_lost({rank: failure.exitcode for rank, failure in error.failures.items()})) from error


def _rank(work: Callable[..., Any], *arguments: Any) -> Any:
    """What each process calls. Ctrl-C ends it at once: its answer would wait for a launcher that no longer reads."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return work(*arguments)


@contextmanager
def _quiet_and_put_back() -> Iterator[None]:
    """The launcher's own log is silent inside, its workers have a thread each, and signals are as before at the end."""
    log, before = logging.getLogger("torch.distributed.elastic"), logging.root.manager.disable
    own = threading.current_thread() is threading.main_thread()
    handlers = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in _SIGNALS} if own else {}
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does for several ranks
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        for number, handler in handlers.items():
            signal.signal(number, handler)
        log.handlers.clear()


def _lost(codes: dict[int, int]) -> str:
    rank, code = next(iter(codes.items()))
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended by itself with exit code {code}"
    why = ", as the system does where memory runs out: give memory= a budget" if code == -signal.SIGKILL else ""
    return f"the process of rank {rank} {how}, outside of what can be answered for{why}"

"""Optuna, imported on use: `import autoaccum` and a plain training never need it."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from autoaccum.errors import MissingExtraError

__all__ = ["hushed", "optuna"]


class _OnUse:
    """The module, imported when something of it is first asked for; a MissingExtraError where it is not installed."""

    def __getattr__(self, name: str) -> Any:
        try:
            import optuna
        except ImportError as error:
            raise MissingExtraError("optuna", "search", "A search") from error
        return getattr(optuna, name)


optuna: Any = _OnUse()


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without Optuna's lines about each trial (the search tells its own), nor its notices of what is experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)

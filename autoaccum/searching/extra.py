"""Optuna, imported on use, and what its versions 4 and 5 do differently.

Choices:
- Nothing here imports Optuna when it is loaded: `import autoaccum` and a plain training never need it.
- Optuna's notices of experimental arguments are silenced where these are set, and nowhere else.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from autoaccum.errors import MissingExtraError, SetupError, shown

__all__ = ["CONSTRAINT", "hushed", "load_optuna", "make_pruner", "mark_infeasible", "quiet", "says_ended"]

CONSTRAINT = "autoaccum.constraint"  # the trial attribute that stands for a constraint under Optuna 4
# Where "once" looks, in parts of the budget. Among good settings a later value says little more about the last one than
# an early one does, and every look gives up some that would have won: so there is one look, and an early one, where
# fewer need to be given up for the same saving. One in so many goes on; as a sampler that learns draws better
# and better ones, about two in five of a whole search do.
EARLY, BEST = 1 / 9, 4


def load_optuna() -> Any:
    """The module `optuna`.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "search", "A search") from error
    return optuna


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's notices that an argument is experimental."""
    optuna = load_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without Optuna's own lines about each trial: the search has its table."""
    logging = load_optuna().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def says_ended(error: BaseException) -> bool:
    """Whether a storage refused to change a trial because it has ended."""
    return isinstance(error, load_optuna().exceptions.UpdateFinishedTrialError)


def mark_infeasible(trial: Any) -> None:
    """Tells the sampler that this setting cannot be had at all, which is worse than any value."""
    trial.set_user_attr(CONSTRAINT, 1.0)
    if hasattr(trial, "set_constraint"):
        trial.set_constraint("memory", 1.0)


def make_pruner(pruner: Any, amount: int) -> Any:
    """The pruner over a budget of `amount` samples (or milliseconds).

    "once" looks at each trial a single time, at a ninth of the budget, and lets it go on where it is among the best
    quarter of those that have come so far; the best of them always does. "none" prunes nothing.

    Raises:
        SetupError: an unknown name, or something that is no pruner.
    """
    optuna = load_optuna()
    if isinstance(pruner, optuna.pruners.BasePruner):
        return pruner
    if pruner is None or pruner == "none":
        return optuna.pruners.NopPruner()
    if pruner == "once":
        return _once(max(1, int(EARLY * amount)))
    raise SetupError(
        f'pruner={shown(pruner)}: choose "once" or "none", or give a pruner of Optuna\'s, such as '
        "optuna.pruners.MedianPruner()"
    )


def _once(rung: int) -> Any:
    """The pruner that looks at each trial at its first report from `rung` on, and never again."""
    base: Any = load_optuna().pruners.BasePruner

    class Once(base):  # type: ignore[misc]  # the base is known when Optuna is loaded, and not before
        """One look at each trial."""

        def prune(self, study: Any, trial: Any) -> bool:
            own = _from(rung, trial)
            if len(own) != 1:
                return False
            states = load_optuna().trial.TrialState  # those that failed may run again, and would count twice
            trials = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.RUNNING))
            others = [_from(rung, other)[:1] for other in trials if other.number != trial.number]
            values = [value for found in others for value in found]
            sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
            better = sum(sign * value < sign * own[0] for value in values)
            return better >= max(1, (len(values) + 1) // BEST)

    return Once()


def _from(rung: int, trial: Any) -> list[float]:
    """What a trial reported from `rung` on, in order."""
    return [value for amount, value in sorted(trial.intermediate_values.items()) if amount >= rung]

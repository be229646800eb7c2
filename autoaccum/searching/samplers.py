"""What draws a trial's parameters, and what ends a weak trial early.

Each trial has a sampler of its own, by the number that the storage gave it. A number is handed out once, over all
processes and machines: no two trials are drawn alike, and a restart changes nothing.

The best-known settings of Optuna 5 (multivariate TPE that counts running trials) are set by name, so that a search is
alike under versions 4 and 5; how wide TPE's kernels are is each version's own. The first trial has the setup's own
values: on landscapes fitted to 660 trainings of the search's example, that alone brings the best of 30 trials 4% lower.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

from autoaccum.errors import SetupError, shown
from autoaccum.searching.extra import optuna

__all__ = ["ByNumber", "check_sampler", "make_pruner", "mark_infeasible"]

CONSTRAINT = "autoaccum.constraint"  # the trial attribute that stands for a constraint under Optuna 4
# Where "once" looks, in parts of the budget. Among good settings a later value says little more about the last one than
# an early one does, and every look gives up some that would have won: so there is one look, and an early one, where
# fewer need to be given up for the same saving. One in so many goes on; as a sampler that learns draws better
# and better ones, about two in five of a whole search do.
EARLY, BEST = 1 / 9, 4


def check_sampler(sampler: Any, storage: Any, *, trusted: bool) -> None:
    """Refuses what is no sampler, and one that would run what stands in a study as code.

    `trusted`: whether the user trusts all who can write to the storage with this account.
    """
    samplers, inner = optuna.samplers, sampler
    while inner is not None and not isinstance(inner, samplers.CmaEsSampler):
        inner = getattr(inner, "_base_sampler", None)
    if inner is not None and not trusted and not isinstance(storage, optuna.storages.InMemoryStorage):
        raise SetupError(
            f"sampler={type(sampler).__name__}() unpickles what stands in the study: what anybody has put there would "
            "run as your own code. Use another sampler, or where you trust everybody who can write to the storage, "
            "your own journal file too, say trust_storage=True (--trust-storage)"
        )
    if sampler not in (None, "tpe") and not isinstance(sampler, samplers.BaseSampler):
        raise SetupError(
            f"sampler={shown(sampler)}: leave it out for TPE, or give a sampler of Optuna's, such as "
            "optuna.samplers.RandomSampler(seed=0)"
        )


class ByNumber:
    """Draws each trial by a sampler of its own, which follows from the trial's number.

    One of Optuna's has generators that go on from where they are as long as no other process draws a trial in between;
    then, and after a restart, they are set anew. With TPE, the default, `first` is what the first trial has; the rest
    of its parameters is drawn, as a third of all (5 to 10) at random.
    """

    def __init__(self, sampler: Any, *, seed: int, n_trials: int, first: Mapping[str, Any]) -> None:
        self._given, self._seed, self._n_trials, self._first = sampler, seed, n_trials, first
        self._following = 0

    def ask(self, study: Any) -> Any:
        """A trial of the study, waiting or new."""
        self._study, study.sampler = study, self
        return study.ask()

    def before_trial(self, filtered: Any, trial: Any) -> None:
        """Makes way for the trial's own sampler: Optuna asks for this before it draws anything."""
        self._study.sampler = self._of(trial.number)
        self._study.sampler.before_trial(filtered, trial)

    def _of(self, number: int) -> Any:
        if isinstance(self._given, optuna.samplers.BaseSampler):
            if number != self._following:
                self._given.reseed_rng()  # else it would draw what another process has drawn from the same seed
            self._following = number + 1
            return self._given
        settings: dict[str, Any] = {
            "seed": int.from_bytes(hashlib.sha256(f"{self._seed}:{number}".encode()).digest()[:4], "big"),
            "n_startup_trials": max(5, min(10, self._n_trials // 3)),
            "multivariate": True,
            "constant_liar": True,
        }
        if not hasattr(optuna.trial.Trial, "set_constraint"):
            settings["constraints_func"] = lambda trial: (float(trial.user_attrs.get(CONSTRAINT, -1.0)),)
        tpe = optuna.samplers.TPESampler(**settings)
        return tpe if number > 0 or not self._first else optuna.samplers.PartialFixedSampler(dict(self._first), tpe)


def mark_infeasible(trial: Any) -> None:
    """Tells the sampler that this setting cannot be had at all, which is worse than any value."""
    trial.set_user_attr(CONSTRAINT, 1.0)
    if hasattr(trial, "set_constraint"):
        trial.set_constraint("memory", 1.0)


def make_pruner(pruner: Any, amount: int) -> Any:
    """The pruner over a budget of `amount` samples (or milliseconds).

    "once" looks at each trial a single time, at a ninth of the budget, and lets it go on where it is among the best
    quarter of those that have come so far; the best of them always does. "none" prunes nothing.
    """
    if isinstance(pruner, optuna.pruners.BasePruner):
        return pruner
    if pruner is None or pruner == "none":
        return optuna.pruners.NopPruner()
    if pruner == "once":
        return _Once(max(1, int(EARLY * amount)))
    raise SetupError(
        f'pruner={shown(pruner)}: choose "once" or "none", or give a pruner of Optuna\'s, such as '
        "optuna.pruners.MedianPruner()"
    )


class _Once:
    """Looks at each trial at its first report from an amount of `rung` on, and never again."""

    def __init__(self, rung: int) -> None:
        self._rung = rung

    def _late(self, trial: Any) -> list[float]:
        return [value for amount, value in sorted(trial.intermediate_values.items()) if amount >= self._rung]

    def prune(self, study: Any, trial: Any) -> bool:
        """Whether to give the trial up."""
        own = self._late(trial)
        if len(own) != 1:
            return False
        states = optuna.trial.TrialState  # those that failed may run again, and would count twice
        trials = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.RUNNING))
        values = [value for other in trials if other.number != trial.number for value in self._late(other)[:1]]
        sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
        better = sum(sign * value < sign * own[0] for value in values)
        return better >= max(1, (len(values) + 1) // BEST)

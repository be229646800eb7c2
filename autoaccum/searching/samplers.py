"""What draws a trial's parameters, and what ends a weak trial early.

Each trial has a sampler of its own, by the number that the storage gave it. A number is handed out once, over all
processes and machines: no two trials are drawn alike, and a restart changes nothing.

The best-known settings of Optuna 5 (multivariate TPE that counts running trials) are set by name, so that a search is
alike under versions 4 and 5; how wide TPE's kernels are is each version's own. The first trial has the setup's own
values: on landscapes fitted to 660 trainings of the search's example, that alone brings the best of 30 trials 4% lower.
"""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from autoaccum.errors import SetupError, shown
from autoaccum.searching.extra import load_optuna

__all__ = ["ask", "check_sampler", "make_pruner", "mark_infeasible", "sampler_of"]

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
    optuna, inner = load_optuna(), sampler
    while inner is not None and not isinstance(inner, optuna.samplers.CmaEsSampler):
        inner = getattr(inner, "_base_sampler", None)
    if inner is not None and not trusted and not isinstance(storage, optuna.storages.InMemoryStorage):
        raise SetupError(
            f"sampler={type(sampler).__name__}() unpickles what stands in the study: what anybody has put there would "
            "run as your own code. Use another sampler, or where you trust everybody who can write to the storage, "
            "your own journal file too, say trust_storage=True (--trust-storage)"
        )
    if sampler not in (None, "tpe") and not isinstance(sampler, optuna.samplers.BaseSampler):
        raise SetupError(
            f"sampler={shown(sampler)}: leave it out for TPE, or give a sampler of Optuna's, such as "
            "optuna.samplers.RandomSampler(seed=0)"
        )


def sampler_of(sampler: Any, *, seed: int, n_trials: int, first: Mapping[str, Any]) -> Callable[[int], Any]:
    """The sampler for the trial of a number, as a function.

    One of Optuna's has generators that go on from where they are as long as no other process draws a trial in between;
    then, and after a restart, they are set anew. With TPE, the default, `first` is what the first trial has; the rest
    of its parameters is drawn, as a third of all (5 to 10) at random.
    """
    optuna, following = load_optuna(), 0

    def own(number: int) -> Any:
        nonlocal following
        if number != following:
            sampler.reseed_rng()  # else it would draw once more what another process has drawn from the same seed
        following = number + 1
        return sampler

    def tpe(number: int) -> Any:
        settings: dict[str, Any] = {
            "seed": int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4], "big"),
            "n_startup_trials": max(5, min(10, n_trials // 3)),
            "multivariate": True,
            "constant_liar": True,
        }
        if not hasattr(optuna.trial.Trial, "set_constraint"):
            settings["constraints_func"] = lambda trial: (float(trial.user_attrs.get(CONSTRAINT, -1.0)),)
        made = optuna.samplers.TPESampler(**settings)
        return made if number > 0 or not first else optuna.samplers.PartialFixedSampler(dict(first), made)

    return own if isinstance(sampler, optuna.samplers.BaseSampler) else tpe


def ask(study: Any, sampler: Callable[[int], Any]) -> Any:
    """A trial of the study, waiting or new, whose parameters `sampler(its number)` draws."""
    base: Any = load_optuna().samplers.RandomSampler

    class ByNumber(base):  # type: ignore[misc]  # the base is known when Optuna is loaded, and not before
        """Makes way for the trial's own sampler: Optuna asks for this before it draws anything."""

        def before_trial(self, filtered: Any, trial: Any) -> None:
            study.sampler = sampler(trial.number)
            study.sampler.before_trial(filtered, trial)

    study.sampler = ByNumber()
    return study.ask()


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
    pruners = load_optuna().pruners
    if isinstance(pruner, pruners.BasePruner):
        return pruner
    if pruner is None or pruner == "none":
        return pruners.NopPruner()
    if pruner == "once":
        return _once(max(1, int(EARLY * amount)))
    raise SetupError(
        f'pruner={shown(pruner)}: choose "once" or "none", or give a pruner of Optuna\'s, such as '
        "optuna.pruners.MedianPruner()"
    )


def _once(rung: int) -> Any:
    """The pruner that looks at each trial at its first report from `rung` on, and never again."""
    base: Any = load_optuna().pruners.BasePruner

    def late(trial: Any) -> list[float]:
        return [value for amount, value in sorted(trial.intermediate_values.items()) if amount >= rung]

    class Once(base):  # type: ignore[misc]  # the base is known when Optuna is loaded, and not before
        """One look at each trial."""

        def prune(self, study: Any, trial: Any) -> bool:
            own = late(trial)
            if len(own) != 1:
                return False
            states = load_optuna().trial.TrialState  # those that failed may run again, and would count twice
            trials = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED, states.RUNNING))
            values = [value for other in trials if other.number != trial.number for value in late(other)[:1]]
            sign = 1.0 if study.direction.name == "MINIMIZE" else -1.0
            better = sum(sign * value < sign * own[0] for value in values)
            return better >= max(1, (len(values) + 1) // BEST)

    return Once()

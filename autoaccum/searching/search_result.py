"""What a search found, and the file of it that `autoaccum fit --plan` takes: best.json.

From there the best value comes out the same to the last digit where hardware and versions are the same: the generators
are seeded before the setup as in the search, and on a CPU as many threads add up the numbers.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from autoaccum.checks import plain, typed
from autoaccum.display.shown import Drawn
from autoaccum.errors import AutoaccumError, NothingFitsError, PlanError
from autoaccum.files import read_json
from autoaccum.planning.plan import Plan
from autoaccum.planning.plan_fields import write_file
from autoaccum.planning.split import whole
from autoaccum.searching.extra import hushed, optuna
from autoaccum.searching.job import Job
from autoaccum.searching.recipe import Recipe
from autoaccum.searching.study import ERROR, OUTCOME, RETRY, TRAINING
from autoaccum.searching.study_trial import FIT
from autoaccum.searching.worker import best_trial, weights_of

__all__ = ["SearchResult", "best_arguments", "result_of", "rows_of"]

SCHEMA = 1
MOST_THREADS = 1024  # PyTorch dies of many more, without a word


@dataclass(frozen=True)
class SearchResult(Drawn):
    """What a search found.

    Attributes:
        best_params: of the best complete trial.
        best_value: its metric.
        best_plan: the plan that it trained with.
        trials: one dict a trial: number, state ("complete", "pruned", "does not fit", "diverged", "error", "running",
            "killed"), value, params, samples, seconds, target_batch, accumulation_steps, micro_batch, lr (as trained
            with), memory_bytes, error, reports ([amount, value]).
        study: Optuna's study; None on all ranks but the first of a group.
        metric, direction, unit: what was searched on, which way, and what reports are counted in.
        best_number: of the best trial.
        weights: the file of the best trial's weights; None where it was trained on another machine.
        arguments: of fit, beside the setup's, with which the best trial was trained: lr, seed, max_steps and the like.
        seed: set before each call of the setup.
        threads: that PyTorch used; another number may change the last digits of the value on a CPU.
        dashboard: the command that shows the study in a browser; None where the storage has no address.
    """

    best_params: dict[str, Any]
    best_value: float
    best_plan: Plan
    trials: tuple[dict[str, Any], ...] = field(repr=False)
    study: Any = field(repr=False)
    metric: str = "loss"
    direction: str = "minimize"
    unit: str = "samples"
    best_number: int = 0
    weights: Path | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    threads: int = 1
    dashboard: str | None = None

    _view = "search_view"

    @cached_property
    def importance(self) -> dict[str, float]:
        """How much each parameter mattered, summing to 1; empty where that cannot be said, as of too few trials.

        By PED-ANOVA, when it is first asked for: what Optuna imports for it takes seconds.
        """
        trials = () if self.study is None else self.study.get_trials(deepcopy=False)
        done = [trial for trial in trials if trial.state.name == "COMPLETE"]
        if len(done) < 4 or len({trial.value for trial in done}) < 2:
            return {}
        importance = optuna.importance
        with hushed():
            try:
                found = importance.get_param_importances(self.study, evaluator=importance.PedAnovaImportanceEvaluator())
            except (ValueError, RuntimeError):  # no parameter that all trials have, or none that varies
                return {}
        return {name: float(share) for name, share in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON: everything but the study."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "study"}
        weights = None if self.weights is None else str(self.weights)
        return plain({**values, "importance": self.importance, "weights": weights})  # type: ignore[no-any-return]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the best plan with its parameters as JSON, whole or not at all: `autoaccum fit TARGET --plan path`.

        Raises:
            PlanError: it cannot be written there.
        """
        values = {
            "schema": SCHEMA,
            "plan": self.best_plan.to_dict(),
            "params": self.best_params,
            "fit": self.arguments,
            "value": self.best_value,
            **{name: getattr(self, name) for name in ("seed", "threads", "metric", "direction")},
            "trial": self.best_number,
            "trials": len(self.trials),
            "weights": None if self.weights is None else str(self.weights),
        }
        write_file(Path(path), values)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the trials' values in their order, the parameters' importance, and values over batch and rate.

        Raises:
            MissingExtraError: matplotlib is not installed.
            SetupError: it cannot write that format.
        """
        from autoaccum.display.plots import search_plot

        search_plot(self.to_dict(), path)


def best_arguments(path: str | os.PathLike[str], setup: Callable[..., Mapping[str, Any]]) -> dict[str, Any] | None:
    """fit's arguments for the training that a search found best; sets the number of threads where it runs on a CPU.

    None where the file is a plan alone, or cannot be read, which `fit` will say. A PlanError where it was saved by a
    search and is damaged, a SetupError where the setup does not fit to it.
    """
    try:
        values = read_json(Path(path))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or "params" not in values:
        return None
    try:
        seed = whole("seed", values.get("seed"), -(2**63), 2**64 - 1)
        threads = whole("threads", values.get("threads"), 1, MOST_THREADS)
        for name in ("params", "fit"):
            typed(values.get(name), dict[str, bool | float | str | None])
        if not set(values["fit"]) <= set(FIT):  # whose values `fit` itself looks at
            raise TypeError(f"no more than {', '.join(FIT)}")
    except (PlanError, TypeError) as error:
        raise PlanError(
            f"{path}: the search's result is damaged in its params, fit, seed or threads ({error}); save it anew "
            "(SearchResult.save, search --save)"
        ) from error
    recipe = Recipe(setup, seed)
    recipe.check_names(values["params"])
    arguments = recipe.build(values["params"], whole=True)
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    arguments.pop("target_batch", None)  # the plan's
    if "max_steps" in values["fit"]:
        arguments.pop("epochs", None)
    return {**arguments, **values["fit"], "plan": os.fspath(path)}


def rows_of(study: Any) -> tuple[dict[str, Any], ...]:
    """The trials of a study as plain values; without those that made way for others."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name != "WAITING"]
    return tuple(_row(trial) for trial in trials if trial.user_attrs.get(OUTCOME) not in ("void", "interrupted"))


def _row(trial: Any) -> dict[str, Any]:
    attributes = trial.user_attrs
    facts = attributes.get(TRAINING) or {}
    made = facts.get("plan") or {}
    reports = sorted(trial.intermediate_values.items())
    return {
        "number": trial.number,
        "state": _state(trial.state.name, str(attributes.get(OUTCOME) or "")),
        "value": trial.value if trial.state.name == "COMPLETE" else reports[-1][1] if reports else None,
        "params": dict(trial.params),
        "samples": facts.get("samples") or (reports[-1][0] if reports else 0),
        "seconds": None if trial.duration is None else trial.duration.total_seconds(),
        **{name: made.get(name) for name in ("target_batch", "accumulation_steps", "micro_batch", "lr")},
        "memory_bytes": facts.get("memory_bytes"),
        "repeats": (attributes.get(RETRY) or {}).get("of"),
        "error": attributes.get(ERROR),
        "reports": [[amount, value] for amount, value in reports],
    }


def _state(name: str, outcome: str) -> str:
    if name == "FAIL":
        return "error" if outcome == "error" else "killed"
    if name == "PRUNED":
        return next((word for word in ("does not fit", "diverged") if outcome.startswith(word)), "pruned")
    return name.lower()


def result_of(study: Any, job: Job, dashboard: str | None) -> SearchResult:
    """The result of a study in which at least one trial came to its end.

    Raises:
        NothingFitsError: nothing fits in any of the settings tried.
        AutoaccumError: no trial came to its end.
    """
    rows, best = rows_of(study), best_trial(study)
    if best is None:
        words = [row["state"] for row in rows]
        if words and all(word == "does not fit" for word in words):
            last = next(t.user_attrs[OUTCOME] for t in study.get_trials(deepcopy=False) if OUTCOME in t.user_attrs)
            raise NothingFitsError(f"nothing fits in any of the {len(words)} settings tried; the first: {last}")
        counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)) or "none"
        raise AutoaccumError(
            f"no trial came to its end, so there is no best one ({counts}): look at the trials' errors in the study, "
            "lower the learning rates in the space, or give more trials"
        )
    facts: Mapping[str, Any] = best.user_attrs[TRAINING]
    arguments, file = dict(facts["fit"]), weights_of(job.folder, best)
    if job.unit == "ms":  # the steps that its time was enough for
        arguments["max_steps"] = facts["steps"]
        arguments.pop("epochs", None)
    return SearchResult(
        best_params=dict(best.params),
        best_value=float(best.value),
        best_plan=Plan.from_dict(facts["plan"]),
        trials=rows,
        study=study,
        metric=job.metric,
        direction=job.direction,
        unit=job.unit,
        best_number=best.number,
        weights=file if file.exists() else None,
        arguments=arguments,
        seed=job.recipe.seed,
        threads=int(facts["threads"]),
        dashboard=dashboard,
    )

"""A search as each of its workers gets it, settled from one call of the setup before the first trial.

Trials are compared at the same number of samples seen, whatever their batch. So a budget is counted in samples: given
as such, or what the setup's own epochs come to. A budget in seconds compares at equal time instead.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from autoaccum.checks import misfit
from autoaccum.data.source import Source, open_source
from autoaccum.errors import AutoaccumError, SetupError, shown
from autoaccum.model.optimizer import DEFAULT_LR
from autoaccum.planning.plan import Plan
from autoaccum.searching.extra import hushed, optuna
from autoaccum.searching.recipe import Recipe
from autoaccum.searching.space import Space, read_space, samples_in

__all__ = [
    "ERRORS_BELIEVED",
    "TRAIN_LOSS",
    "Job",
    "check_targets",
    "default_space",
    "read_budget",
    "sample_arguments",
    "settle",
    "steps_for",
]

TRAIN_LOSS = "train_loss"
ERRORS_BELIEVED = 5  # a setup that fails so often before anything else is not tried on
_TIMES = {"s": 1, "sec": 1, "min": 60, "h": 3600}
_AROUND = 10.0  # the learning rate is looked for this many times above and below the one given


@dataclass(frozen=True)
class Job:
    """A search; can be pickled where the setup can.

    Attributes:
        recipe, space: what is called, and what is drawn.
        metric, direction: the evaluation's name that is searched on, or "train_loss"; "minimize" or "maximize".
        amount, unit: what a whole trial takes, in "samples" or "ms".
        given: whether the budget was given, instead of following from the setup's epochs.
        ceiling: the largest target batch, up to which the probe looks.
        lr_batch: the batch that learning rates are for, where the setup does not say.
        n_trials, storage, study_name, sampler, pruner: as `search` got them; the storage where it was left out too.
        folder: of the run.
        first: the setup's own values of what is searched: the first trial has them.
        workers: how many share the machine.
        threads, device, memory: a worker's part of it; the last (bytes) two where the setup says nothing.
    """

    recipe: Recipe
    space: Space
    metric: str
    direction: str
    amount: int
    unit: str
    given: bool
    ceiling: int
    lr_batch: int | None
    n_trials: int
    storage: Any
    study_name: str
    sampler: Any
    pruner: Any
    folder: Path
    first: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 1
    threads: int = 1
    device: str | None = None
    memory: int | None = None

    def comparable(self) -> dict[str, Any]:
        """What two searches must agree in for their values to be comparable."""
        own = {name: getattr(self, name) for name in ("direction", "metric", "amount", "unit")}
        return {"space": self.space.describe(), "seed": self.recipe.seed, **own}


def check_targets(targets: Any) -> tuple[int, ...]:
    """The target batches to choose from, each once; a SetupError where one is not a whole number above 0."""
    found = targets if isinstance(targets, Sequence) and not isinstance(targets, str) else (targets,)
    if not found:
        raise SetupError(f"target_batch={shown(targets)}: give whole numbers above 0, such as (64, 128, 256)")
    return tuple(dict.fromkeys(samples_in("target_batch", each) for each in found))


def read_budget(budget: Any) -> tuple[int, str]:
    """The amount and its unit: samples, or milliseconds for a text such as "90s"; a SetupError for all else."""
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget, "samples"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|min|h)\s*", budget) if isinstance(budget, str) else None
    if match is None or float(match[1]) <= 0:
        raise SetupError(
            f'budget={shown(budget)}: give the samples that a trial trains on, such as 50_000, or a time such as "90s"'
        )
    return round(1000 * float(match[1]) * _TIMES[match[2]]), "ms"


def default_space(arguments: Mapping[str, Any], targets: tuple[int, ...]) -> Space:
    """The learning rate, over its logarithm around the one given, and the target batch.

    A SetupError where an optimizer was made already.
    """
    if isinstance(arguments.get("optimizer"), Optimizer):
        raise SetupError(
            "the setup returns an Optimizer instance, whose learning rate cannot be searched: return its class or a "
            'factory under "optimizer", or give a space without "lr"'
        )
    rate = float(arguments.get("lr") or DEFAULT_LR)
    return read_space({"lr": (rate / _AROUND, rate * _AROUND, "log"), "target_batch": list(targets)})


def sample_arguments(recipe: Recipe, space: Space | None) -> dict[str, Any]:
    """fit's arguments from one call of the setup, with parameters of the space where it cannot do without."""
    if space is None or (space.function is None and misfit(recipe.setup) is None):
        return recipe.build({})
    with hushed():
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=recipe.seed % 2**32))
    for _ in range(ERRORS_BELIEVED):  # a few settings may fail, as a few trials may
        params: dict[str, Any] = {}
        try:
            params = space.suggest(study.ask())
            recipe.check_names(params)
            return recipe.build(params)
        except AutoaccumError:
            raise
        except Exception as error:
            last = error
    raise SetupError(
        f"the setup {recipe.name} failed with all of the {ERRORS_BELIEVED} settings tried before the search, the last "
        f"one ({params}) with {type(last).__name__}: {last}. Mend the setup, or narrow the space"
    ) from last


def settle(
    recipe: Recipe, space: Space, arguments: Mapping[str, Any], targets: tuple[int, ...], metric: str, budget: Any
) -> dict[str, Any]:
    """A Job's metric, budget and sizes; a SetupError where nothing reports the metric, or says the budget."""
    _check_metric(arguments, metric)
    for name in {"epochs", "max_steps"} & space.parts.keys():
        raise SetupError(
            f"space has {name!r}, but trials are compared at the same number of samples: give budget= instead"
        )
    source = open_source(arguments["data"], shuffle=True, seed=recipe.seed)
    own, searched = arguments.get("target_batch"), space.largest("target_batch")
    if searched is None and own is None:
        raise SetupError(
            "every trial needs a target batch: search it (target_batch in space), give target_batch= beside the space, "
            "or have the setup return one"
        )
    ceiling = max(targets) if space.function is not None else searched or check_targets(own)[0]
    amount, unit = (_amount(arguments, source), "samples") if budget is None else read_budget(budget)
    if unit == "ms" and arguments.get("schedule", "constant") != "constant":
        raise SetupError(
            f"budget={shown(budget)} is a time, and schedule={arguments['schedule']!r} must know its last step: give "
            "the budget in samples"
        )
    says_rate = arguments.get("lr_batch") is not None or source.loader_batch is not None
    return {
        "metric": metric if arguments.get("val_data") is not None else TRAIN_LOSS,
        "amount": amount,
        "unit": unit,
        "given": budget is not None or arguments.get("max_steps") is not None,
        "ceiling": ceiling,
        "lr_batch": None if says_rate or isinstance(arguments.get("optimizer"), Optimizer) else own or targets[0],
    }


def _check_metric(arguments: Mapping[str, Any], metric: str) -> None:
    """Refuses, with a SetupError, a metric that nothing reports."""
    held_out = arguments.get("val_data") is not None
    names = ["loss", TRAIN_LOSS, *((arguments.get("metrics") or {}) if held_out else ())]
    if metric not in names and not (held_out and arguments.get("step")):  # a step may return terms of any name
        missing = "metrics" if held_out else "metrics, and val_data, on which they are measured"
        raise SetupError(
            f"metric={shown(metric)} is not reported: there are {', '.join(names)}; add it to the setup's {missing}"
        )


def _amount(arguments: Mapping[str, Any], source: Source) -> int:
    """Samples of the setup's own training."""
    steps, own = arguments.get("max_steps"), arguments.get("target_batch")
    if steps is None and source.length is not None:
        return source.length * int(arguments.get("epochs") or 1)
    if steps is not None and own is not None:
        return int(steps) * int(own)
    raise SetupError(
        "a stream without a length has no epochs to count, and max_steps is another number of samples for every target "
        "batch: give budget= in samples, such as budget=50_000"
    )


def steps_for(made: Plan, amount: int, length: int | None) -> int:
    """Optimizer steps until `amount` samples were seen, short last windows of epochs counted as they are."""
    sizes = [] if length is None else list(made.windows.sizes(length))
    if not sizes:  # where data gives no window the loop says what is wrong
        return -(-amount // made.target_batch)
    epochs, rest = divmod(amount, sum(sizes))
    return epochs * len(sizes) + bisect_left(list(accumulate(sizes, initial=0)), rest)

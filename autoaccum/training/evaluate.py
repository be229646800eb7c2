"""The loss and the metrics over held-out data, as means over all of it: Σ numerators / Σ denominators.

A mean over nothing is NaN: where all targets are ignored there is no loss, and 0 would look like the best one. Of a
loss of several terms those count that are over something, as in training.

There is no graph, but for models that differentiate inside their forward, to give forces for example: their first batch
says so by an error, and is run again. Running out of memory here halves validation's own micro-batch, and leaves the
training's plan alone.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.data import tree
from autoaccum.data.source import Source, data_facts
from autoaccum.data.windows import Window, windows
from autoaccum.errors import DataError, NothingFitsError, SetupError, shown
from autoaccum.interrupts import interruptible, uninterrupted
from autoaccum.loss.mean import Mean, Sum
from autoaccum.loss.objective import Objective
from autoaccum.memory.budget import Device
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.model.precision import Precision
from autoaccum.planning.plan import plan
from autoaccum.planning.split import even_split
from autoaccum.random_state import RandomState
from autoaccum.ranks import Ranks
from autoaccum.window.passes import call
from autoaccum.window.sharded import ShardedPasses

__all__ = ["Evaluator"]

_NO_MEAN = (
    "the metric {!r} returned {}: return autoaccum.Mean(numerator, denominator), such as "
    "Mean((outputs.argmax(-1) == targets).sum(), len(targets)), or Mean(2 * tp, 2 * tp + fp + fn) for an F1; what is "
    "no such ratio (an average over classes, an AUC) is an object with reset(), update(outputs, targets) and "
    "compute(), as torchmetrics are"
)
_OVER_ALL = ("reset", "update", "compute")  # the methods of a metric over all outputs; torchmetrics has them


@dataclass
class Evaluator:
    """Evaluates a model in micro-batches of its own.

    Attributes:
        objective: gives the loss's terms, and the outputs and targets that metrics see.
        micro_batch: samples a forward pass, halved when memory runs out.
        metrics: by name, `f(outputs, targets) -> Mean`; or, for what is no mean over samples, an object with `reset()`,
            `update(outputs, targets)` and `compute() -> float`, which sees all outputs before it is asked.
        sharded: of a sharded model, whose ranks all run as many forward passes.
    """

    objective: Objective
    device: Device
    precision: Precision
    ranks: Ranks
    micro_batch: int
    source: Source | None
    metrics: Mapping[str, Any]
    sharded: ShardedPasses | None
    _with_graph: bool | None = field(default=None, init=False)  # None: not known yet

    @uninterrupted
    def evaluate(self, source: Source | None = None) -> dict[str, float]:
        """{"loss": ..., and each metric}, over `source` or the validation data.

        A DataError: no data, or not one sample of it; or a metric that returns something other than a Mean. A
        NothingFitsError: out of memory with a single sample.
        """
        chosen = source if source is not None else self.source
        if chosen is None:
            raise DataError("there is no data to evaluate: pass some, or give val_data")
        if source is not None and self.ranks.size > 1:
            self.ranks.agree("evaluate", data_facts("the data to evaluate", source), "Give every rank all of it")
        model = self.objective.model
        training, graph = [module for module in model.modules() if module.training], torch.is_grad_enabled()
        model.eval()
        if self.sharded is not None:
            self.sharded.begin("evaluate")
        try:
            run: Callable[..., dict[str, float]] = interruptible if self.sharded is None else call
            return run(self._means, chosen, "val_data" if source is None else "the data to evaluate")
        except Exception:
            self.ranks.fail()
            raise
        finally:
            if self.sharded is not None:
                self.sharded.end()
            torch.set_grad_enabled(graph)  # a no_grad() that was broken off at its end leaves it off
            for module in training:
                module.training = True

    def _means(self, source: Source, called: str) -> dict[str, float]:
        over_all = {name: metric for name, metric in self.metrics.items() if _sees_all(metric)}
        for name, metric in over_all.items():
            self._begin(name, metric)
        sums: dict[str, list[float | Tensor]] = {}
        samples, added_up = 0, set()
        for window in self._windows(source):
            samples += window.samples
            for name, mean in (item for result in self._results(window.batches) for item in result.items()):
                numerator, denominator = sums.setdefault(name, [0.0, 0.0])
                sums[name] = [numerator + mean.numerator.detach(), denominator + mean.denominator]
                if isinstance(mean, Sum):
                    added_up.add(name)
        names = sorted({*(self.metrics.keys() - over_all), *map(_term, self.objective.names), *sums})
        # A rank without a batch knows neither: the others tell it.
        samples, *flags = map(int, self.ranks.tally("evaluate", [samples, *(name in added_up for name in names)]))
        if not samples:
            raise DataError(
                f"{called} gives no samples: its DataLoader has drop_last=True, and fewer samples than a batch of "
                f"{source.loader_batch}; set drop_last=False"
                if source.drop_last
                else f"{called} gives no samples, so there is nothing to evaluate: give it some, or leave it out"
            )
        if self.ranks.size > 1 and source.length is not None and samples != source.length:
            raise DataError(
                f"{called} has {source.length} samples, and the {self.ranks.size} ranks saw {samples} of it in all: "
                "give every rank the whole of it, in one order, since each takes its own part of that"
            )
        pairs = [sums.get(name, [0.0, 0.0]) for name in names]
        totals = self.ranks.tally("evaluate", [float(value) for pair in pairs for value in pair])
        means = {
            name: top if flag else top / bottom if bottom else math.nan
            for name, flag, top, bottom in zip(names, flags, totals[::2], totals[1::2])
        }
        if "loss" not in means:
            terms = zip(names, flags, totals[1::2])
            counting = [name for name, flag, bottom in terms if name.startswith("loss/") and (flag or bottom)]
            means["loss"] = sum(means[name] for name in counting) if counting else math.nan
        return means | {name: _computed(name, metric) for name, metric in over_all.items()}

    def _begin(self, name: str, metric: Any) -> None:
        """Empties a metric over all outputs, and puts it where they are; it must say how several ranks' become one."""
        if self.ranks.size > 1 and not hasattr(metric, "sync"):
            raise SetupError(
                f"the metric {name!r} sees this rank's outputs only, of {self.ranks.size} ranks: give one that gathers "
                "them in compute(), as torchmetrics do (they have sync()), or a function that returns a Mean"
            )
        if isinstance(metric, nn.Module):
            metric.to(self.device.torch_device)
        metric.reset()

    def _windows(self, source: Source) -> Iterator[Window]:
        # All ranks cut alike, by the sizes of all: a window that is cut otherwise on another rank loses samples.
        sizes = self.ranks.gather("evaluate", self.micro_batch)
        cut = plan(sizes, sum(sizes), world_size=self.ranks.size, rank=self.ranks.rank, samples=source.length)
        return windows(source, lambda: cut, 0, validates=True)

    def _results(self, batches: list[Any]) -> list[dict[str, Mean]]:
        """The means of a window's batches; where memory runs out on a rank, it cuts what it has left in half."""
        sharded, results = self.sharded, list[dict[str, Mean]]()
        while True:
            batches = [
                piece for batch in batches
                for piece in tree.split(batch, even_split(tree.batch_size(batch), self.micro_batch))
            ]  # fmt: skip
            done, ran_out = len(results), False
            try:
                if sharded is None:
                    for batch in batches:
                        results.append(self._forward(batch))
                else:
                    passes = max(self.ranks.gather("evaluate", len(batches)))
                    take = lambda batch: results.append(self._without_trace(batch))  # noqa: E731
                    sharded.run(batches, passes, take, self._forward_of_nothing)
            except Exception as error:
                if out_of_memory(error) is not Verdict.SURELY:
                    raise
                ran_out = True  # what follows is done outside: the error's traceback holds tensors
            if not (ran_out if sharded is None else self.ranks.any("evaluate", ran_out)):
                return results
            batches = batches[len(results) - done :]
            if ran_out:
                self.device.release()
                if self.micro_batch == 1:
                    raise NothingFitsError(
                        "validation ran out of memory with a single sample; the training's plan is untouched"
                    )
                self.micro_batch = (self.micro_batch + 1) // 2

    @torch.no_grad()
    def _forward_of_nothing(self, sample: Any) -> None:
        with self.precision.autocast():
            self.objective.forward(tree.move(sample, self.device.torch_device))

    def _forward(self, batch: Any) -> dict[str, Mean]:
        """The means of one forward pass. The first one tells whether it needs a graph."""
        before = RandomState(self.device.torch_device) if self._with_graph is None else None
        try:
            means = self._without_trace(batch)
        except RuntimeError as error:
            if before is None or "does not require grad" not in str(error):
                raise
            before.restore()
            self._with_graph = True
            return self._without_trace(batch)
        self._with_graph = bool(self._with_graph)
        return means

    @torch.no_grad()
    def _without_trace(self, batch: Any) -> dict[str, Mean]:
        known = self.objective.denominators(batch)  # counted on the host, which waits for no device
        placed = tree.move(batch, self.device.torch_device)
        with self.precision.autocast():
            with torch.set_grad_enabled(bool(self._with_graph)):
                terms, outputs, targets = self.objective.evaluate(placed, known, graph=False)
            means = {_term(name): type(term)(term.numerator.detach(), term.denominator) for name, term in terms.items()}
            if self._with_graph and self.metrics:
                outputs = tree.map_tensors(Tensor.detach, outputs)
            # Those over all outputs last, and never a second time: after an error nobody knows what they have counted
            # already. Want of memory is such an error too.
            for name, metric in sorted(self.metrics.items(), key=lambda item: _sees_all(item[1])):
                if not _sees_all(metric):
                    means[name] = metric(outputs, targets)
                    if not isinstance(means[name], Mean):
                        raise DataError(_NO_MEAN.format(name, type(means[name]).__name__))
                    continue
                try:
                    metric.update(outputs, targets)
                except Exception as error:
                    what = f"raised {type(error).__name__} in update(outputs, targets)"
                    raise DataError(f"the metric {name!r} {what}") from error
        return means


def _sees_all(metric: Any) -> bool:
    return all(callable(getattr(metric, method, None)) for method in _OVER_ALL)


def _computed(name: str, metric: Any) -> float:
    value = metric.compute()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"the metric {name!r} gave {shown(value)} in compute(), which is not one number: average it there"
        ) from error


def check_metrics(metrics: Any, step: Any, *, val_data: Any = None) -> None:
    """Refuses what could be no metrics, by name, before an epoch is spent on them.

    `val_data` is of a training whose loss needs a target beside each input, else None: it may be plainly without
    targets.
    """
    items = isinstance(val_data, Sequence) and not isinstance(val_data, (tuple, str)) and len(val_data) > 0
    if isinstance(val_data, Tensor) or (items and isinstance(val_data[0], (Tensor, int, float))):
        raise DataError(
            f"val_data is of {type(val_data).__name__} without targets, and the loss needs one beside each input: give "
            "(inputs, targets), or samples (input, target)"
        )
    if metrics is None:
        return
    if not isinstance(metrics, Mapping):
        raise SetupError(
            f"metrics={shown(metrics)}: give a dict of functions f(outputs, targets) -> autoaccum.Mean by name"
        )
    if metrics and step is not None:
        raise SetupError(
            "metrics are given the model's outputs, and step= keeps them to itself: pass loss=f(outputs, targets) "
            "instead of step, or take metrics away"
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or name == "loss" or name.startswith("loss/"):
            raise SetupError(
                f"metrics has the name {shown(name)}: give it another, since the loss is reported under that"
            )
        if not callable(metric) and not _sees_all(metric):
            raise SetupError(
                f"metrics[{name!r}]={shown(metric)}: give a function f(outputs, targets) -> autoaccum.Mean, or an "
                "object with reset(), update(outputs, targets) and compute() for what is no mean over samples"
            )


def _term(name: str) -> str:
    """How a term of the loss is called among the results: of several "loss/main" and so on, their sum is "loss"."""
    return name if name == "loss" else f"loss/{name}"

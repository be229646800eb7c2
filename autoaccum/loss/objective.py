"""What is minimised: how a batch becomes a loss, and what that loss was divided by.

The objective says what a batch's denominators are, before the model has run where that can be known, and runs the
model and the loss.

A loss with reduction="sum" is a term that is added up and never divided. One with reduction="none" is taken as the
mean of its elements, as `.mean()` by hand would give; with a declared denominator, as their sum over that.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autoaccum.data import tree
from autoaccum.data.structure import plain
from autoaccum.errors import LossError
from autoaccum.loss.asking import Rows, device_of
from autoaccum.loss.call import Call, arrange, returned_loss, scalar, targets_in
from autoaccum.loss.compared import Compared
from autoaccum.loss.counting import holds_indices
from autoaccum.loss.coupled import Coupled, Shared, coupled_of
from autoaccum.loss.divisor import Settled, Unread
from autoaccum.loss.mean import Mean, Sum
from autoaccum.loss.misuse import check_classes, explain_loss, explain_model
from autoaccum.loss.reading import OwnMeans, Reader, Returned
from autoaccum.loss.reduction import Reduction, name_of
from autoaccum.loss.values import Values
from autoaccum.model.shards import is_sharded
from autoaccum.model.untouched import Untouched

__all__ = ["Objective"]


class Objective:
    """What is minimised: how a batch becomes a loss, and what that loss was divided by.

    Attributes:
        model: what is called; may be replaced by a wrapper of itself.
        loss, step: as the user gave them; a loss module inside a Coupled step is the loss too.
        coupled: the two halves of a loss that compares samples; None for one that is a mean.
        shared: which of the representations of `coupled` belong to no sample, as far as they were seen.
        compares: whether what is declared is held against the graph; not where a gradient check finds a fault's cause.
        prepared: the denominators of the window that was prepared last; None: only known once the loss ran.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        step: Callable[[Any, Any], Any] | None = None,
        reduction: Any = "auto",
    ) -> None:
        """Checks the settings; runs nothing.

        Args:
            model: called as the batch says (call.py).
            loss: f(outputs, targets), where the model does not return its loss.
            step: f(model, batch) -> Tensor, Mean or dict[str, Mean], instead of `loss`.
            reduction: what the loss is a mean over; a dict of those for a step with several terms.

        Raises:
            SetupError: settings that are unknown, or that contradict each other.
        """
        self.coupled = coupled_of(loss, step, reduction)
        self.shared = Shared()
        # By itself, as in validation, a batch's loss is one over its own samples, and weighs as many.
        self._reduction = Reduction(loss, step, reduction if self.coupled is None else "sample_mean")
        self.model, self.loss, self.step = model, loss, step
        if isinstance(step, Coupled) and isinstance(step.loss, nn.Module):
            self.loss = step.loss  # trained and moved with the model
        self.prepared: list[dict[str, float]] | None = None
        self.compares = self.coupled is None
        self._reader = Reader()
        self._against_graph = {name: Compared() for name in self._reduction.names}
        self._classes_checked = False  # whether labels are classes of the model's: looked at once
        self._source = "the model" if loss is None else f"loss={name_of(loss)}"

    @property
    def reason(self) -> str:
        """One line: the denominator, and why it is that. Says more once measured."""
        if self.coupled is not None:
            return (
                "compares the samples of a window, so it is computed once over all of them and divided by nothing: "
                "each micro-batch runs forward twice; validation compares the samples of one micro-batch"
            )
        found = self._reader.found if self._reduction.reads else None
        if isinstance(found, Settled):
            return f"{found.words}, as its graph says{self._reader.price}"
        if self._reduction.reads and isinstance(self._reader.found, Returned):
            return "divides by what the step's Means say"
        return self._reduction.assumed_reason(found) if isinstance(found, Unread) else self._reduction.reason

    @property
    def names(self) -> tuple[str, ...]:
        """The terms whose denominators are known before a window runs, the same on every rank."""
        return self._reader.names if self._reduction.reads else self._reduction.names

    @property
    def facts(self) -> dict[str, str]:
        """The terms, and what was read of each: alike on all ranks that have seen it."""
        found = self._reader.found if self._reduction.reads else None
        facts = {"terms": ", ".join(self.names)}
        if isinstance(found, Unread):
            facts["the loss"] = f"cannot be read: {found.why}"
        elif isinstance(found, Settled):
            facts |= {f"{name} of the loss": each.kind for name, each in zip(self.names, found.divisors)}
        return facts

    @property
    def unseen(self) -> str | None:
        """Why it cannot be seen what the loss divides by, in words; None where it was declared or seen."""
        found = self._reader.found
        if not self._reduction.reads or isinstance(found, (Settled, Returned)):
            return None
        if found is None:
            return "nothing counts in the samples that were tried, or too little"
        return found.untried if found.rule is not None else found.why

    @property
    def uncountable(self) -> str | None:
        """Why no accumulation of this loss can be right, as its values over parts of a batch show; else None."""
        found = self._reader.found
        return found.why if isinstance(found, Unread) and found.wrong else None

    @property
    def bends(self) -> bool:
        """Whether the loss is a function of a mean, as its graph says, and no mean itself."""
        return isinstance(self._reader.found, Unread) and self._reader.found.bent

    # What is known before the model runs.

    def targets(self, batch: Any) -> Any:
        """The batch's targets, where it is clear which they are; else None."""
        return targets_in(batch, apart=self.loss is not None or self.step is not None)

    def denominators(self, batch: Any) -> dict[str, float] | None:
        """What each term's mean over `batch` was divided by; None where only the step knows, once it ran.

        Args:
            batch: best on the host, where counting waits for no device.

        Raises:
            DataError: the batch does not hold what is counted.
            LossError: a declared f(batch) gave no denominator.
        """
        self.settle([batch])
        return self.counted(batch)

    def counted(self, batch: Any) -> dict[str, float] | None:
        """`denominators`, as far as they are known without running the loss on any sample."""
        return (
            self._reader.count(batch, self._reduction.count) if self._reduction.reads else self._reduction.count(batch)
        )

    def may_count(self, batch: Any) -> bool:
        """Whether anything in `batch` counts, as far as that is known before its step."""
        if self._reduction.reads and self._reader.found is None:
            return any(self._reduction.count(batch).values())
        known = self.counted(batch)
        return any(known.values()) if known is not None else self._reader.may_count(batch)

    def prepare(
        self, batches: Sequence[Any], *, rehearses: bool = False, on_phase: Callable[[str], None] = lambda phase: None
    ) -> None:
        """Finds `prepared`, the denominators of each micro-batch of a window to come; none for a rank that idles.

        None where one is only known once the loss ran; that is so on all ranks or on none. Of a loss with several
        terms all must be known before: where the batches do not say them, each micro-batch is run forward once more.

        Args:
            batches: on the host.
            rehearses: whether only the memory that the window takes matters.
            on_phase: told of a "batch" before each forward of a pass that only reads.
        """
        reader = self._reader
        self.settle(batches, rehearses=rehearses)
        if not self._reduction.reads or isinstance(reader.found, Unread) or reader.adds_up:
            self.prepared = [self.counted(batch) or {} for batch in batches]
        elif reader.names == ("loss",):
            self.prepared = None
        else:
            self.prepared = reader.ahead(batches) or self._read_ahead(batches, on_phase)

    def _read_ahead(self, batches: Sequence[Any], on_phase: Callable[[str], None]) -> list[dict[str, float]]:
        """A pass that only reads. Random generators and buffers begin the next one as they began this one."""
        if is_sharded(self.model):
            raise LossError(
                "a sharded model cannot read several denominators ahead: declare reduction={name: f(batch)}"
            )
        device = device_of(self.model)
        known = []
        with Untouched(self.model, device=device), torch.enable_grad():
            for batch in batches:
                on_phase("batch")
                terms = self.terms(tree.move(batch, device), on_host=batch)
                known.append({name: float(term.denominator) for name, term in terms.items()})
        return known

    def expected(self, batches: Sequence[Any]) -> float:
        """What a denominator that is known only afterwards will be, as far as the batches say; 0 where they do not."""
        return self._reader.expected(batches) if self._reduction.reads else 0.0

    def whole(self, name: str, total: float) -> float:
        """What a term of the whole window is divided by, of the sum of its micro-batches' denominators."""
        return self._reader.whole(name, total) if self._reduction.reads else total

    def settle(
        self,
        batches: Sequence[Any],
        most: int = 8,
        begin: Callable[[Rows], None] | None = None,
        *,
        rehearses: bool = False,
    ) -> None:
        """Finds out, where nobody declared it, what the loss divides by: on a few samples, once.

        The model is left as it was. The first count asks for it where nobody did; while nothing counts in the samples
        it was shown, the next one asks again.

        Args:
            batches: on the host.
            most: samples that may run at once.
            begin: makes the model a function of its samples alone, before it runs on those at some places.
            rehearses: whether only the memory that a step takes matters, so that few samples serve, and settle nothing.

        Raises:
            LossError: the loss is not a scalar tensor.
        """
        reader, reduction = self._reader, self._reduction
        reader.rehearses = rehearses
        if reader.found is not None or not batches or not (reduction.reads or reduction.wants_cut):
            return
        if rehearses and reader.asked:
            return  # trials are alike: what one of them does not show, none does
        if reduction.wants_cut and not holds_indices(self.targets(batches[0])):
            return
        model, device = _inner(self.model), device_of(_inner(self.model))
        owners = [owner for owner in (self.loss, self.step) if owner is not None]

        def evaluate(rows: Rows, small: Any, number: int) -> Tensor:
            with Untouched(model, *owners, device=device), torch.enable_grad():
                if begin is not None:
                    begin(rows)
                else:
                    torch.rand(number)
                return self._whole_loss(model, tree.move(small, device))

        while not reader.settle(evaluate, batches, self.targets, most, reduction.declared_counts()):
            most = most // 2  # ran out of memory: fewer samples show as much, one shows the least
        if reduction.wants_cut:
            reduction.take_cut(reader.found)

    def _whole_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of a batch, all its terms together, with its graph.

        Raises:
            OwnMeans: the step returned Means.
            LossError: the loss is not a scalar tensor.
        """
        if self.step is not None:
            return scalar(_summed(self.step(model, plain(batch))), "the step")
        loss, source, _, _ = self._loss_of(model, batch)
        return scalar(loss, source)

    # The forward.

    def terms(
        self, batch: Any, denominators: Mapping[str, float] | None = None, on_host: Any = None
    ) -> dict[str, Mean]:
        """Runs the forward, and gives the loss as its terms.

        Args:
            batch: on the model's device.
            denominators: of this batch, where they were counted before it was moved; else they are counted here.
            on_host: the batch as it was before it was moved, where it lies there as well.

        Raises:
            LossError: not a scalar, no graph, or terms other than declared.
            DataError: the batch does not fit the model's call or the loss's.
        """
        return self.evaluate(batch, denominators, on_host=on_host)[0]

    def evaluate(
        self, batch: Any, denominators: Mapping[str, float] | None = None, *, graph: bool = True, on_host: Any = None
    ) -> tuple[dict[str, Mean], Any, Any]:
        """(terms, outputs, targets) of one forward. A `step` keeps outputs and targets to itself: None.

        Targets are None as well where the batch does not say which they are. `graph`: whether the loss must have one,
        where gradients are enabled; nothing is learned from a validation loss.
        """
        if denominators is None and on_host is None:
            denominators = self.denominators(batch)
        is_read = self._reduction.reads and self._reader.reads
        if is_read and (denominators is None or torch.is_grad_enabled()):
            return self._read(batch, denominators, batch if on_host is None else on_host, graph)
        if self.step is not None:
            result = self.step(self.model, plain(batch))
            if is_read and len(self.names) > 1:  # nothing counts in it: it only had to run
                return {name: Mean.of(torch.zeros(()), 0.0) for name in self.names}, None, None
            return self._step_terms(result, denominators, graph), None, None
        loss, source, outputs, targets = self._loss_of(self.model, batch)
        assert denominators is not None  # late only where the loss is read, or with a step
        if len(denominators) > 1:
            return {name: Mean.of(loss, 0.0) for name in self.names}, outputs, targets
        ((name, denominator),) = denominators.items()
        return {name: self._term(loss, denominator, name, source, graph)}, outputs, targets

    def _read(
        self, batch: Any, known: Mapping[str, float] | None, on_host: Any, graph: bool
    ) -> tuple[dict[str, Mean], Any, Any]:
        """`evaluate`, of a loss whose divisors stand in its graph. Where gradients are off, it has one all the same."""
        values = Values() if len(self.names) > 1 else None
        with values or nullcontext():
            if self.step is not None:
                with torch.enable_grad():
                    loss, source, outputs, targets = (
                        _summed(self.step(self.model, plain(batch))),
                        "the step",
                        None,
                        None,
                    )
            else:
                off = not torch.is_grad_enabled()
                loss, source, outputs, targets = self._loss_of(self.model, batch, graph=off)
        loss = scalar(loss, source, graph=graph)
        return self._reader.terms(loss, on_host, known, {} if values is None else values.by_node), outputs, targets

    def forward(self, batch: Any) -> None:
        """Runs the model as `terms` would, a `step` included, and drops what comes: to see whether it runs."""
        if self.step is not None:
            self.step(self.model, plain(batch))
        else:
            self._outputs(self.model, arrange(batch, apart=self.loss is not None))

    def _loss_of(self, model: nn.Module, batch: Any, *, graph: bool = False) -> tuple[Any, str, Any, Any]:
        """(loss, who returned it, outputs, targets). `graph`: the loss gets one although gradients are off."""
        call = arrange(batch, apart=self.loss is not None)
        with torch.set_grad_enabled(torch.is_grad_enabled() or (graph and self.loss is None)):
            outputs = self._outputs(model, call)
        if self.loss is None:
            loss = returned_loss(outputs)
            if loss is outputs and isinstance(loss, Tensor) and loss.numel() != 1:
                raise LossError(
                    f"the model returned a tensor of shape {tuple(loss.shape)} where its loss was expected: if these "
                    "are its outputs, pass loss=f(outputs, targets), such as loss=torch.nn.CrossEntropyLoss(); a model "
                    "that returns its loss returns one number, so average it (loss.mean())"
                )
            return loss, self._source, outputs, call.targets
        torch_loss = self._reduction.torch
        with torch.set_grad_enabled(torch.is_grad_enabled() or graph):
            loss = self._compared(tree.map_tensors(_leaf, outputs) if graph else outputs, call.targets)
        if isinstance(loss, Tensor) and loss.dim() and torch_loss is not None and torch_loss.reduction == "none":
            loss = loss.sum() if self._reduction.takes_sums else loss.mean()
        return loss, self._source, outputs, call.targets

    def _outputs(self, model: nn.Module, call: Call) -> Any:
        """What the model returns for this call; what it raises is explained where it can be."""
        try:
            return model(*call.args, **call.kwargs)
        except Exception as error:
            better = explain_model(error, model, call, apart=self.loss is not None)
            if better is None:
                raise
            raise better from error

    def _compared(self, outputs: Any, targets: Any) -> Any:
        """What the loss gives for outputs and targets; what it raises is explained where it can be."""
        assert self.loss is not None
        torch_loss = self._reduction.torch
        arguments = (outputs, targets) if torch_loss is None else torch_loss.arguments(outputs, targets)
        if not self._classes_checked:
            self._classes_checked = True  # once: on an accelerator it is a wait for the device
            check_classes(outputs, targets, torch_loss)
        try:
            return self.loss(*arguments)
        except Exception as error:
            better = explain_loss(error, name_of(self.loss), outputs, targets, torch_loss)
            if better is None:
                raise
            raise better from error

    def _term(self, loss: Any, denominator: float, name: str, source: str, graph: bool) -> Mean:
        loss, adds_up = scalar(loss, source, graph=graph and denominator > 0), self._reduction.adds_up(name)
        if self.compares and not self._reduction.reads and not self._reduction.takes_sums:
            amount = float(denominator > 0) if adds_up else denominator
            self._against_graph[name].check(loss, amount, lambda: self._reduction.words(name))
        if adds_up:
            return Sum(loss, denominator)
        return Mean(loss, denominator) if self._reduction.takes_sums else Mean.of(loss, denominator)

    def _step_terms(self, result: Any, denominators: Mapping[str, float] | None, graph: bool) -> dict[str, Mean]:
        if denominators is None:
            return self._own_means(_terms_in(result), graph)
        result = _terms_in(result, self.names)
        if len(result) == 1 and self.names == ("loss",):
            result = {"loss": next(iter(result.values()))}
        if set(result) != set(denominators):
            raise LossError(
                f"the step returned the terms {', '.join(map(repr, result))}, and reduction declares "
                f"{', '.join(map(repr, denominators))}: declare each term, as reduction={_remedy(result)}"
            )
        return {name: self._declared_term(name, result[name], denominators[name], graph) for name in denominators}

    def _declared_term(self, name: str, value: Any, denominator: float, graph: bool) -> Mean:
        if not isinstance(value, Mean):
            return self._term(value, denominator, name, "the step", graph)
        own = value.denominator
        if isinstance(own, float) and not math.isclose(own, denominator, rel_tol=1e-6):
            raise LossError(
                f"the step's Mean for {name!r} says it was divided by {own:g}, and its declared reduction gives "
                f"{denominator:g} for the same batch: let both count the same, or declare none"
            )
        if self._reduction.adds_up(name):
            raise LossError(
                f"the step returned a Mean for {name!r}, and reduction='sum' says that it is added up: return the sum"
            )
        return Mean(scalar(value.numerator, "the step's Mean", graph=graph and denominator > 0), denominator)

    def _own_means(self, result: Mapping[str, Any], graph: bool) -> dict[str, Mean]:
        """What a step returned that owns its denominators."""
        if len(result) == 1 and self.names == ("loss",):
            result = {"loss": next(iter(result.values()))}
        if tuple(result) != self.names or not all(isinstance(value, Mean) for value in result.values()):
            raise LossError(
                f"the step returned {_kinds(result)}, and a Mean for each of {', '.join(map(repr, self.names))} "
                "before: return the same terms each time, with a denominator of 0 where nothing counts"
            )
        for value in result.values():
            # A tensor on a device is not waited for; where it is 0 there may be no graph either.
            counts = isinstance(value.denominator, Tensor) or value.denominator > 0
            scalar(value.numerator, "the step's Mean", graph=graph and counts)
        return dict(result)


def _summed(result: Any) -> Any:
    """What a step returned, as one loss.

    Raises:
        OwnMeans: it is made of Means.
        LossError: some of its terms are Means and some are not; or a loss stands beside terms that may be in it.
    """
    terms = _terms_in(result)
    means = [isinstance(value, Mean) for value in terms.values()]
    if means and all(means):
        raise OwnMeans(tuple(terms) if len(terms) > 1 else ("loss",))
    if len(terms) == 1:
        return next(iter(terms.values()))
    if any(means) or "loss" in terms or not terms:
        raise LossError(
            f"the step returned {_kinds(terms)}: return the one loss, and detach what is only to be looked at "
            f"(.detach()); or a Mean for each term; or declare each term's denominator, as reduction={_remedy(terms)}"
        )
    return sum(scalar(value, f"the step's term {name!r}") for name, value in terms.items())


def _kinds(terms: Mapping[Any, Any]) -> str:
    return "{" + ", ".join(f"{name!r}: {type(value).__name__}" for name, value in terms.items()) + "}"


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor as the start of a graph of its own."""
    detached = tensor.detach()
    return detached.requires_grad_() if detached.is_floating_point() or detached.is_complex() else detached


def _terms_in(result: Any, declared: Sequence[str] = ()) -> Mapping[Any, Any]:
    """The terms of the loss in what a step returned, by name.

    Beside "loss" a step may return what is no term: outputs, which are larger than one number, and figures without a
    graph. What is called a loss is one, so that a term whose mean was forgotten is refused and not left out.
    """
    if not isinstance(result, Mapping):
        return {"loss": result}
    if "loss" not in result:
        return result
    return {name: value for name, value in result.items() if name in declared or _is_term(name, value)}


def _is_term(name: Any, value: Any) -> bool:
    if isinstance(value, Mean) or name == "loss":
        return True
    return isinstance(value, Tensor) and value.requires_grad and (value.numel() == 1 or "loss" in str(name))


def _remedy(terms: Iterable[Any]) -> str:
    return "{" + ", ".join(f"{name!r}: f(batch)" for name in terms) + "}"


def _inner(model: nn.Module) -> nn.Module:
    """The model without wrappers that communicate or compile: it is asked a few questions on its own."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner

"""What is minimised: how a batch becomes a loss, and what that loss was divided by.

The objective says what a batch's denominators are, before the model has run where that can be known, and runs the
model and the loss.

A loss with reduction="sum" is a term that is added up and never divided. One with reduction="none" is taken as the
mean of its elements, as `.mean()` by hand would give; with a declared denominator, as their sum over that.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autoaccum.data import tree
from autoaccum.data.structure import plain
from autoaccum.errors import LossError
from autoaccum.loss.call import Call, arrange, returned_loss, scalar, targets_in
from autoaccum.loss.counting import holds_indices
from autoaccum.loss.coupled import Coupled, Shared, coupled_of
from autoaccum.loss.heads import measure
from autoaccum.loss.mean import Mean, Sum
from autoaccum.loss.misuse import check_classes, explain_loss, explain_model
from autoaccum.loss.reduction import Reduction, name_of

__all__ = ["Objective"]


class Objective:
    """What is minimised: how a batch becomes a loss, and what that loss was divided by.

    Attributes:
        model: what is called; may be replaced by a wrapper of itself.
        loss, step: as the user gave them; a loss module inside a Coupled step is the loss too.
        coupled: the two halves of a loss that compares samples; None for one that is a mean.
        shared: which of the representations of `coupled` belong to no sample, as far as they were seen.
        names: the terms whose denominators are known from the batch, the same on every rank.
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
        self.names = self._reduction.names
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
        return self._reduction.reason

    @property
    def assumed(self) -> bool:
        """Whether the loss is a function whose mean nobody declared, taken for one over samples."""
        return self._reduction.assumed

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
        if self._reduction.late:
            return None
        if self._reduction.wants_head:
            self.measure(batch)
        return self._reduction.count(batch)

    def window_denominators(self, batches: Sequence[Any]) -> list[dict[str, float]] | None:
        """The denominators of each micro-batch of a window, none for a rank that idles.

        None where only the step knows them; that is so on all ranks or on none.
        """
        if self._reduction.late:
            return None
        for batch in batches:
            if not self._reduction.wants_head:
                break
            self.measure(batch)
        return [self._reduction.count(batch) for batch in batches]

    def measure(self, batch: Any) -> None:
        """Finds out, where nothing else tells, how the loss counts its labels: shifted, ignored, weighted, added up.

        Runs the loss a few times on two samples of `batch`, which lies on the host, once: later calls return at once.
        The model is left as it was. The first count asks for it where nobody did.

        Raises:
            LossError: the loss is not a scalar tensor.
        """
        labels = targets_in(batch, apart=self._reduction.apart)
        if not self._reduction.wants_head or not holds_indices(labels):
            return
        model = _inner(self.model)

        def evaluate(small: Any) -> Tensor:
            if self.step is not None:  # may differentiate inside: the grad mode stays as it is
                (term,) = self._late_terms(self.step(model, plain(small)), small, graph=True).values()
                return term.value
            with torch.no_grad():
                loss, source, _, _ = self._loss_of(model, small)
            return scalar(loss, source, graph=False)

        reduction = self._reduction
        reduction.head = measure(model, batch, evaluate, apart=reduction.apart, ignore_index=reduction.ignore_index)

    # The forward.

    def terms(self, batch: Any, denominators: Mapping[str, float] | None = None) -> dict[str, Mean]:
        """Runs the forward, and gives the loss as its terms.

        Args:
            batch: on the model's device.
            denominators: of this batch, where they were counted before it was moved; else they are counted here.

        Raises:
            LossError: not a scalar, no graph, or terms other than declared.
            DataError: the batch does not fit the model's call or the loss's.
        """
        return self.evaluate(batch, denominators)[0]

    def evaluate(
        self, batch: Any, denominators: Mapping[str, float] | None = None, *, graph: bool = True
    ) -> tuple[dict[str, Mean], Any, Any]:
        """(terms, outputs, targets) of one forward. A `step` keeps outputs and targets to itself: None.

        Targets are None as well where the batch does not say which they are. `graph`: whether the loss must have one,
        where gradients are enabled; nothing is learned from a validation loss.
        """
        if denominators is None:
            denominators = self.denominators(batch)
        if self.step is not None:
            return self._step_terms(self.step(self.model, plain(batch)), batch, denominators, graph), None, None
        loss, source, outputs, targets = self._loss_of(self.model, batch)
        assert denominators is not None  # late only with a step
        ((name, denominator),) = denominators.items()
        return {name: self._term(loss, denominator, name, source, graph)}, outputs, targets

    def forward(self, batch: Any) -> None:
        """Runs the model as `terms` would, a `step` included, and drops what comes: to see whether it runs."""
        if self.step is not None:
            self.step(self.model, plain(batch))
        else:
            self._outputs(self.model, arrange(batch, apart=self.loss is not None))

    def _loss_of(self, model: nn.Module, batch: Any) -> tuple[Any, str, Any, Any]:
        """(loss, who returned it, outputs, targets)."""
        call = arrange(batch, apart=self.loss is not None)
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
        loss = self._compared(outputs, call.targets)
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
        loss = scalar(loss, source, graph=graph and denominator > 0)
        if self._reduction.adds_up(name):
            return Sum(loss, denominator)
        return Mean(loss, denominator) if self._reduction.takes_sums else Mean.of(loss, denominator)

    def _step_terms(
        self, result: Any, batch: Any, denominators: Mapping[str, float] | None, graph: bool
    ) -> dict[str, Mean]:
        if denominators is None:
            return self._late_terms(result, batch, graph)
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

    def _late_terms(self, result: Any, batch: Any, graph: bool) -> dict[str, Mean]:
        """One term at most: several whose denominators come late cannot share one gradient."""
        result = _terms_in(result)
        if len(result) != 1:
            raise LossError(
                f"the step returned {len(result)} terms ({', '.join(map(repr, result))}) whose denominators are only "
                f"known once it ran, and one gradient cannot be corrected for each: declare them, as "
                f"reduction={_remedy(result)}"
            )
        ((name, value),) = result.items()
        if not isinstance(value, Mean):
            return {name: Mean.of(scalar(value, "the step", graph=graph), float(tree.batch_size(batch)))}
        # A tensor on a device is not waited for; where it is 0 there may be no graph either.
        counts = isinstance(value.denominator, Tensor) or value.denominator > 0
        scalar(value.numerator, "the step's Mean", graph=graph and counts)
        return {name: value}


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

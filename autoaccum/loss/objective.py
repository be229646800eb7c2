"""What is minimised: how a batch becomes a loss, and what that loss was divided by.

A loss with reduction="sum" is a term that is added up and never divided. One with reduction="none" is taken as the
mean of its elements, as `.mean()` by hand would give; with a declared denominator, as their sum over that.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.data import tree
from autoaccum.data.structure import plain
from autoaccum.errors import LossError, SetupError
from autoaccum.loss.asking import SAMPLES, Rows, device_of
from autoaccum.loss.call import Call, arrange, name_of, returned_loss, scalar, targets_in
from autoaccum.loss.coupled import Coupled, coupled_of
from autoaccum.loss.divisor import Divisor
from autoaccum.loss.graph import Values
from autoaccum.loss.mean import Mean, OwnMeans, named_terms, summed
from autoaccum.loss.misuse import explain_loss, explain_model, outside_classes, raise_meant
from autoaccum.loss.reading import Reading
from autoaccum.loss.reduction import GivenLoss, declared
from autoaccum.loss.settle import settle
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.model.given_model import unwrapped
from autoaccum.model.shards import is_sharded
from autoaccum.model.snapshot import Snapshot

__all__ = ["Objective"]


class Objective:
    """What is minimised.

    Attributes:
        model: what is called.
        loss, step: as the user gave them; a loss module inside a Coupled step is the loss too.
        coupled: the two halves of a loss that compares samples; None for one that is a mean.
        shared: paths of what `coupled` encodes that belongs to no sample, as far as was seen.
        compares: whether what is declared is held against the graph; not where a gradient check finds a fault's cause.
        reading: what its terms are divided by, as far as that is known.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Any, Any], Any] | None = None,
        step: Callable[[Any, Any], Any] | None = None,
        reduction: Any = "auto",
    ) -> None:
        """Checks the settings, which are `fit`'s, and runs nothing; a SetupError where they contradict each other."""
        self.coupled = coupled_of(loss, step, reduction)
        self.shared = set[str]()
        self._given = GivenLoss(loss, step)
        # By itself, as in validation, a batch's loss is one over its own samples, and weighs as many.
        self.reading = declared(self._given, reduction if self.coupled is None else "sample_mean")
        self.model, self.loss, self.step = model, loss, step
        if isinstance(step, Coupled) and isinstance(step.loss, nn.Module):
            self.loss = step.loss  # trained and moved with the model
        self.compares = self.coupled is None
        self._asked = False  # some samples were, to find out what the loss divides by
        self._classes_checked = False  # whether labels are classes of the model's: looked at once
        self._source = "the step" if step is not None else "the model" if loss is None else f"loss={name_of(loss)}"

    @classmethod
    def told(cls, model: nn.Module) -> "Objective":
        """Of a loop of one's own, which computes each loss, and says what it divides by."""
        made = cls(model)
        made.reading = Reading({"loss": Divisor()}, "means", "divides by what the loop says")
        return made

    # What is known of the loss.

    @property
    def reason(self) -> str:
        """One line: the denominator, and why it is that. Says more once measured."""
        if self.coupled is not None:
            return (
                "compares the samples of a window, so it is computed once over all of them and divided by nothing: "
                "each micro-batch runs forward twice; validation compares the samples of one micro-batch"
            )
        return self.reading.reason

    @property
    def owners(self) -> list[Any]:
        """What may have a state of its own, beside the model."""
        return [owner for owner in (self.loss, self.step) if owner is not None]

    @property
    def modules(self) -> list[nn.Module]:
        """The model, and the loss where it is one."""
        return [owner for owner in (self.model, self.loss) if isinstance(owner, nn.Module)]

    @property
    def names(self) -> tuple[str, ...]:
        """The terms of the loss."""
        return tuple(self.reading.divisors)

    def targets(self, batch: Any) -> Any:
        """The batch's targets, where it is clear which they are; else None."""
        return targets_in(batch, apart=self.loss is not None or self.step is not None)

    # What is known of a batch before the model runs.

    def denominators(self, batch: Any) -> dict[str, float] | None:
        """What each term's mean over `batch`, best on the host, is divided by; None where only the loss knows.

        A DataError where the batch does not hold what is counted, a LossError where a declared f(batch) gave no number.
        """
        self.settle([batch])
        return self.reading.count(batch)

    def may_count(self, batch: Any) -> bool:
        """Whether anything in `batch` counts, as far as that is known before its step."""
        return any(divisor.foretold(batch) != 0 for divisor in self.reading.divisors.values())

    def prepare(
        self, batches: Sequence[Any], *, rehearses: bool = False, on_phase: Callable[[str], None] = lambda phase: None
    ) -> list[dict[str, float]] | None:
        """The denominators of each micro-batch of a window to come; none for a rank that idles.

        None where one is only known once the loss ran; that is so on all ranks or on none. Of a loss with several
        terms all must be known before: where the batches, on the host, do not say them, each is run forward once more,
        a "batch" of which `on_phase` is told. With `rehearses` only the memory that the window takes matters.
        """
        self.settle(batches, rehearses=rehearses)
        if self.reading.late and len(self.names) == 1:
            return None
        known = [each for batch in batches if (each := self.reading.count(batch)) is not None]
        return known if len(known) == len(batches) else self._read_ahead(batches, on_phase)

    def _read_ahead(self, batches: Sequence[Any], on_phase: Callable[[str], None]) -> list[dict[str, float]]:
        """A pass that only reads. Random generators and buffers begin the next one as they began this one."""
        if is_sharded(self.model):
            raise LossError("a sharded model cannot read denominators ahead: declare reduction={name: f(batch)}")
        device = device_of(self.model)
        known = []
        with Snapshot(self.model, *self.owners, device=device, parameters=False), torch.enable_grad():
            for batch in batches:
                on_phase("batch")
                terms = self.terms(tree.move(batch, device), on_host=batch)
                known.append({name: float(term.denominator) for name, term in terms.items()})
        return known

    # Finding out what nobody declared.

    def settle(
        self,
        batches: Sequence[Any],
        most: int = SAMPLES,
        begin: Callable[[Rows], None] | None = None,
        *,
        rehearses: bool = False,
    ) -> None:
        """Finds out, where nobody declared it, what the loss divides by: on a few samples, once, without a trace.

        The first count asks for it where nobody did; while nothing counts in the samples it was shown, the next asks
        again. A LossError where the loss is not a scalar tensor.

        Args:
            batches: on the host.
            most: samples that may run at once.
            begin: makes the model a function of its samples alone, before it runs on those at some places.
            rehearses: only the memory that a step takes matters: few samples serve, and settle only a step's Means.
        """
        reading = self.reading
        reading.rehearses = rehearses
        # Trials are alike: what one rehearsal does not show, none does.
        if not batches or not (reading.source == "unsettled" or reading.cuts) or (rehearses and self._asked):
            return
        if reading.cuts:
            reading.count(batches[0])  # refuses what are no labels
        self._asked = True
        found = self.look(batches, most, begin)
        if not rehearses or (found is not None and found.source == "means"):
            self.reading = reading.settled(found)

    def look(
        self, batches: Sequence[Any], most: int, begin: Callable[[Rows], None] | None = None, *, means: bool = False
    ) -> Reading | None:
        """What the loss divides by, whatever was declared, as `settle.settle` finds it.

        A step's Means say it themselves; with `means` they are read as the means that they are.
        """
        model = unwrapped(self.model)
        model = getattr(model, "_orig_mod", model)  # without what communicates or compiles
        device = device_of(model)

        def evaluate(rows: Rows, small: Any, number: int) -> Tensor:
            with Snapshot(model, *self.owners, device=device, parameters=False), torch.enable_grad():
                if begin is not None:
                    begin(rows)
                else:
                    torch.rand(number)
                result, _, _ = self._run(model, tree.move(small, device))
                return scalar(result if self.step is None else summed(result, means=means), self._source)

        most = min(most, max(map(tree.batch_size, batches)))
        while True:
            try:
                self.reading.singly = most == 1
                return settle(evaluate, batches, self.targets, most, self.reading.cuts)
            except OwnMeans as own:
                return Reading({name: Divisor() for name in own.names}, "means", "divides by what the step's Means say")
            except Exception as error:
                if most == 1 or out_of_memory(error) is not Verdict.SURELY:
                    raise
            most //= 2  # fewer samples show as much, one shows the least

    # The forward.

    def terms(
        self, batch: Any, denominators: Mapping[str, float] | None = None, on_host: Any = None
    ) -> dict[str, Mean]:
        """The terms of the loss, as `evaluate` gives them."""
        return self.evaluate(batch, denominators, on_host=on_host)[0]

    def evaluate(
        self, batch: Any, denominators: Mapping[str, float] | None = None, *, graph: bool = True, on_host: Any = None
    ) -> tuple[dict[str, Mean], Any, Any]:
        """(terms of the loss, outputs, targets) of one forward; None for what a step keeps to itself or nobody knows.

        Args:
            batch: on the model's device.
            denominators: of this batch, where they were counted before it was moved; else they are counted here.
            graph: whether the loss must have one, where gradients are enabled; nothing is learned in validation.
            on_host: the batch as it was before it was moved, where it lies there as well.

        Raises:
            LossError: not a scalar, no graph, or terms other than declared.
            DataError: the batch does not fit the model's call or the loss's.
        """
        if denominators is None and on_host is None:
            denominators = self.denominators(batch)
        counted = batch if on_host is None else on_host
        reading, several = self.reading, len(self.reading.divisors) > 1  # which only the graph tells apart
        reads = reading.source in ("graph", "unsettled") and (
            denominators is None or several or torch.is_grad_enabled()
        )
        if denominators is None and not reads:
            denominators = reading.count(counted)
        values = Values() if reads and several else None
        with values or contextlib.nullcontext():
            result, outputs, targets = self._run(self.model, batch, graph=reads)
        if self.step is None:
            returned = {"loss": result}
        else:
            named = reading.source in ("declared", "means")
            returned = named_terms(result, self.names) if named else {"loss": summed(result)}
        if reads:
            loss = scalar(returned["loss"], self._source, graph=graph)
            seen = {} if values is None else values.by_node
            return reading.read(loss, counted, denominators, seen), outputs, targets
        known = denominators or dict.fromkeys(returned)  # a step's Means say their own
        terms = {
            name: reading.counted(name, value, known[name], self._source, graph=graph, checks=self.compares)
            for name, value in returned.items()
        }
        return terms, outputs, targets

    def forward(self, batch: Any) -> None:
        """Runs the model as `terms` would, a `step` included, and drops what comes: to see whether it runs."""
        if self.step is not None:
            self.step(self.model, plain(batch))
        else:
            self._outputs(self.model, arrange(batch, apart=self.loss is not None))

    def _run(self, model: nn.Module, batch: Any, *, graph: bool = False) -> tuple[Any, Any, Any]:
        """(loss, outputs, targets). `graph`: the loss gets one although gradients are off."""
        off = graph and not torch.is_grad_enabled()
        if off and self.loss is None:
            with torch.enable_grad():
                return self._run(model, batch)
        if self.step is not None:
            return self.step(model, plain(batch)), None, None
        call = arrange(batch, apart=self.loss is not None)
        outputs = self._outputs(model, call)
        if self.loss is None:
            return returned_loss(outputs), outputs, call.targets
        if off:
            with torch.enable_grad():
                return self._compared(tree.map_tensors(_leaf, outputs), call.targets), outputs, call.targets
        return self._compared(outputs, call.targets), outputs, call.targets

    def _outputs(self, model: nn.Module, call: Call) -> Any:
        """What the model returns for this call; what it raises is explained where it can be."""
        try:
            return model(*call.args, **call.kwargs)
        except Exception as error:
            raise_meant(error, explain_model(error, model, call, apart=self.loss is not None))
            raise

    def _compared(self, outputs: Any, targets: Any) -> Any:
        """What the loss gives for outputs and targets; what it raises is explained where it can be."""
        given = self._given
        arguments = given.arguments(outputs, targets)
        if not self._classes_checked and isinstance(targets, Tensor) and targets.device.type not in ("cpu", "meta"):
            # Once, as it waits for the device, whose use by this process torch ends for a label that is no class.
            self._classes_checked = True
            if (wrong := outside_classes(outputs, targets, given)) is not None:
                raise SetupError(wrong)
        try:
            loss = given.loss(*arguments)
        except Exception as error:
            raise_meant(error, explain_loss(error, given, outputs, targets))
            raise
        if isinstance(loss, Tensor) and loss.dim() and given.reduction == "none":
            return loss.sum() if self.reading.gives_sums else loss.mean()
        return loss


def _leaf(tensor: Tensor) -> Tensor:
    """The tensor as the start of a graph of its own."""
    detached = tensor.detach()
    return detached.requires_grad_() if detached.is_floating_point() or detached.is_complex() else detached

"""A person's own loop over a window: what it gives, as micro-batches cut by the plan, and what it must leave out.

To step, zero or clip in the middle of a window, as such a loop did before, trains on something else than the window's
gradient, and nothing else would tell: it is seen, and refused. A model that is wrapped to meet the other ranks in each
backward pass meets them at the window's end.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from autoaccum.data import tree
from autoaccum.data.per_sample import ListReader
from autoaccum.data.structure import alike, children
from autoaccum.errors import LossError, SetupError
from autoaccum.loss.divisor import WAITS, near
from autoaccum.loss.graph import Term
from autoaccum.planning.learning_rate import number
from autoaccum.planning.plan import Plan
from autoaccum.planning.split import even_split

__all__ = ["Divisors", "OwnLoop", "micro_batches", "without_synchronisation"]

_OURS = "the accumulator divides, clips, steps and zeroes when the loop over accumulator.window(...) ends"
_NO_MEAN_OVER_SAMPLES = (
    "it is no mean over samples: pass backward(loss, denominator), what its mean divides by, or several such terms as "
    "one; to weigh micro-batches by their samples all the same, pass these"
)


class OwnLoop:
    """Watches one: the size of its windows; and its optimizer, and one gradient that it will step with, in them.

    Attributes:
        lists: reads what lists in its batches hold.
        divisors: holds what its losses divide by against its samples.
    """

    def __init__(self, plan: Plan, optimizer: Optimizer, *, warns: bool) -> None:
        """Registers nothing yet; `warns` of what the plan asks for that is left to the loop: rate and memory saver."""
        self._optimizer, self._wanted = optimizer, {plan.target_batch, plan.usual_window}
        self._others, self._told = 0, False  # windows in a row that are not the target
        self._seen: tuple[nn.Parameter, Tensor, int] | None = None
        self.lists, self.divisors = ListReader(), Divisors(plan.world_size, "samples run", _NO_MEAN_OVER_SAMPLES)
        rates = {float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups if "lr" in group}
        left = []
        if plan.lr and plan.lr_scale != 1 and not any(math.isclose(plan.lr, rate, rel_tol=1e-6) for rate in rates):
            own = ", ".join(map(number, sorted(rates)))
            left.append(f"its learning rate is {number(plan.lr)}, and the optimizer's {own}: set that in its groups")
        if plan.ladder is not None:
            left.append(f"its micro-batches fit under ladder={plan.ladder!r}: have the model run so, or train with fit")
        if left and warns:
            warnings.warn(f"a plan changes nothing in a loop of your own: {'; '.join(left)}", stacklevel=3)

    def opens(self, samples: int) -> None:
        """A window of so many over all ranks begins: one short one may end an epoch, two in a row are warned of."""
        self.divisors.open()
        target = max(self._wanted)
        self._others = 0 if samples in self._wanted else self._others + 1 + (samples > target)
        if self._others > 1 and not self._told:
            self._told = True
            warnings.warn(
                f"windows hold {samples} samples, and the plan's target is {target}: give window() batches of that",
                stacklevel=3,
            )

    @contextmanager
    def inside(self, steps: Callable[[], bool]) -> Iterator[None]:
        """The window's micro-batches run inside; a SetupError where the optimizer is stepped there.

        `steps`: whether the accumulator itself does, as in the backward pass under `step_in_backward`.
        """

        def refuse(optimizer: Any, args: Any, kwargs: Any) -> None:
            if not steps():
                raise SetupError(f"optimizer.step() was called inside a window: leave it out, since {_OURS}")

        handle = self._optimizer.register_step_pre_hook(refuse)
        try:
            yield
        finally:
            handle.remove()
            self._seen = None

    def note(self) -> None:
        """A backward pass of the accumulator's has ended."""
        own = (parameter for group in self._optimizer.param_groups for parameter in group["params"])  # not all of them
        first = next((parameter for parameter in own if parameter.grad is not None), None)
        self._seen = None if first is None or first.grad is None else (first, first.grad, first.grad._version)

    def check(self) -> None:
        """A SetupError where the gradient is not what that pass left."""
        if self._seen is not None:
            parameter, gradient, version = self._seen
            if parameter.grad is not gradient or gradient._version != version:
                raise SetupError(
                    "the gradients were changed between two backward passes of a window: leave out "
                    f"optimizer.zero_grad() and clipping in it, since {_OURS}"
                )


class Divisors:
    """Holds what a loss divides by against what its micro-batches are weighed by; of no window yet.

    Args:
        ranks: how many there are. A single one's windows may differ in length, and only those of one window are
            compared; over several the other windows show what this one's on other ranks have.
        weighed_by: what micro-batches are weighed by, and what to do where a loss divides by something else.
    """

    def __init__(self, ranks: int, weighed_by: str, remedy: str) -> None:
        self._ranks, self._weighed_by, self._remedy = ranks, weighed_by, remedy
        self._first: dict[int, tuple[float, float]] = {}  # by term: a divisor, and what counts in its micro-batch
        self._waited = 0  # for divisors that lie on a device

    def open(self) -> None:
        """A window begins."""
        if self._ranks == 1:
            self._first.clear()

    def check(self, terms: Sequence[Term], count: float) -> None:
        """A LossError where the terms of a micro-batch in which so much counts divide neither by a constant, nor in
        proportion to that, or add up.
        """
        for place, term in enumerate(terms if count else ()):
            if term.is_sum:
                raise LossError(f'a term with reduction="sum" adds up, so that {self._remedy}')
            if isinstance(term.divisor, Tensor) and term.divisor.device.type != "cpu":
                self._waited += 1
                if self._waited > WAITS:
                    continue
            own = 0.0 if term.divisor is None else abs(float(term.divisor))
            first, counted = self._first.setdefault(place, (own, count))
            if not near(own, first) and not near(own * counted, first * count):
                raise LossError(
                    f"the loss divides by {own:g} where {count:g} {self._weighed_by}, and by {first:g} where "
                    f"{counted:g} do, so that {self._remedy}"
                )


def adds_up(terms: Sequence[Term]) -> bool:
    """Whether a loss is a sum over its samples: one of torch's says so, and no term beside it is divided."""
    sums = all(term.is_sum or (term.name == "Sum" and not term.divided) for term in terms)
    return sums and any(term.is_sum for term in terms)


def micro_batches(batches: Any, plan: Plan, lists: ListReader) -> list[Any]:
    """The micro-batches of one window on this rank.

    Args:
        batches: one batch, or a list of micro-batches of one structure; an empty list where this rank has no samples.
        plan: its limit cuts the batch; a SetupError where a micro-batch is larger.
        lists: reads what lists in them hold, alike for all windows.
    """
    limit = plan.limits[plan.rank]
    # A DataLoader gives lists as well, of the parts of one batch: these differ, as micro-batches do not.
    if isinstance(batches, list) and (not batches or (children(batches[0]) is not None and alike(batches))):
        pieces = [lists.read(batch) for batch in batches]
        largest = max(map(tree.batch_size, pieces), default=0)
        if largest > limit:
            raise SetupError(
                f"window() was given a list of {len(batches)} micro-batches, the largest of {largest} samples, and "
                f"the plan's limit is {limit}: pass smaller ones; or, if the list is one batch, pass it as a tuple"
            )
        return pieces
    batch = lists.read(batches)
    return tree.split(batch, even_split(tree.batch_size(batch), limit, minimum=plan.minimum))


@contextmanager
def without_synchronisation(model: nn.Module) -> Iterator[None]:
    """A forward and a backward pass of a DistributedDataParallel model in which it meets no other rank."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    # Its first forward shares the buffers even inside no_sync(), and a rank without samples runs no forward.
    model.require_forward_param_sync = False
    with model.no_sync():
        yield

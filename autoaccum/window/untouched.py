"""A loop of one's own that steps, zeroes or clips in the middle of a window, as it did before: seen, and refused.

Each of these trains on something else than the window's gradient, and nothing else would tell.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.errors import SetupError

__all__ = ["Untouched"]

_OURS = "the accumulator divides, clips, steps and zeroes when the loop over accumulator.window(...) ends"


class Untouched:
    """Watches an optimizer, and one gradient that it will step with, while a window is open."""

    def __init__(self, optimizer: Optimizer) -> None:
        """Registers nothing yet."""
        self._optimizer = optimizer
        self._seen: tuple[nn.Parameter, Tensor, int] | None = None

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

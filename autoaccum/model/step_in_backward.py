"""The optimizer steps each parameter inside the backward pass, as soon as its gradient is there, and frees it.

So no two gradients need be there at once. It is for windows of one micro-batch whose gradient needs nothing of the
others': no sum over micro-batches or ranks, no norm, no loss scale. Once a parameter was stepped its window cannot run
again: what goes wrong then ends the training, which can go on from its last checkpoint.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from autoaccum.errors import SetupError
from autoaccum.model.optimizer_on_host import step_apart

__all__ = ["StepInBackward"]


class StepInBackward:
    """An optimizer's parameters, and which of them were stepped.

    Attributes:
        stepped: in the last pass.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Registers nothing yet."""
        self._optimizer = optimizer
        self.stepped: set[nn.Parameter] = set()

    @contextmanager
    def on(self, begins: Callable[[], None]) -> Iterator[None]:
        """A backward pass inside steps what it gives a gradient to; `begins` is called before each step."""
        optimizer, step = self._optimizer, self._optimizer.step
        of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        self.stepped = set()

        def ready(parameter: nn.Parameter) -> None:
            if parameter in self.stepped:
                raise SetupError(
                    'a gradient came in two parts under ladder="step_in_backward", after the first was stepped: the '
                    "model runs backward passes inside the backward pass, such as checkpointing with "
                    "use_reentrant=True: give it use_reentrant=False, or choose another saver"
                )
            begins()
            step_apart(step, optimizer, of[parameter], [parameter])
            self.stepped.add(parameter)
            parameter.grad = None

        handles = [p.register_post_accumulate_grad_hook(ready) for p in of if p.requires_grad]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

"""A compiled model that keeps a part of what it would keep for its backward pass, and computes the rest again.

torch decides what that is, by its own estimate of memory and time: `torch._functorch.config.activation_memory_budget`,
from 0 (keep the inputs) to 1 (as without). What a step then takes is not what the budget says, and can be more than it
took without: all that is computed again may be there at once. It is traced, as any step.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["BUDGETS", "compiler"]

BUDGETS = {"activation_memory_budget/0.5": 0.5, "activation_memory_budget/0.2": 0.2}
"""By the saver's name."""


def compiler(backend: Any, options: dict[str, Any] | None, budget: float) -> Callable[[Any, Any], Any]:
    """A backend of torch.compile's which compiles as `backend` does, within a budget.

    One for each budget: what was compiled under another is not taken for it.
    """
    from torch._functorch import config

    inner = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    patches = {"config_patches": options} if options else {}

    def within(graph: Any, inputs: Any) -> Any:
        with config.patch(activation_memory_budget=budget):
            return inner(graph, inputs, **patches)

    return within

"""torch.compile on the model's forward, for as long as it trains: one graph for all sizes, and a word on every other.

Choices made here:

- The batch dimension is marked dynamic from the first call. Left to itself, torch compiles for the first size, and
  again at the second; a probe runs several, and a tail is another.
- Only forwards that train are compiled. Evaluation, and the few questions that a model is asked without gradients, run
  as they are: each would be one more graph, in the middle of a training.
- torch has no graph for one sample and for more: size 1 is always a graph of its own. It is compiled only where all
  micro-batches are of one sample; elsewhere a single sample that is left over runs as it is.
- What cannot be compiled runs as it is, and that is said, with the reason.
- Within an activation budget (torch._functorch.config.activation_memory_budget, from 0, keep the inputs, to 1) a part
  of what would be kept for the backward pass is computed again. What a step then takes is not what the budget says,
  and can be more than without: all that is computed again may be there at once. It is traced, as any step.
- Graphs are counted by torch's own counters, around each call.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn

from autoaccum.data import tree
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.model.forward import StandIn, standing

__all__ = ["BACKEND", "BUDGETS", "Compiled", "compiled"]

BACKEND = "inductor"
BUDGETS = {"activation_memory_budget/0.5": 0.5, "activation_memory_budget/0.2": 0.2}
"""The activation budgets by the memory saver's name."""


def compiled(model: nn.Module, tell: Callable[[str], None]) -> "Compiled | None":
    """The model's compiled forward; None, and said, where there is nothing for us to compile."""
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        tell("compile=True changes nothing, since the model is compiled already, as its owner chose")
        return None
    if isinstance(model, torch.jit.ScriptModule):
        tell("compile=True changes nothing, since a TorchScript model cannot be compiled a second time")
        return None
    return Compiled(model, tell)


class Compiled(StandIn):
    """A model's forward, compiled. The same object is put in place again and again, and keeps its graphs.

    Attributes:
        graphs: compiled so far.
        failed: why the model runs without compilation; None while it does not.
        single: whether one sample is compiled too, because there are only such micro-batches.
    """

    def __init__(self, module: nn.Module, tell: Callable[[str], None], *, backend: Any = None) -> None:
        """Compiles nothing yet.

        Args:
            module: the model.
            tell: told of each compilation and each fallback, in one line.
            backend: torch.compile's; None: its default.
        """
        super().__init__(module)
        self.graphs, self.single = 0, True
        self.failed: str | None = None
        self._tell, self._backend = tell, backend or BACKEND
        self._calls = 0
        self._budget: float | None = None
        self._compiled: dict[float | None, Callable[..., Any]] = {}  # by budget

    def within(self, budget: float) -> AbstractContextManager[None]:
        """Inside, what is compiled keeps this part of its activations."""
        return standing(self, _budget=budget)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, error, tb)
        if not self._calls and error is None:
            self._calls = 1  # said once
            self._tell("torch.compile: nothing was compiled, since the model's forward was not called: let step= call "
                       "the model itself, as model(batch)")  # fmt: skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward, compiled where it trains."""
        if self.failed is not None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.forward(*args, **kwargs)
        self._calls += 1
        size = _marked((args, kwargs))
        if size == 1 and not self.single:
            return self.forward(*args, **kwargs)
        from torch._dynamo.exc import TorchDynamoException

        before, started = _counters(), time.perf_counter()
        try:
            outputs = self._forward()(*args, **kwargs)
            self._count(before, size, time.perf_counter() - started)
            return outputs
        except TorchDynamoException as error:
            if out_of_memory(error) is not Verdict.NO:
                raise
            failure = error.with_traceback(None)
        # Without compilation; an error of the user's own, which ended the compilation, comes out as itself here.
        outputs = self.forward(*args, **kwargs)
        self.failed = _one_line(failure)
        self._tell(f"torch.compile failed, and the model runs without it: {self.failed}")
        return outputs

    def _forward(self) -> Callable[..., Any]:
        """The forward, which compiles when it is called."""
        if self._budget not in self._compiled:
            # Inductor pads matrices to sizes that a GPU likes, and guards on the batch for it: a graph for each range.
            backend = self._backend
            options: dict[str, Any] | None = {"shape_padding": False} if backend == "inductor" else None
            if self._budget is not None:
                backend, options = _within(backend, options, self._budget), None
            self._compiled[self._budget] = torch.compile(self.forward, backend=backend, options=options)
        return self._compiled[self._budget]

    def _count(self, before: Mapping[str, Counter[Any]], size: int | None, seconds: float) -> None:
        """Tells of what was compiled in a call, and of what was not."""
        now = _counters()
        graphs, frames = (now["stats"] - before["stats"])["unique_graphs"], now["frames"] - before["frames"]
        breaks = [reason for reason in now["graph_break"] if reason not in before["graph_break"]]
        without = bool(breaks) or frames["total"] > frames["ok"]
        if not frames["total"] or not (graphs or without):
            return
        self.graphs += graphs
        text = f"{graphs} graph{'s' * (graphs != 1)} at a batch of {size}, in {seconds:.1f} s; {self.graphs} in all"
        if without:
            often = "torch has compiled them as often as torch._dynamo.config lets it"
            text += f"; parts of the model run without it: {_one_line(breaks[0]) if breaks else often}"
        self._tell(f"torch.compile: {text}")


def _within(backend: Any, options: dict[str, Any] | None, budget: float) -> Callable[[Any, Any], Any]:
    """A backend that compiles as `backend` does, within a budget: what was compiled under another is not taken."""
    from torch._functorch import config

    inner = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
    patches = {"config_patches": options} if options else {}

    def compile_within(graph: Any, inputs: Any) -> Any:
        with config.patch(activation_memory_budget=budget):
            return inner(graph, inputs, **patches)

    return compile_within


def _counters() -> dict[str, Counter[Any]]:
    """torch's counters at this moment."""
    from torch._dynamo.utils import counters

    return {name: counters[name].copy() for name in ("stats", "frames", "graph_break")}


def _marked(arguments: Any) -> int | None:
    """Marks dimension 0 of every tensor as one that varies; the size of the first, None where there is no tensor."""
    from torch._dynamo import maybe_mark_dynamic

    first = None
    for _, tensor in tree.tensors(arguments):
        if not tensor.dim() or isinstance(tensor, nn.Parameter):
            continue
        size = tensor.shape[0]
        first = size if first is None else first
        if size > 1:
            maybe_mark_dynamic(tensor, 0)
    return first


def _one_line(reason: Any) -> str:
    kind = f"{type(reason).__name__}: " if isinstance(reason, BaseException) else ""
    lines = [line.strip() for line in str(reason).splitlines() if line.strip()]
    return kind + " ".join(lines[:2])[:240]

"""The optimizer's state waits in the host's memory; that of a few parameters at a time is on the device for their step.

Few are as many as the largest parameter weighs, so that the device holds no more for it than it must. The update is the
optimizer's own, on the device: the result is the same. All of the state travels there and back in every step.
"""

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.model.forward import standing

__all__ = ["OptimizerOnHost", "step_apart", "why_not_apart"]


def why_not_apart(optimizers: Sequence[Optimizer]) -> str | None:
    """Why optimizers cannot step some parameters before others to the same result; None where they can."""
    for optimizer in optimizers:
        kind = type(optimizer)
        if not kind.__module__.startswith("torch.optim."):
            return f"{kind.__name__} is none of torch's own optimizers, which step each parameter by itself"
        if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
            return f"{kind.__name__} has hooks on its step, which would run for each parameter"
    return None


def step_apart(
    step: Callable[[], Any], optimizer: Optimizer, group: dict[str, Any], parameters: Sequence[nn.Parameter]
) -> None:
    """Calls the optimizer's `step` while it knows of no more than `parameters`, of one of its groups."""
    groups, held = optimizer.param_groups, group["params"]
    optimizer.param_groups, group["params"] = [group], list(parameters)
    try:
        step()
    finally:
        optimizer.param_groups, group["params"] = groups, held


class OptimizerOnHost:
    """A context in which an optimizer's `step` and `load_state_dict` leave its state on the host.

    State that was on the device before is there again afterwards; what was made inside stays on the host, where
    `load_state_dict(state_dict())` fetches it from.
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        """Changes nothing until it is entered."""
        self._optimizer, self._device, self._pinned = optimizer, device, device.type == "cuda"
        self._hosts: dict[tuple[Tensor, str], Tensor] = {}  # where each tensor waits: the same in every step
        self._before: list[tuple[Tensor, str]] = []

    def __enter__(self) -> "OptimizerOnHost":
        optimizer = self._optimizer
        self._step, self._load = optimizer.step, optimizer.load_state_dict
        step = types.MethodType(lambda _, closure=None: self.step(), optimizer)  # a schedule wants a method
        self._stands = standing(optimizer, step=step, load_state_dict=self.load)
        self._stands.__enter__()
        self._before = [key for parameter in list(optimizer.state) for key in self._send(parameter)]
        return self

    def __exit__(self, *error: Any) -> None:
        self._stands.__exit__(*error)
        for parameter, name in self._before:
            self._fetch(parameter, name)
        self._hosts.clear()

    def step(self) -> None:
        """The optimizer's step, a few parameters after the others."""
        for group, parameters in self._portions():
            for parameter in parameters:
                for name in list(self._optimizer.state.get(parameter, ())):
                    self._fetch(parameter, name)
            step_apart(self._step, self._optimizer, group, parameters)
            for parameter in parameters:
                self._send(parameter, always=True)
        if self._pinned:  # whoever reads the state on the host may do so from here on
            torch.cuda.current_stream(self._device).synchronize()

    def load(self, saved: Mapping[str, Any]) -> None:
        """`load_state_dict` whose tensors do not pass through the device, in the formats that they have."""
        self._load({**saved, "state": {}})
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        held = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for parameter, number in zip(held, numbers, strict=True):
            if number in saved["state"]:
                self._optimizer.state[parameter] = dict(saved["state"][number])
                self._send(parameter, always=True)

    def _portions(self) -> Iterator[tuple[dict[str, Any], list[nn.Parameter]]]:
        """(a group, some of its parameters that have a gradient), together no larger than the largest parameter."""
        groups = self._optimizer.param_groups
        most = max((parameter.nbytes for group in groups for parameter in group["params"]), default=0)
        for group in groups:
            portion: list[nn.Parameter] = []
            for parameter in (each for each in group["params"] if each.grad is not None):
                if portion and sum(each.nbytes for each in portion) + parameter.nbytes > most:
                    yield group, portion
                    portion = []
                portion.append(parameter)
            if portion:
                yield group, portion

    def _send(self, parameter: Tensor, *, always: bool = False) -> list[tuple[Tensor, str]]:
        """Leaves a parameter's state on the host; with `always` a copy of what is there already. Says what it moved.

        Counts of steps stay where they are, which is where the optimizer wants them.
        """
        state, moved = self._optimizer.state[parameter], []
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and (always or value.device.type != "cpu"):
                key = parameter, name
                host = self._hosts.get(key)
                if host is None or host.shape != value.shape or host.dtype != value.dtype:
                    host = torch.empty_like(value, device="cpu", pin_memory=self._pinned)
                state[name] = self._hosts[key] = host.copy_(value, non_blocking=self._pinned)
                moved.append(key)
        return moved

    def _fetch(self, parameter: Tensor, name: str) -> None:
        """Brings a tensor of the state to the device, unless it is gone."""
        value = self._optimizer.state.get(parameter, {}).get(name)
        if isinstance(value, Tensor) and value.dim():
            fetched = value.to(self._device, copy=True, non_blocking=self._pinned)
            self._optimizer.state[parameter][name] = fetched

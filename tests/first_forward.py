"""Models that change themselves when they first run, in more than one place."""

import collections
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Changing", "Hooked", "picture"]


class Hooked(nn.Module):
    """Registers hooks at its first forward and keeps a flag of that, as Transformers does; a hook too many is an error.

    With each hook the inner layer's width doubles what the outer one is given, so that two no longer fit together.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.outer = nn.Linear(6, 8), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "_hooks_installed", False):
            self.inner.register_forward_hook(lambda module, args, output: torch.cat([output, output], 1))
            self._hooks_installed = True
        return self.outer(self.norm(self.inner(x)))


class _Cache:
    """A small object of the model's own."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Tensor]] = []
        self.length = 0


class Changing(nn.Module):
    """At its first forward: hooks of every kind, a layer, a buffer, a parameter's place, caches, a generator."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.caches: Any = collections.OrderedDict(deep=[{"keys": torch.zeros(2)}])
        self.cache, self.recent = _Cache(), collections.deque([1], maxlen=2)
        self.hidden = [nn.Linear(2, 2)]  # no submodule, but a part of the model all the same
        self.generator = torch.Generator().manual_seed(3)
        self.calls = collections.defaultdict(int)

    def forward(self, x: Tensor) -> Tensor:
        if not self.calls["forward"]:
            self._first()
        elif len(self.body._forward_hooks) != 2:
            raise RuntimeError(f"{len(self.body._forward_hooks)} hooks at call {self.calls['forward']}")
        self.calls["forward"] += 1
        self.seen = self.seen + len(x)
        self.recent.append(len(x))
        self.caches["deep"][0]["keys"] += 1
        self.cache.length += 1
        with torch.no_grad():
            for layer in self.hidden:
                layer.weight += 1
        noise = torch.rand(3, generator=self.generator)
        return self.head(self.late(self.norm(self.body(x)))) + noise

    def _first(self) -> None:
        body = self.body
        body.register_forward_hook(lambda module, args, output: output * 1)
        body.register_forward_hook(lambda module, args, kwargs, output: output, with_kwargs=True, always_call=True)
        body.register_forward_pre_hook(lambda module, args: args)
        body.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
        body.register_full_backward_hook(lambda module, into, out: None)
        body.register_full_backward_pre_hook(lambda module, out: None)
        body.register_state_dict_pre_hook(lambda *args: None)
        body._register_state_dict_hook(lambda *args: None)
        body.register_load_state_dict_post_hook(lambda *args: None)
        body.weight.register_hook(lambda gradient: gradient * 1)
        body.bias.register_post_accumulate_grad_hook(lambda parameter: None)
        body.weight.checked = True
        self.head.weight.data = self.head.weight.data.clone()
        self.late = nn.Linear(8, 8)
        self.register_buffer("late_buffer", torch.ones(2), persistent=False)
        self.cache.layers.append({"values": torch.ones(2)})
        self.caches["shallow"] = torch.ones(1)


def picture(model: nn.Module) -> dict[str, Any]:
    """All that a model holds, as values that can be compared; hooks by their number."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} class"] = type(module).__name__
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = _values(value)
    for name, parameter in model.named_parameters():
        hooks = (parameter._backward_hooks, parameter._post_accumulate_grad_hooks)
        found[f"{name} hooks"] = [len(held or ()) for held in hooks]
        found[f"{name} more"] = (parameter.requires_grad, sorted(vars(parameter)), parameter.data_ptr())
        found[f"{name} gradient"] = None if parameter.grad is None else (id(parameter.grad), parameter.grad.tolist())
    return found


def _values(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        value = value.get_state()
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, _Cache):
        value = vars(value)
    if isinstance(value, dict):
        return [(key, _values(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, collections.deque)):
        return [_values(item) for item in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__

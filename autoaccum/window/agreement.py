"""What the ranks of a training must have alike, as plain values by name, for `Ranks.agree` to compare."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.model.shards import local
from autoaccum.planning.plan import Plan
from autoaccum.ranks import Ranks

__all__ = ["agree_on_copies", "agree_on_windows", "described", "model_facts", "optimizer_facts", "setting_facts"]

_BUILD_ALIKE = (
    "Build model, optimizer and plan alike on every rank; DistributedDataParallel around the model gives all ranks the "
    "first one's weights"
)
_COPIES = (
    "Ranks along a dimension of device_mesh= that is none of data's have the same samples, and train copies of one "
    "model: build it with the same seed, and shard it along the dimension of data alone; tensor, pipeline and context "
    "parallelism are not supported"
)
_DECLARE = (
    "Each rank reads the loss's denominators off its own samples: return autoaccum.Mean(numerator, denominator) from "
    "step=, or declare reduction="
)


def setting_facts(**settings: Any) -> dict[str, Any]:
    """Settings by name: numbers and texts as they are; of functions and other objects what they are called."""
    return {name: _said(value) for name, value in settings.items()}


def model_facts(*modules: Any) -> dict[str, Any]:
    """Each parameter's and buffer's dtype and shape, and whether it is trained."""
    facts = {}
    for module in (module for module in modules if isinstance(module, nn.Module)):
        for name, parameter in module.named_parameters():
            trained = "trained" if parameter.requires_grad else "frozen"
            facts[f"the parameter {name!r}"] = f"{described(parameter)}, {trained}"
        facts |= {f"the buffer {name!r}": described(buffer) for name, buffer in module.named_buffers()}
    return facts


def agree_on_windows(
    ranks: Ranks,
    plan: Plan,
    model: nn.Module,
    optimizer: Optimizer,
    settings: Mapping[str, Any],
    loss: Mapping[str, str],
) -> None:
    """Before the first window: compares plan, model, weights, optimizer, and what the `loss` was seen to divide by.

    A SetupError on all ranks says in what they differ.
    """
    if ranks.size > 1:
        facts = setting_facts(target_batch=plan.target_batch, limits=plan.limits, minimum=plan.minimum,
                              gradient_sync=plan.gradient_sync, **settings)  # fmt: skip
        facts |= model_facts(model) | _checksums(_values(model)) | optimizer_facts(optimizer)
        ranks.agree("the first window", facts, _BUILD_ALIKE)
        unseen = ranks.any("what the loss divides by", len(loss) == 1)  # a rank whose samples showed nothing asks later
        ranks.agree("what the loss divides by", {"the loss": loss.get("terms")} if unseen else loss, _DECLARE)


def agree_on_copies(sharing: Sequence[Ranks], model: Any, settings: Mapping[str, Any]) -> None:
    """Compares over ranks that have the same samples what they begin with: each trains a copy, and none waits for them.

    Raises:
        SetupError: theirs differ, and in what; on all ranks.
    """
    if sharing and isinstance(model, nn.Module):
        weights = ((name, local(parameter)) for name, parameter in _values(model))
        facts = setting_facts(**settings) | model_facts(model) | _checksums(weights)
        for ranks in sharing:
            ranks.agree("ranks with the same samples", facts, _COPIES)


def _values(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return ((f"the values of {name!r}", parameter) for name, parameter in model.named_parameters())


def optimizer_facts(optimizer: Optimizer) -> dict[str, Any]:
    """Its class, each group's settings, and a checksum of all that it remembers."""
    facts: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    for number, group in enumerate(optimizer.param_groups):
        of = "the optimizer's" if len(optimizer.param_groups) == 1 else f"the optimizer's group {number}'s"
        facts[f"{of} number of parameters"] = len(group["params"])
        facts |= {f"{of} {name}": _said(value) for name, value in group.items() if name != "params"}
    if hasattr(optimizer, "process_group"):  # ZeroRedundancyOptimizer: each rank remembers its own part
        return facts
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    remembered = [
        (f"the optimizer's {name} of parameter {place}", value)
        for place, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    ]
    facts |= {name: _said(value) for name, value in remembered if not isinstance(value, Tensor)}
    return facts | _checksums((name, value) for name, value in remembered if isinstance(value, Tensor))


def _said(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 8 else described(value)
    if isinstance(value, Mapping):
        return {str(name): _said(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_said(item) for item in value]
    return getattr(value, "__qualname__", type(value).__qualname__)


def described(tensor: Tensor) -> str:
    """Its dtype and shape, in words."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


@torch.no_grad()
def _checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Sums of the bits as integers: no order of addition changes them."""
    names, sums = [], []
    for name, tensor in tensors:
        if hasattr(tensor, "_local_tensor"):  # each rank has a shard of its own
            continue
        if tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel():
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            bits = flat.view(torch.int32) if flat.numel() % 4 == 0 else flat
            names.append(name)
            sums.append(bits.sum(dtype=torch.int64))
    found = torch.stack([each.to(sums[0].device) for each in sums]).tolist() if sums else []
    return {name: f"checksum {number & (2**64 - 1):016x}" for name, number in zip(names, found, strict=True)}

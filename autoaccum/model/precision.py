"""The formats of a window: autocast, the fp16 loss scaler, fp32 sums of 16-bit gradients, sparse ones, one clip.

Known: bf16 needs no scaler; fp16 gradients underflow without one; a window is one update, so that the scale stays
constant inside it and gradients are unscaled and clipped once, at its end (changing the scale in mid-window leaves a
gradient that is off by 0.8, clipping each micro-batch by 1.0).
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.checks import one_of
from autoaccum.errors import SetupError, shown
from autoaccum.model.shards import is_sharded, local

__all__ = [
    "Precision", "SideBuffers", "SparseGradients", "clip_by_norm", "global_norm", "prepared_by", "scaled_step",
    "untouched_rows",
]  # fmt: skip

_HALF = (torch.float16, torch.bfloat16)
_NOTHING = nullcontext()
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Which format the forward pass runs in, and why.

    Attributes:
        name: "fp32" (no autocast: the model's own dtype), "bf16" or "fp16".
        reason: one line.
        scaler: the loss scaler; disabled unless fp16.
    """

    def __init__(self, precision: str, device: torch.device, model: nn.Module, scaler: Any = None) -> None:
        """Decides. A `scaler` is somebody else's, which scales the loss in place of ours.

        Raises:
            SetupError: an unknown name, or fp16 for parameters that are 16-bit themselves.
        """
        one_of("precision", precision, ("auto", "fp32", "bf16", "fp16"))
        self.name, self.reason = _of_policy(precision) if is_sharded(model) else _decide(precision, device)
        formats = {p.dtype for p in model.parameters() if p.is_floating_point()}
        own = " and ".join(sorted(str(each).removeprefix("torch.") for each in formats - {torch.float32}))
        if precision == "auto" and self.name == "fp32" and own:
            self.reason = f"fp32: no autocast, so that the model computes in its own {own}"
        if self.name == "fp16" and not formats.isdisjoint(_HALF):
            raise SetupError(
                'precision="fp16" scales the loss, and gradients of 16-bit parameters cannot be unscaled: '
                'keep the parameters in fp32 (model.float()), or train in their own dtype with precision="fp32"'
            )
        self._device_type, self._dtype = device.type, _AUTOCAST.get(self.name)
        made = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")
        self.scaler: torch.amp.GradScaler = made if scaler is None else scaler

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward pass runs inside this."""
        return _NOTHING if self._dtype is None else torch.autocast(self._device_type, dtype=self._dtype)

    def forget_casts(self) -> None:
        """Lets the weights' 16-bit copies go: where the caller's autocast is still on, it would keep them all."""
        if self._dtype is not None:
            torch.clear_autocast_cache()

    def outside(self) -> AbstractContextManager[Any]:
        """The backward pass runs inside this: autocast off, as torch asks."""
        return _NOTHING if self._dtype is None else torch.autocast(self._device_type, enabled=False)


def _decide(precision: str, device: torch.device) -> tuple[str, str]:
    if precision != "auto":
        return precision, f"{precision}: as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16", f"bf16 autocast: {torch.cuda.get_device_name(device)} computes it natively"
    if device.type == "cpu":  # some multiply bfloat16 themselves, most would be slower
        return "fp32", 'fp32: a CPU takes bf16 where it is asked for, precision="bf16"'
    return "fp32", f"fp32: {device.type} has no native bf16 that would be faster"


def _of_policy(precision: str) -> tuple[str, str]:
    if precision in ("bf16", "fp16"):
        raise SetupError(
            f'precision="{precision}" is not supported for a model that fully_shard has sharded: give fully_shard '
            "mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)"
        )
    return "fp32", "fp32: no autocast, since the model is sharded, and its MixedPrecisionPolicy decides"


class SideBuffers:
    """fp32 sums for the gradients of bf16 and fp16 parameters.

    Summing k gradients in bf16 loses what is smaller than 1/256 of the sum: 3% of the gradient at k = 1024.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._half = [parameter for parameter in parameters if parameter.dtype in _HALF]
        self._summed = {id(parameter) for parameter in self._half}
        self._sums: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """What the buffers take while a window runs: 4 bytes an element."""
        return sum(4 * local(parameter).numel() for parameter in self._half)

    def collect(self) -> None:
        """Adds the gradients of one micro-batch to the sums and empties them."""
        for parameter in self._half:
            if parameter.grad is not None:
                total = self._sums.get(id(parameter))
                self._sums[id(parameter)] = parameter.grad.float() if total is None else total.add_(parameter.grad)
                parameter.grad = None

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The window's gradient of `parameter` so far, wherever it stands."""
        return self._sums.get(id(parameter), parameter.grad)

    def put(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """Sets the window's gradient of `parameter`, for one that has none here."""
        if id(parameter) in self._summed:
            self._sums[id(parameter)] = gradient
        else:
            parameter.grad = gradient

    def drop(self, parameter: nn.Parameter) -> None:
        """Takes the window's gradient of `parameter` away."""
        self._sums.pop(id(parameter), None)
        parameter.grad = None

    def dtype(self, parameter: nn.Parameter) -> torch.dtype:
        """The format that the window's gradient of `parameter` is summed in."""
        return torch.float32 if id(parameter) in self._summed else parameter.dtype

    def give_back(self) -> None:
        """Casts each sum once into its parameter's gradient."""
        for parameter in self._half:
            total = self._sums.pop(id(parameter), None)
            if total is not None:
                parameter.grad = total.to(parameter.dtype)

    def clear(self) -> None:
        """Forgets the sums."""
        self._sums.clear()


class SparseGradients:
    """The parameters with sparse gradients: known from layers that say so, and from what a backward pass leaves.

    PyTorch adds a sparse gradient to another by putting the rows of both one after the other, so that a window of k
    micro-batches would hold k times the rows of one. Merged after each they are never more than the embedding has.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        said = (module.weight for module in model.modules() if getattr(module, "sparse", False) is True)
        self._parameters = {id(weight): weight for weight in said if isinstance(weight, nn.Parameter)}
        self._others = [parameter for parameter in parameters if id(parameter) not in self._parameters]

    def merge(self) -> None:
        """After a backward pass: no row stands twice in a sparse gradient."""
        # Once: looking at every parameter in every micro-batch would cost more than all else here.
        self._parameters |= {id(p): p for p in self._others if p.grad is not None and p.grad.is_sparse}
        self._others = []
        for parameter in self._parameters.values():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self._parameters


def untouched_rows(parameter: nn.Parameter, rows: int, dtype: torch.dtype, dimensions: int = 1) -> Tensor:
    """A sparse gradient of zeros in the last `rows` rows, as earlier micro-batches would have left one.

    Args:
        parameter: whose.
        rows: 0 gives one in which nothing is stored.
        dtype: of the gradient.
        dimensions: how many of the parameter's dimensions are indexed; 1 where there are rows.
    """
    at = torch.arange(parameter.shape[0] - rows, parameter.shape[0], device=parameter.device).expand(dimensions, rows)
    values = torch.zeros(rows, *parameter.shape[dimensions:], dtype=dtype, device=parameter.device)
    return torch.sparse_coo_tensor(at, values, parameter.shape, is_coalesced=True, check_invariants=False)


def global_norm(gradients: list[Tensor]) -> Tensor:
    """The L2 norm over all `gradients` together, a scalar on the first one's device; a SetupError for a sparse one."""
    if any(gradient.is_sparse for gradient in gradients):
        raise SetupError(
            "the norm of sparse gradients cannot be taken: make the embedding with sparse=False, or leave clip_norm "
            "and log_grad_norm out"
        )
    norms = torch._foreach_norm([gradient.detach() for gradient in gradients])
    first = norms[0].device
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(first, non_blocking=True) for norm in norms]))
    return total


def clip_by_norm(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scales `gradients` in place by min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device))


def prepared_by(accelerator: Any, optimizer: Any) -> Any:
    """The optimizer inside what Hugging Face's Accelerator has prepared, unless that accumulates by itself."""
    if not hasattr(accelerator, "gradient_accumulation_steps"):
        raise SetupError(f"accelerator={shown(accelerator)}: give the accelerate.Accelerator that prepared these")
    if accelerator.gradient_accumulation_steps != 1:
        raise SetupError(
            f"Accelerator(gradient_accumulation_steps={accelerator.gradient_accumulation_steps}) beside an Accumulator "
            "accumulates twice: leave it at 1, the plan says how many micro-batches there are"
        )
    return getattr(optimizer, "optimizer", optimizer)


def scaled_step(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> str | None:
    """The optimizer's step, and the scale's; why no step was taken, where fp16 gradients overflowed."""
    if not scaler.is_enabled():
        optimizer.step()
        return None
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() < scale:
        return f"fp16 gradients overflowed at the loss scale {scale:g}, which is now {scaler.get_scale():g}"
    return None

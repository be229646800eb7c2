"""The gradient noise scale, measured for free from the micro-batches of some windows.

A gradient over few samples is noisier than one over many; from how much noisier follows the batch beyond which more
samples a step hardly help (McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A). With
micro-batches of n_j samples and gradients g_j, N = Σ n_j and ḡ their weighted mean,

    S = N (Σ (n_j/N) |g_j|² − |ḡ|²) / (k − 1)         the trace of the per-sample covariance
    |G|² = |ḡ|² − S/N                                  the squared norm of the true gradient
    B = S / |G|²                                       the noise scale, in samples

both unbiased, also where sizes differ; S and |G|² are smoothed separately, since their ratio is not unbiased. Hooks see
each micro-batch's own gradient before it is added to the sum, so that no second gradient is kept. Other ranks' are
further micro-batches: their part of the first sum comes with the vote at the window's end. Not valid where the samples
of a micro-batch act on each other: BatchNorm, batch-coupled losses.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from autoaccum.model.given_model import layer_class
from autoaccum.planning.learning_rate import one_micro_batch
from autoaccum.planning.plan import Plan
from autoaccum.window.window_sums import Figures

__all__ = ["NoiseScale", "advice"]

# A measured window costs a norm for each parameter and micro-batch; the scale changes fastest at a training's start.
EVERY, EARLY, LATER_EVERY = 10, 200, 50
SMOOTHING = 0.9


class NoiseScale:
    """Measures every tenth window, after the first two hundred every fiftieth, and smooths.

    Attributes:
        why_not: why nothing is measured; None where it is.
        over_ranks: `so_far` of all ranks together, once several have voted; else nothing.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        """Decides whether the model can be measured; registers nothing yet."""
        coupled = [name for name, module in model.named_modules() if issubclass(layer_class(module), _BatchNorm)]
        why = f"BatchNorm ({coupled[0]}) makes the samples of a micro-batch act on each other" if coupled else None
        self.why_not: str | None = why
        self._parameters = list(parameters)
        self._handles: list[Any] = []
        self._norms: list[Tensor] = []  # of the micro-batch that runs, one a parameter
        self._micro: list[tuple[float, Tensor]] = []  # (share of the window, squared norm of its part of the gradient)
        self.over_ranks: Sequence[float] = ()
        self._pending: Callable[[], None] | None = None  # takes in what was measured, and is on its way
        self._windows = 0
        self._weight = self._noise = self._signal = 0.0

    @property
    def value(self) -> float | None:
        """B in samples; None before anything was measured, or while noise hides the gradient altogether."""
        if self._weight == 0 or self._signal <= 0 or self._noise < 0:
            return None
        return self._noise / self._signal

    @property
    def watches(self) -> bool:
        """Whether the open window is one that is measured."""
        return bool(self._handles)

    def open(self, micro_batches: int, watched: Sequence[Tensor] | None = None) -> None:
        """A window of so many on all ranks begins; of those of two or more the first and every so many are measured.

        `watched`: what backward passes give gradients to where that is not the parameters, but a sharded model's whole.
        """
        self.close()
        self._settle()
        if self.why_not is None and micro_batches > 1:
            self._windows += 1
            if self._windows % (EVERY if self._windows <= EARLY else LATER_EVERY) == 1:
                tensors: Sequence[Any] = self._parameters if watched is None else watched
                self._handles = [each.register_hook(self._see) for each in tensors if each.requires_grad]

    def _see(self, gradient: Tensor) -> None:
        if not gradient.is_sparse:
            self._norms.append(_norm(gradient))

    def micro(self, share: float) -> None:
        """A micro-batch ended; its loss entered the window's with weight `share`, 0 in a pass that counts nothing."""
        if self._handles and self._norms and share > 0:
            self._micro.append((share, torch.stack(self._norms).square().sum()))
        self._norms = []

    def so_far(self) -> list[float]:
        """[Σ (n_j/N) |g_j|², how many] of this rank's micro-batches in the open window; waits for them."""
        if not self._micro:
            return [0.0, 0.0]
        shares, squares = zip(*self._micro)
        return [_spread(Figures(torch.stack(squares)).read(), shares), float(len(shares))]

    def finish(self, gradients: Sequence[Tensor], samples: int, correction: float = 1.0) -> None:
        """The window of so many samples ended, with these gradients over all ranks before clipping, or their norm.

        `correction` is what they have been multiplied by since the micro-batches' were seen.
        """
        norms = [_norm(gradient) for gradient in gradients if not gradient.is_sparse] if self._handles else []
        if norms:  # none are left where a hook of the user's own takes them as they come
            shares, squares = [share for share, _ in self._micro], [square for _, square in self._micro]
            figures = Figures(torch.stack([torch.stack(norms).square().sum(), *squares]))
            self._pending = partial(self._take_in, figures, shares, self.over_ranks, samples, correction)
            if figures.at_hand:
                self._settle()
        self.close()

    def _settle(self) -> None:
        """Takes in what the last window measured: on a device it is there a window later, when nobody waits for it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()

    def _take_in(
        self, figures: Figures, shares: Sequence[float], over_ranks: Sequence[float], samples: int, factor: float
    ) -> None:
        whole, *squares = figures.read()
        spread, count = over_ranks or (_spread(squares, shares), len(shares))
        if count < 2:
            return
        noise = samples * (spread * factor**2 - whole) / (count - 1)
        if math.isfinite(noise):  # else the window is left out, and would stay in the averages for good
            # Both are weighted alike, so that the start-up bias of the averages cancels in their ratio.
            self._weight = SMOOTHING * self._weight + 1.0
            self._noise = SMOOTHING * self._noise + noise
            self._signal = SMOOTHING * self._signal + whole - noise / samples

    def close(self) -> None:
        """Takes the hooks off; what was seen of an unfinished window is forgotten."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._micro, self._norms, self.over_ranks = [], [], [], ()

    def state_dict(self) -> dict[str, float]:
        """The averages and the count of windows, for checkpoints."""
        self._settle()
        return {"windows": self._windows, "weight": self._weight, "noise": self._noise, "signal": self._signal}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from `state_dict`."""
        self._pending = None
        self._windows = int(state["windows"])
        self._weight, self._noise, self._signal = state["weight"], state["noise"], state["signal"]


def _spread(squares: Sequence[float], shares: Sequence[float]) -> float:
    """Each hook saw (n_j/N) g_j: its square is divided by the share once, for Σ (n_j/N) |g_j|²."""
    return sum(square / share for square, share in zip(squares, shares, strict=True))


def _norm(gradient: Tensor) -> Tensor:
    """The norm, shape (); 16-bit numbers are squared and added in float32."""
    half = gradient.dtype in (torch.float16, torch.bfloat16)
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float32 if half else None)
    return norm


def advice(scale: float, plan: Plan, optimizer: Optimizer) -> str:
    """One sentence on the measured scale beside the target batch; far below it, what k = 1 would train with."""
    target = plan.target_batch
    measured = f"the gradient noise scale is about {scale:.0f} samples, the target batch {target}"
    if target > 4 * scale:
        fewer, alone = "a smaller target", ""
        if plan.accumulation_steps > 1:
            fewer = "fewer accumulation steps"
            rate = one_micro_batch(plan.micro_batch * plan.world_size, target, optimizer)
            alone = f". Without accumulation, {plan.accumulation_steps} steps for each of now: {rate}"
        return f"{measured}: far above it; {fewer} would train about as well, and faster{alone}"
    if target < scale / 4:
        return f"{measured}: far below it; a larger target would pay, with its learning rate scaled"
    return f"{measured}: of the same order, as it should be"

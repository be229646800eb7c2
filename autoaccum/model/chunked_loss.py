"""Cross entropy of a linear layer's outputs, some rows at a time: all logits together are never held.

Choices made here:

- The gradient is taken in the forward pass, chunk by chunk, so that no logit is computed twice. What the backward pass
  needs is then the gradient itself: as large as the hidden states and the layer's weight.
- It is kept as the gradient of the sum. The mean's divisor comes in with the backward pass, where a window also brings
  its own denominator; in half precision a sum over classes does not underflow as a mean over tokens would.
- One buffer for the logits of a chunk serves all chunks, and has the size of a whole chunk also where there are fewer
  rows, so that memory follows the number of samples in a straight line.
- On the CPU rows whose label is ignored come last and chunks of nothing else are left out: in a masked language model
  they are most. Elsewhere the host would have to wait for the device to know.
- torch's own `linear_cross_entropy` keeps what it divides by to itself, so it cannot be summed over a window.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autoaccum.checks import one_of
from autoaccum.errors import LossError, shown

__all__ = ["ChunkedCrossEntropy", "chunked_cross_entropy", "logits_format"]

# Rows of a chunk. Each chunk reads and writes the weight's gradient once: on a GPU that costs more beside the products.
_ROWS = {"cpu": 256}
_ROWS_ELSEWHERE = 1024


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    shift: bool = False,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias), labels)` without ever holding all logits; shape ().

    ```python
    def step(model, batch):
        hidden = model.transformer(batch["input_ids"])
        return autoaccum.chunked_cross_entropy(hidden, model.head.weight, batch["labels"], shift=True)
    ```

    A window reads what it divides by, as it does of torch's own losses. Under autocast the products are in its format
    and the loss is in float32, as without chunks; so is the loss of float16 and bfloat16 inputs.

    Args:
        hidden: (..., width), floating-point.
        weight: (classes, width), of the linear layer.
        labels: (...), class indices.
        bias: (classes,), of the linear layer.
        class_weights: (classes,), what each class counts; None: 1.
        ignore_index: the label of rows that do not count.
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`.
        shift: each row is compared with the label that follows it along the last dimension, as in causal language
            models; the last row with none.
        reduction: "mean" over the class weights of the labels that count (NaN where none does), or "sum".
        chunk: rows whose logits are held at once; None: 256 on a CPU, 1,024 elsewhere.

    Raises:
        LossError: shapes, a format or a number that do not fit; or, in the backward pass, a second derivative.
    """
    one_of("reduction", reduction, ("mean", "sum"))
    _check(hidden, weight, labels, bias, class_weights, label_smoothing, chunk)
    if shift:
        labels = functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    format_ = logits_format(hidden)
    loss: Tensor = ChunkedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, labels.reshape(-1), class_weights, ignore_index,
        label_smoothing, reduction, chunk, format_, torch.float32 if format_.itemsize == 2 else format_,
    )  # type: ignore[no-untyped-call]  # fmt: skip
    return loss


def logits_format(hidden: Tensor) -> torch.dtype:
    """What a linear layer's outputs would be in here, under autocast or without."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


class ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden (rows, width), weight, bias, labels (rows,), …) -> the loss, shape ().

    Its node has `divisor`, what the loss was divided by: a float, or a tensor of shape () on another device.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, class_weights: Tensor | None,
        ignored: int, smoothing: float, reduction: str, chunk: int | None, logits: torch.dtype, computed: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """The loss, and its sum's gradients.

        Args:
            ctx: torch's.
            hidden, weight, bias, labels, class_weights, ignored, smoothing, reduction, chunk: as in
                `chunked_cross_entropy`, of one dimension of rows.
            logits, computed: the formats of the linear layer's outputs and of the loss.
        """
        kind = hidden.device.type
        with torch.autocast(kind, enabled=False):
            made = _Chunks(
                hidden, weight, bias, labels, class_weights, ignored, smoothing,
                chunk or _ROWS.get(kind, _ROWS_ELSEWHERE), logits, computed, ctx.needs_input_grad[:3],
            )  # fmt: skip
            total = made.run()
        divisor = made.counted.sum()
        ctx.gradients = made.gradients
        if reduction == "sum":
            ctx.divisor = 1.0
            return total
        ctx.divisor = float(divisor) if divisor.is_cpu else divisor  # elsewhere nobody waits for it
        return total / divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The sum's gradients, times what the loss's is over its divisor; in place where no one asks again."""
        if torch.is_grad_enabled():
            raise LossError(
                "a second derivative of chunked_cross_entropy was asked for (create_graph=True), and its gradient is "
                "taken in the forward pass, which has none: use torch.nn.functional.cross_entropy of all logits"
            )
        if ctx.gradients is None:
            raise LossError(
                "the backward pass of chunked_cross_entropy ran a second time, and the first freed its gradients: "
                "give the first backward retain_graph=True"
            )
        if isinstance(ctx.divisor, float):
            scale = gradient / ctx.divisor if ctx.divisor else torch.zeros_like(gradient)
        else:
            scale = torch.where(ctx.divisor > 0, gradient / ctx.divisor, torch.zeros_like(gradient))
        kept = ctx.gradients
        if _keeps_graph():
            changed = [None if each is None else each * scale.to(each.dtype) for each in kept]
        else:
            ctx.gradients = None
            changed = [None if each is None else each.mul_(scale) for each in kept]
        return (*changed, *[None] * 8)


class _Chunks:
    """The loss and its gradients, chunk by chunk.

    Attributes:
        counted: what each row counts: its label's class weight, 0 where that is ignored.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, class_weights: Tensor | None,
        ignored: int, smoothing: float, rows: int, logits: torch.dtype, computed: torch.dtype, needed: Sequence[bool],
    ) -> None:  # fmt: skip
        self._given, self._rows, self._computed = (hidden, weight, bias), rows, computed
        self._weight, self._bias = weight.to(logits), None if bias is None else bias.to(logits)
        self._logits = torch.empty(rows, len(weight), dtype=logits, device=hidden.device)
        self._losses = self._logits if logits == computed else torch.empty_like(self._logits, dtype=computed)
        self._kept = counts = labels != ignored
        self._index, self._smoothing = torch.where(counts, labels, 0), smoothing
        self._class_weights = None if class_weights is None else class_weights.to(computed)
        own = self._class_weights
        self.counted = counts.to(computed) if own is None else own[self._index] * counts
        self._most, self._order = len(labels), None  # rows that are run, and those that count first, if not all do
        if labels.is_cpu and (most := int(counts.sum())) < len(labels):
            self._most, self._order = most, torch.sort(counts, descending=True, stable=True).indices
        # Summed in 32 bits at least: in 16 the sum over many chunks would round each time.
        self._sums = [
            torch.zeros_like(each, dtype=torch.promote_types(each.dtype, computed if number else each.dtype))
            if asked and each is not None else None
            for number, (each, asked) in enumerate(zip(self._given, needed))
        ]  # fmt: skip

    @property
    def gradients(self) -> list[Tensor | None]:
        """Of the sum, by hidden states, weight and bias, in their formats; None for what needs none."""
        pairs = zip(self._sums, self._given)
        return [None if sums is None or each is None else sums.to(each.dtype) for sums, each in pairs]

    def run(self) -> Tensor:
        """The sum of the losses, shape ()."""
        total = torch.zeros((), dtype=self._computed, device=self._logits.device)
        for start in range(0, self._most, self._rows):
            stop = min(start + self._rows, len(self._index))
            total += self._chunk(slice(start, stop) if self._order is None else self._order[start:stop])
        return total

    def _chunk(self, rows: Any) -> Tensor:
        """The loss of some rows; adds their gradients to the sums."""
        hidden = self._given[0][rows].to(self._logits.dtype)
        index, counted = self._index[rows].unsqueeze(1), self.counted[rows].unsqueeze(1)
        logits, x = self._logits[: len(hidden)], self._losses[: len(hidden)]
        torch.mm(hidden, self._weight.t(), out=logits)
        if self._bias is not None:
            logits += self._bias
        if x is not logits:
            x.copy_(logits)
        x -= x.amax(1, keepdim=True)
        label = x.gather(1, index)
        # A smoothed label is one part its own class, and for the rest all classes alike, each by its weight.
        own, all_of_them = (1.0 - self._smoothing) * counted, None
        scale = own
        if self._smoothing:
            each = self._kept[rows].unsqueeze(1).to(x.dtype) * (self._smoothing / x.shape[1])
            weights = x.new_ones(x.shape[1]) if self._class_weights is None else self._class_weights
            scale, all_of_them = own + each * weights.sum(), (each, (x @ weights).unsqueeze(1), weights)
        x.exp_()
        sums = x.sum(1, keepdim=True)
        loss = scale * sums.log() - own * label
        if all_of_them is not None:
            loss -= all_of_them[0] * all_of_them[1]
        if any(each is not None for each in self._sums):
            x *= scale / sums
            x.scatter_add_(1, index, -own)
            if all_of_them is not None:
                x.addmm_(all_of_them[0], all_of_them[2].unsqueeze(0), alpha=-1)
            if x is not logits:
                logits.copy_(x)
            self._add(rows, hidden, logits)
        return loss.sum()

    def _add(self, rows: Any, hidden: Tensor, gradient: Tensor) -> None:
        """Adds to the sums what some rows' logits' gradient says."""
        for_hidden, for_weight, for_bias = self._sums
        if for_hidden is not None:
            for_hidden[rows] = (gradient @ self._weight).to(for_hidden.dtype)
        if for_weight is not None:
            if for_weight.dtype == gradient.dtype:
                for_weight.addmm_(gradient.t(), hidden)
            else:
                for_weight += gradient.t() @ hidden
        if for_bias is not None:
            for_bias += gradient.sum(0, dtype=for_bias.dtype)


_keeps_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True  # newer than the oldest torch
)  # fmt: skip


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, class_weights: Tensor | None,
    smoothing: float, chunk: int | None,
) -> None:  # fmt: skip
    """Refuses what does not fit together.

    Raises:
        LossError: names it.
    """
    width, rows, classes = hidden.shape[-1] if hidden.dim() else 0, tuple(hidden.shape[:-1]), len(weight)
    shapes = {
        "weight": (weight, (classes, width)), "labels": (labels, rows),
        "bias": (bias, (classes,)), "class_weights": (class_weights, (classes,)),
    }  # fmt: skip
    wrong = [
        f"{name} has the shape {tuple(each.shape)}: give {wanted}, beside hidden of {tuple(hidden.shape)}"
        for name, (each, wanted) in shapes.items()
        if each is not None and tuple(each.shape) != wanted
    ]
    if not hidden.is_floating_point() or not hidden.dim():
        wrong.insert(0, f"hidden is {hidden.dtype} of shape {tuple(hidden.shape)}: give floating-point (..., width)")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        wrong.append(f"labels are {labels.dtype}: give class indices, one for each row of hidden")
    if not 0.0 <= smoothing <= 1.0:
        wrong.append(f"label_smoothing={shown(smoothing)}: give a number from 0 to 1")
    if chunk is not None and chunk < 1:
        wrong.append(f"chunk={shown(chunk)}: give 1 row or more, or leave it out")
    if wrong:
        raise LossError(f"chunked_cross_entropy: {wrong[0]}")

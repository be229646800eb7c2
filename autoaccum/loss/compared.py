"""What the graph says, held against what was declared, or what torch's own loss says it divides by.

Both are numbers of each micro-batch. One may be a multiple of the other (elements and samples), the same each time;
anything else would weigh micro-batches otherwise than the loss does.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from autoaccum.errors import LossError
from autoaccum.loss.divisor import DECLARE
from autoaccum.loss.graph import read

__all__ = ["Compared"]

_WAITS = 4  # micro-batches in which a divisor that lies on a device is waited for


class Compared:
    """Compares one term's declared denominators with those in its graph, where that can be read."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None  # (divisor read, denominator declared)
        self._waited = 0

    def check(self, loss: Tensor, denominator: float, declared: Callable[[], str]) -> None:
        """Compares those of one micro-batch.

        Args:
            loss: the term, one element with its graph.
            denominator: what was declared, or counted by torch's own rule; 1 for a sum.
            declared: that in words.

        Raises:
            LossError: the two have changed, and not alike.
        """
        terms = read(loss) if denominator and loss.requires_grad and not loss.is_meta else ()
        if len(terms) != 1 or terms[0].divisor is None:
            return
        divisor, factor = terms[0].divisor, terms[0].factor
        if isinstance(divisor, Tensor) or isinstance(factor, Tensor):
            self._waited += 1
            if self._waited > _WAITS:
                return
        own = abs(float(divisor) / (float(factor) or 1.0))
        if not own or not math.isfinite(own):
            return
        if self._first is None:
            self._first = own, denominator
        read_first, declared_first = self._first
        close = 1e-2 if loss.dtype in (torch.float16, torch.bfloat16) else 1e-4
        alike = math.isclose(own * declared_first, read_first * denominator, rel_tol=close)
        if not alike and not math.isclose(own, read_first, rel_tol=close):
            raise LossError(
                f"the loss {declared()}, which gives {declared_first:g} and {denominator:g} in two micro-batches, and "
                f"its graph says that it divides by {read_first:g} and {own:g} there: let both count the same, leave "
                f'reduction="auto", which reads it, or {DECLARE}'
            )

"""What the loss of a trainer's step divides by, where somebody declares it; else its graph says it."""

from collections.abc import Mapping
from typing import Any

from autoaccum.errors import SetupError, shown

__all__ = ["counted_in_batch"]


def counted_in_batch(reduction: Any) -> Any:
    """A declared reduction counts in the trainer's batch."""
    if isinstance(reduction, Mapping) or not callable(reduction):
        if reduction in ("sample_mean", "sum"):
            return reduction
        raise SetupError(
            f"reduction={shown(reduction)} cannot be declared for a trainer's step: give 'auto', 'sample_mean', "
            "'sum' or "
            "f(batch) -> float"
        )
    return lambda piece: reduction(piece.batch)

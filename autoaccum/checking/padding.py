"""Does padding count? A sample's loss alone against its loss beside a longer one.

Cutting a window by length changes how much its samples are padded. That changes nothing where padding is left out: by
an attention mask, by causal attention, by labels of -100. Where it is not, the loss of a sample depends on what it was
padded beside, in any training with such a collate function; people should know before they compare two of them.
"""

from typing import Any

import torch

from autoaccum.data import tree
from autoaccum.loss.objective import Objective
from autoaccum.model.precision import Precision
from autoaccum.model.snapshot import Snapshot

__all__ = ["padding_error"]

# Relative errors that rounding alone may make.
_ROUNDING, _ROUNDING_16_BITS = 1e-3, 5e-2


def padding_error(
    objective: Objective, alone: tuple[Any, Any], together: Any, device: torch.device, precision: Precision
) -> float | None:
    """By how much the loss of a short sample differs beside a long one, as a share of it; None where it does not.

    Args:
        objective: gives the loss's numerators, which are sums over what counts.
        alone: a batch of a short sample and one of a long sample, on the host.
        together: both in one batch.
        device: where the model is.
        precision: what it computes in.
    """
    sums = []
    with Snapshot(objective.model, device=device, parameters=False), torch.no_grad():
        objective.model.eval()
        for batch in (*alone, together):
            known = objective.denominators(batch)
            with precision.autocast():
                terms = objective.terms(tree.move(batch, device), known)
            sums.append(sum(float(term.numerator) for term in terms.values()))
    short, long, both = sums
    error = abs(both - short - long) / abs(short) if short else 0.0
    exact = precision.name == "fp32" and all(p.dtype.itemsize > 2 for p in objective.model.parameters())
    rounding = (_ROUNDING if exact else _ROUNDING_16_BITS) * (1.0 + abs(long / short) if short else 1.0)
    return error if error > rounding else None

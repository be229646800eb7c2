"""Population statistics for BatchNorm: an optional pass over data when training has ended.

The running statistics of training are an exponential average: it remembers about 1/momentum windows, and each was seen
under the parameters of its own time. `recalibrate` replaces them by those of the data under the final parameters, which
Wu and Johnson (2021, arXiv 2105.07576) found to validate better and more steadily, small batches above all.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.errors import DataError
from autoaccum.ranks import Ranks, here
from autoaccum.window.batch_norm import PooledStatistics

__all__ = ["recalibrate"]


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any], Any] | None = None,
    ranks: Ranks | None = None,
) -> int:
    """Sets the running mean and variance of each normalisation layer to those of all its inputs over `batches`.

    Draw an input element X of one channel by first drawing its batch J, with probability n_j / N (n_j elements of
    N = Σ n_j). Then

        E[X]   = E[E[X | J]]                   = Σ n_j μ_j / N
        Var[X] = E[Var[X | J]] + Var[E[X | J]] = Σ n_j v_j / N + Σ n_j (μ_j − E[X])² / N

    with the batches' own means μ_j and variances v_j (divided by n_j). So one pass gives the statistics of the whole
    data exactly in a layer whose input does not depend on the cut into batches, such as the first; the variance is
    stored unbiased, times N / (N − 1), as torch stores it. A deeper layer's input was normalised by the statistics of
    its batch: use batches as large as fit, as these statistics are to stand for many samples.

    The layers that count are those in training mode; in a model in eval mode, all of them. Everything else runs in eval
    mode (no dropout), without gradients; every module's mode is put back. `num_batches_tracked` stays as it is.

    Args:
        model: its layers' running statistics are replaced.
        batches: batches as `call` takes them; on the model's device, unless `call` moves them.
        call: runs the forward of one batch. None: `model(batch)`.
        ranks: where each rank has batches of its own, the statistics are of all of them. None: the default process
            group, where there is one.

    Returns:
        How many batches were seen, over all ranks.

    Raises:
        DataError: there were none. As after any error, the model is as it was before.
    """
    ranks = ranks if ranks is not None else here()
    modes = [(module, module.training) for module in model.modules()]
    with PooledStatistics(model) as statistics:
        chosen: list[Any] = [layer for _, layer in statistics.layers if layer.training or not model.training]
        kept = [(layer, layer.momentum, _copy(layer.num_batches_tracked)) for layer in chosen]
        try:
            model.eval()
            for layer in chosen:
                layer.train()
                layer.momentum = 1.0
            statistics.begin()
            seen = round(ranks.tally("recalibration", [_run(batches, model if call is None else call)])[0])
            if not seen:
                raise DataError("there are no batches to take statistics from: give at least one")
            statistics.commit(ranks)
        finally:
            statistics.discard()  # nothing, where it was committed
            for layer, momentum, count in kept:
                layer.momentum = momentum
                if count is not None:
                    layer.num_batches_tracked.copy_(count)
            for module, training in modes:
                module.training = training
    return seen


@torch.no_grad()
def _run(batches: Iterable[Any], call: Callable[[Any], Any]) -> int:
    seen = 0
    for batch in batches:
        call(batch)
        seen += 1
    return seen


def _copy(count: Tensor | None) -> Tensor | None:
    return None if count is None else count.clone()

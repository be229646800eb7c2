"""The sum of a window's gradients over the ranks: readied before the vote, run after it.

Choices:
- Most windows leave gradients for the same parameters on every rank. The vote compares that by a number, and the sum
  can then be run at once. Otherwise, and where gradients are sparse, the ranks tell each other what they have and
  `level` gives each rank zeros for what it lacks; a second vote follows, since that takes memory.
- Sparse gradients stay sparse. Each rank's rows are gathered and added, which works alike on gloo and NCCL (NCCL
  reduces no sparse tensors), and costs what is non-zero instead of the whole table. One that is dense on another rank
  becomes dense, as it would in a single process.
"""

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from autoaccum.model.precision import SideBuffers, untouched_rows
from autoaccum.ranks import Flight, Ranks, digest
from autoaccum.window.sharded import ShardedPasses

__all__ = ["RankSum"]


class RankSum:
    """Adds up the gradients of `parameters`, which all ranks have in the same order.

    `layout` tells what kinds of gradients this rank has from other kinds, and is odd where one is sparse. `uneven`: by
    the last vote, the ranks must `level` and vote again before they `run`; the same on all of them.
    """

    def __init__(
        self, ranks: Ranks, parameters: Sequence[nn.Parameter], side: SideBuffers, sharded: ShardedPasses | None = None
    ) -> None:
        """Keeps references only. `sharded` has summed the gradients of the parameters that it holds."""
        self._ranks, self._parameters, self._side = ranks, parameters, side
        self._sharded = sharded
        self._unused: list[nn.Parameter] = []  # sharded, and without a gradient on all ranks
        self._flight = Flight()
        self.layout, self.uneven = 0, False

    def ready(self) -> None:
        """Allocates what the sum needs where all ranks have such gradients as this one; nothing after it may fail."""
        if self._sharded is not None:
            self._unused = [each for each in self._parameters if self._is_unused(each)]
        if self._ranks.size == 1:
            return
        gradients = self._gradients()
        kinds = [_kind(gradient) for gradient in gradients]
        sparse = max(kinds, default=0) > 0
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is not None and gradient.is_sparse:
                self._side.put(parameter, gradient.coalesce())
        self.layout = 2 * digest(kinds) + sparse
        own = [g for p, g in zip(self._parameters, gradients) if g is not None and not self._is_summed(p)]
        self._flight = Flight() if sparse else self._ranks.ready(own)

    def _is_summed(self, parameter: nn.Parameter) -> bool:
        return self._sharded is not None and self._sharded.holds(parameter)

    def _is_unused(self, parameter: nn.Parameter) -> bool:
        """Whether no pass gave a sharded parameter a gradient on this rank, of which FSDP has zeros then."""
        return self._sharded is not None and self._sharded.holds(parameter) and not self._sharded.used(parameter)

    def _gradients(self) -> list[Tensor | None]:
        return [None if self._is_unused(each) else self._side.gradient(each) for each in self._parameters]

    def vote(self, what: str, values: Sequence[float]) -> list[float]:
        """The sums of `values` over all ranks, which compare their layouts as well."""
        sums, layouts = self._ranks.meet(what, values, own=self.layout)
        self.uneven = len(set(layouts)) > 1 or bool(layouts[0] % 2)
        return sums

    def level(self, what: str) -> None:
        """Brings all ranks' gradients to one layout, and allocates what their sum needs: then they vote once more."""
        self._flight = Flight()
        own = [(_kind(g), g._nnz() if g is not None and g.is_sparse else 0) for g in self._gradients()]
        # As text: each rank has rows of its own number, and a collective's sizes must be known on all of them first.
        answers = self._ranks.collect(f"{what}, over which gradients there are", json.dumps(own).encode())
        self._allocate(list(zip(*map(json.loads, answers), strict=True)))
        self.layout = 0

    def _allocate(self, held: Sequence[Sequence[tuple[int, int]]]) -> None:
        """By what each rank has of each parameter's gradient: its kind, and its rows where it is sparse."""
        dense: list[Tensor] = []
        for parameter, each in zip(self._parameters, held, strict=True):
            kinds, rows = zip(*each, strict=True)
            if max(kinds) < 0:  # what no rank used keeps none, as it would on one rank
                continue
            if self._is_summed(parameter):
                self._unused = [other for other in self._unused if other is not parameter]
                continue
            gradient = self._side.gradient(parameter)
            if 0 in kinds:
                if gradient is None:
                    gradient = torch.zeros_like(parameter, dtype=self._side.dtype(parameter))
                elif gradient.is_sparse:
                    gradient = gradient.to_dense()
                self._side.put(parameter, gradient)
                dense.append(gradient)
                continue
            if gradient is None:  # sparse where all others are: optimizers for sparse gradients take no dense ones
                gradient = untouched_rows(parameter, 0, self._side.dtype(parameter), max(kinds))
                self._side.put(parameter, gradient)
            self._gather(parameter, gradient.coalesce(), rows)
        flight = self._ranks.ready(dense)
        self._flight.starts += flight.starts
        self._flight.lands += flight.lands

    def _gather(self, parameter: nn.Parameter, own: Tensor, rows: Sequence[int]) -> None:
        places, indices = self._ranks.ready_rows(own.indices().T.contiguous(), rows)
        entries, values = self._ranks.ready_rows(own.values(), rows)

        def land() -> None:
            both = torch.cat(indices).T, torch.cat(values)
            made = torch.sparse_coo_tensor(*both, tuple(own.shape), check_invariants=False)
            self._side.put(parameter, made.coalesce())

        self._flight.starts += [*places.starts, *entries.starts]
        self._flight.lands.append(land)

    def run(self) -> None:
        """Communicates. Every parameter that any rank has a gradient for then has the sum."""
        self._ranks.run(self._flight)
        for parameter in self._unused:  # as on one rank, where an optimizer passes over it
            self._side.drop(parameter)
        self.drop()

    def drop(self) -> None:
        """Lets go of what was allocated."""
        self._flight = Flight()


def _kind(gradient: Tensor | None) -> int:
    """-1: none, 0: dense, else the number of sparse dimensions."""
    if gradient is None:
        return -1
    return gradient.sparse_dim() if gradient.is_sparse else 0

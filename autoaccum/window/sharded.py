"""Windows of a sharded model, whose ranks meet inside each forward and backward pass.

Choices:
- All ranks run as many passes in a window: who has fewer micro-batches fills up with passes of a short sample that
  count nothing. Their gradients enter the sums as zeros, and nothing else of them stays.
- A rank that fails inside a pass runs it again with such a sample, and swallows the collectives that it has issued
  already. It goes on so to the window's end, where it meets the others as one that failed anywhere else does: then all
  replay the window, or all raise.
- Gradients are summed and scattered in each pass, undivided: they stay sharded, which is the memory that one shards
  for, and the window's denominators are over all ranks already. Or whole gradients wait for the last pass (`late`),
  where a probe found room for them and that it is faster.
- Before the first window all ranks compare what they will issue, by a pass that talks to nobody.
"""

import gc
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoaccum.batch_norm.norm_layer import has_running_statistics
from autoaccum.data import tree
from autoaccum.errors import AutoaccumError, SetupError
from autoaccum.model.precision import global_norm
from autoaccum.model.shards import Shards
from autoaccum.ranks import LostRankError, Ranks, digest, told
from autoaccum.window.window_start import WindowStart

__all__ = ["ShardedPasses", "norm_over_ranks"]

_ATTEMPTS = 3  # at finishing a pass that failed

# How FSDP's groups of parameters are reduced while a window is open.
_UNDIVIDED = {
    "gradient_divide_factor": 1.0,
    "force_sum_reduction_for_comms": True,
    # A branch that one rank's samples leave out must not leave its gradients out of what the ranks sum.
    "reduce_scatter_unused_params": True,
    "reduce_grads": True,
    "all_reduce_grads": True,
    "reshard_after_backward": True,  # so that every pass issues the same
}


class ShardedPasses:
    """The passes of one sharded model on this rank.

    Attributes:
        collectives: what they issue.
        sample: what passes that count nothing run on, on the host; None until a window had one.
        replicas: how many ranks hold the same shard.
        late: gradients are summed over the ranks in a window's last pass only.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, device: torch.device) -> None:
        """Looks at the model, which stays as it is; a SetupError where it is sharded over other ranks than train."""
        from autoaccum.ranks.collectives import Collectives  # imports torch.distributed

        self._ranks = ranks
        self._shards = Shards(model)
        for group in self._shards.groups:
            over = group.mesh_info.shard_mesh_size * getattr(group.mesh_info, "replicate_mesh_size", 1)
            if over != ranks.size:
                raise SetupError(
                    f"the model is sharded over {over} ranks, and {ranks.size} train: give fully_shard a mesh of all "
                    "of them, of one dimension or two (replicate, shard)"
                )
        self.collectives = Collectives()
        self._resting = {module for module in model.modules() if has_running_statistics(module)}
        self._start = WindowStart([model], device, without=self._resting)
        self.sample: Any = None
        self._compared = self.late = False
        self._parameters = {id(parameter): parameter for parameter in self._shards.parameters}
        self._used: set[int] = set()
        self._whole: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        self._before: list[dict[str, Any]] = []
        self.replicas = self._shards.replicas()
        self.collectives.caught_up = lambda: self._all_reduce(True)

    def holds(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is sharded, so that passes have summed its gradient already."""
        return id(parameter) in self._parameters

    def used(self, parameter: nn.Parameter) -> bool:
        """Whether a pass of this window has given a sharded parameter a gradient on this rank."""
        return id(parameter) in self._used

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """What passes use of a parameter, once a window was begun: of a sharded one, all of it."""
        return self._whole.get(id(parameter), parameter)

    # --- a window

    def keep_sample(self, batches: Sequence[Any], minimum: int) -> None:
        """Keeps a short sample of the window's micro-batches, unless there is one; a SetupError where there is none."""
        if self.sample is not None:
            return
        if not batches:
            raise SetupError(
                f"rank {self._ranks.rank} has no samples in its first window, and a sharded model runs on every rank: "
                f"give windows of {self._ranks.size} samples or more"
            )
        size = tree.batch_size(batches[0])
        few = tree.split(batches[0], [minimum, size - minimum])[0] if size > minimum else batches[0]
        self.sample = tree.map_tensors(torch.clone, few)

    def begin(self, what: str) -> None:
        """Sums undivided through our own collectives, until `end`. All ranks call this, at `what`."""
        self.end()
        self._shards.reset()
        self._used.clear()
        if not self._hooks:
            self._ranks.tally(what)  # whoever has failed is heard here, and not waited for in a gathering
            for shard, whole in self._shards.gather_once():
                self._whole[id(shard)] = whole
                if whole.requires_grad:
                    hook: Any = whole.register_post_accumulate_grad_hook
                    self._hooks.append(hook(partial(self._note, id(shard))))
        ours = {**_UNDIVIDED, "_all_gather_comm": self.collectives.gather,
                "_reduce_scatter_comm": self.collectives.scatter}  # fmt: skip
        for group in self._shards.groups:
            self._before.append({name: getattr(group, name) for name in ours})
            vars(group).update(ours)

    def _note(self, shard: int, parameter: Tensor) -> None:
        if not self.collectives.muted:
            self._used.add(shard)

    def end(self) -> None:
        """Gives FSDP what it had."""
        for group, before in zip(self._shards.groups, self._before):
            vars(group).update(before)
        if self._before:
            self._shards.reset()
        self._before = []

    def close(self) -> None:
        """Takes everything off the model."""
        self.end()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.collectives.close()

    def compare(self, empty_pass: Callable[[Any], None]) -> None:
        """Once: compares over the ranks what a pass issues, by one that talks to nobody. All ranks call this."""
        if self._compared or self._ranks.size == 1:
            return
        self._compared, collectives = True, self.collectives
        collectives.alone, collectives.sequence = True, []
        try:
            self._all_reduce(False)
            with self.counting_nothing():
                empty_pass(self.sample)
        finally:
            collectives.alone = False
            self._shards.reset()
            self._all_reduce(True)
        sequence = collectives.sequence
        facts = {"the number of collectives in a pass": len(sequence), "their order and sizes": digest(sequence)}
        advice = "Build and shard the model alike on every rank: all must run the same modules"
        self._ranks.agree("the first pass", facts, advice)

    def run(
        self, batches: Sequence[Any], passes: int, train: Callable[[Any], None], empty_pass: Callable[[Any], None]
    ) -> None:
        """Runs passes that count nothing, so that with this rank's micro-batches there are `passes`, and then these.

        What a pass raised on this rank is raised once all are over.

        Args:
            batches, passes: this rank's, and the most micro-batches on any rank.
            train: the forward and backward of one.
            empty_pass: that of the short sample, into no sum of the window's.
        """
        failed: Exception | None = None
        idle = passes - len(batches)
        for number in range(passes):
            self.begin_pass(last=number == passes - 1)
            trains = failed is None and number >= idle
            if trains:
                try:
                    train(batches[number - idle])
                    continue
                except LostRankError:
                    raise
                except Exception as error:
                    failed = error
                _forget(failed)
            self._finish(empty_pass, again=trains)
        if failed is not None:
            raise failed

    def begin_pass(self, *, last: bool) -> None:
        """A pass of the window begins, on all ranks; `last`: no other follows."""
        self.collectives.begin()
        for group in self._shards.groups:
            group.reduce_grads = last or not self.late

    def _finish(self, empty_pass: Callable[[Any], None], *, again: bool) -> None:
        """Finishes a pass with the short sample, whatever this rank has issued of it already."""
        for left in reversed(range(_ATTEMPTS)):
            if again:
                gc.collect(1)
                self._shards.reset()
                self.collectives.place = 0
                self._all_reduce(not self.collectives.done)
            try:
                with self.counting_nothing():
                    empty_pass(self.sample)
                return
            except LostRankError:
                raise
            except Exception as error:
                if not left:
                    text = "failed in a pass in which the others wait for it, and could not finish it even with"
                    why = f"{type(error).__name__}: {error}"
                    raise told(AutoaccumError(f"this rank {text} a single sample: {why}")) from error
                _forget(error)
            again = True

    def _all_reduce(self, does: bool) -> None:
        """On a mesh of two dimensions: whether sums go on over the replicas. Not of what is swallowed."""
        for group in self._shards.groups:
            if group._is_hsdp:
                group.all_reduce_grads = does
                group._partial_reduce_output = None

    @contextmanager
    def counting_nothing(self) -> Iterator[None]:
        """A forward and a backward pass inside leave nothing: no gradient, statistic or random number.

        Normalisation layers are in evaluation mode meanwhile: a single sample has no statistics.
        """
        self._start.mark()
        training = [module for module in self._resting if module.training]
        self.collectives.muted = True
        for module in training:
            module.training = False
        try:
            yield
        finally:
            self.collectives.muted = False
            if self.late:
                self._shards.drop_whole()
            for module in training:
                module.training = True
            self._start.restore()


def norm_over_ranks(
    gradients: Sequence[tuple[nn.Parameter, Tensor]], passes: ShardedPasses | None, ranks: Ranks, what: str
) -> Tensor:
    """The L2 norm of the whole model's gradients, whose shards this rank has; all ranks call this where some have."""
    if passes is None:
        return global_norm([gradient for _, gradient in gradients])
    parts = [gradient for parameter, gradient in gradients if passes.holds(parameter) and gradient.numel()]
    whole = [gradient for parameter, gradient in gradients if not passes.holds(parameter)]
    own = float(global_norm(parts)) ** 2 / passes.replicas if parts else 0.0
    square = ranks.tally(what, [own])[0] + (float(global_norm(whole)) ** 2 if whole else 0.0)
    return torch.tensor(square**0.5, dtype=torch.float64)


def _forget(error: BaseException) -> None:
    """Lets go of the tensors that the frames of an error hold; what they are called and where stays to be read."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__

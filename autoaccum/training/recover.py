"""One window, trained whatever happens: out of memory, it runs again, the same samples in more pieces.

Where malloc had kept freed blocks under a limit on the process, it first gives them back, and the pieces stay.

The failed attempt leaves nothing behind: its gradients and pooled statistics are dropped, every buffer and random
generator returns to the window's start. The restart happens outside the `except` block, since the traceback holds the
tensors of the step that failed. On several ranks all replay together, after the vote that comes before the window's
only sum of gradients.

Any other error leaves everything as it was before the window. Only what happens inside the optimizer's step cannot be
undone: its state may be half updated then, and is not trusted.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from autoaccum.batch_norm.pooled_statistics import needs_two
from autoaccum.data import tree
from autoaccum.data.structure import tensors_in
from autoaccum.data.windows import Window
from autoaccum.errors import AutoaccumError, DataError, LossError
from autoaccum.memory.budget import Device
from autoaccum.memory.oom import Verdict
from autoaccum.memory.oom import out_of_memory as judge
from autoaccum.random_state import RandomState
from autoaccum.ranks import told
from autoaccum.training.blame import culprits, listed, named
from autoaccum.training.events import Events, WindowReplayed
from autoaccum.training.smaller import PERSISTENT, Replays, cut_in_half, cut_smaller, with_floor
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.record import StepRecord
from autoaccum.window.window_start import WindowStart

__all__ = ["OptimizerOutOfMemoryError", "SafeWindow"]


class OptimizerOutOfMemoryError(AutoaccumError, torch.cuda.OutOfMemoryError):
    """Memory ran out inside the optimizer's step, so that its state and the weights may be half updated."""


class SafeWindow:
    """Trains one window at a time.

    Attributes:
        replays: how small micro-batches have become.
        inside: a window is being trained.
        broken: what left the weights half updated; None where nothing did.
        overdue: the first rank wanted a checkpoint when the window ran, and all of them know.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        modules: Sequence[nn.Module],
        device: Device,
        events: Events,
        regrow_after: int | None,
        wants_checkpoint: Callable[[], bool] = lambda: False,
        verified: int | None = None,
        noted: Callable[[], Any] | None = None,
    ) -> None:
        """Keeps references only.

        Args:
            accumulator, device, events: run the window, and hear of replays.
            modules: whose buffers return to the window's start.
            regrow_after: undisturbed windows after which larger micro-batches are tried again.
            wants_checkpoint: asked on the first rank, whose answer holds for all.
            verified: a micro-batch that the probe ran; None: none was.
            noted: what a trainer's step has noted beside its loss; goes back with `restore()`. None: it notes nothing.
        """
        self._wants_checkpoint = wants_checkpoint
        self._accumulator, self._device, self._events = accumulator, device, events
        self._start = WindowStart(modules, device.torch_device, noted)
        self.replays = Replays(regrow_after, verified)
        self._strained = 0  # windows in a row in which the allocator had to empty its cache
        self._easing = False
        self._kept = False  # each rank that ran out had kept freed blocks, and has given them back since
        self.inside = False
        self.broken: str | None = None
        self.overdue = False

    def train(self, window: Window, random: RandomState | None = None) -> StepRecord:
        """One window, replayed in smaller pieces until it fits; `random`: the generators as they are, where known.

        Raises:
            NothingFitsError: memory ran out at the smallest micro-batch.
            OptimizerOutOfMemoryError: memory ran out inside the optimizer's step.
            LossError: the loss is not finite, and such windows are not skipped.
        """
        self._accumulator.epoch = window.epoch
        self.inside = True
        self._start.mark(random)
        retries = self._device.retries()
        versions = _versions(window)
        try:
            self._run(window, versions)
        except BaseException:
            self._back()
            raise
        record = self._finish(window)
        self.inside = False
        self._strained = self._strained + 1 if self._device.retries() > retries else 0
        if self._easing:
            self._ease()
        grown = self.replays.grow(self._accumulator.plan)
        if grown is not None:
            self._accumulator.plan = grown
            self._events.note(f"windows have run undisturbed: micro-batches of {grown.micro_batch} are tried again")
        return record

    def _ease(self) -> None:
        """Somewhat smaller micro-batches, since a rank's allocator has retried window after window."""
        accumulator = self._accumulator
        strained = self._strained > PERSISTENT
        plan = self.replays.ease(accumulator.plan, strained, accumulator.ranks, accumulator.step + 1)
        if plan is not accumulator.plan:
            accumulator.plan = plan
            self._events.note(plan.reasons["limit"])
        self._strained, self._easing = 0, False

    def _run(self, window: Window, versions: Sequence[int]) -> None:
        """Forward and backward of all pieces, until memory is enough on all ranks; a DataError where the model wrote
        into them.
        """
        ranks, pieces = self._accumulator.ranks, window.batches
        while True:
            here = self._attempt(partial(self._pass, pieces), pieces)
            out_of_memory, too_small = self._vote(*here)
            rank_sum = self._accumulator.rank_sum
            if rank_sum.uneven and not out_of_memory and not too_small:
                here = self._attempt(partial(rank_sum.level, self._accumulator.place), pieces)
                out_of_memory, too_small = self._vote(*here)
            if not out_of_memory and not too_small:
                return
            self._accumulator.discard()
            self._start.restore()
            self._device.release()  # what malloc kept as well
            if _versions(window) != versions:
                raise DataError(
                    f"step {self._accumulator.step + 1} ran out of memory and cannot be run again in smaller pieces, "
                    "since the model writes into its inputs in place and its samples are no longer what they were: "
                    "have it work on a copy (x = x * 2 for x.mul_(2)), or lower max_batch"
                )
            if too_small:
                self._accumulator.plan = with_floor(self._accumulator.plan)
                pieces = cut_smaller(window.batches, self._accumulator.plan.limits[ranks.rank], 2)
            elif self._kept:
                self._tell_given_back()
            else:
                pieces = self._in_smaller_pieces(pieces, ran_out=here[0])

    def _pass(self, pieces: list[Any]) -> None:
        """All of a window up to the vote."""
        self._accumulator.open(pieces)
        self._accumulator.run(pieces)
        self._accumulator.rank_sum.ready()

    def _vote(self, ran_out: bool, too_small: bool) -> tuple[bool, bool]:
        """Whether memory ran out on any rank, and whether a micro-batch was too small on any."""
        wants = self._accumulator.ranks.rank == 0 and self._wants_checkpoint()
        short = ran_out and not self._device.keeps  # else its holes may have been what was missing
        votes = self._accumulator.vote([ran_out, too_small, wants, self._strained >= PERSISTENT, short])
        ran_out, too_small, self.overdue, self._easing, short = map(bool, votes)
        self._kept = ran_out and not short
        return ran_out, too_small

    def _attempt(self, work: Callable[[], None], pieces: list[Any]) -> tuple[bool, bool]:
        """(whether memory ran out in `work`, whether a BatchNorm layer took no single sample); what it held is free
        then.
        """
        accumulator = self._accumulator
        try:
            work()
        except Exception as error:
            if accumulator.stepping:  # in the backward pass: its window cannot be run again
                self._break(error)
                raise
            if accumulator.meets_inside and accumulator.is_open:
                raise told(_cut_off(error, accumulator.step + 1)) from error
            # On several ranks an error before the window is open is in the middle of an exchange, and ends them all.
            opened = accumulator.ranks.size == 1 or accumulator.is_open
            if opened and _is_for_memory(error, pieces, accumulator.plan.minimum):
                return True, False
            if opened and needs_two(error) and accumulator.plan.minimum == 1 and sum(map(tree.batch_size, pieces)) > 1:
                return False, True
            raise
        return False, False

    def _tell_given_back(self) -> None:
        plan, step = self._accumulator.plan, self._accumulator.step + 1
        text = (
            f"out of memory in step {step} while malloc kept freed blocks, whose holes count under the limit on this "
            "process: the same samples run again in the same micro-batches, and blocks are given back from here on, "
            f"which takes less memory and more time; the batch stays {plan.target_batch}"
        )
        self._events.warn(text, WindowReplayed(step, plan.micro_batch, plan.accumulation_steps, text))

    def _in_smaller_pieces(self, pieces: list[Any], *, ran_out: bool) -> list[Any]:
        accumulator, step = self._accumulator, self._accumulator.step + 1
        largest = max(map(tree.batch_size, pieces), default=0)
        plan, limit = self.replays.shrink(accumulator.plan, largest, ran_out, accumulator.ranks, step)
        if not plan.by_length:
            smaller = cut_smaller(pieces, limit, plan.minimum)
        else:
            smaller = cut_in_half(pieces, plan.minimum) if ran_out else pieces
        accumulator.plan = plan
        text = plan.reasons["limit"]
        self._events.warn(text, WindowReplayed(step, plan.micro_batch, plan.accumulation_steps, text))
        return smaller

    def _finish(self, window: Window) -> StepRecord:
        """The step itself. Whatever ends it half-way leaves weights that nobody can trust."""
        try:
            record = self._accumulator.finish()
        except BaseException as error:
            if not self._accumulator.stepping:  # nothing was stepped
                self._back()
                if not isinstance(error, LossError):
                    raise
                where = f"In window {window.index} of epoch {window.epoch}, {self._blame(window)}"
                raise LossError(f"{error}. {where}") from None
            self._accumulator.discard()
            self._break(error)
            raise
        if not math.isfinite(record.loss):
            self._start.restore_buffers()  # left out, and running statistics must not keep what was not finite
            samples = listed(range(window.samples), window.indices)
            record = replace(record, skipped=f"{record.skipped}; the window has {samples}")
        return record

    def _break(self, error: BaseException) -> None:
        """Notes that an error has left the weights half updated; whoever calls raises it.

        Raises:
            OptimizerOutOfMemoryError: in its place, where memory ran out.
        """
        self.broken = f"{type(error).__name__} inside the step {self._accumulator.step + 1}"
        if judge(error) is Verdict.SURELY:
            raise OptimizerOutOfMemoryError(
                f"memory ran out inside the optimizer's step {self._accumulator.step + 1}: its state and the weights "
                "may be half updated, and are not trusted"
            ) from error

    def _blame(self, window: Window) -> str:
        places: list[int] = []
        if self._accumulator.sharded is None:  # whose ranks meet in each forward
            try:
                places = culprits(window.batches, self._accumulator)
            finally:
                self._start.restore()
        return named(places, window.samples, window.indices)

    def _back(self) -> None:
        """To the window's start."""
        self._accumulator.discard()
        self._start.restore()
        self.inside = False


def _cut_off(error: Exception, step: int) -> AutoaccumError:
    """An error where the other ranks wait inside a layer, and no vote reaches them."""
    memory = judge(error) is Verdict.SURELY
    what = "memory ran out" if memory else f"{type(error).__name__}: {error}"
    help_ = "; lower max_batch, or train with BatchNorm, whose running statistics are pooled over the ranks as well"
    return AutoaccumError(
        f"{what} in step {step}, in which the other ranks wait in a SyncBatchNorm layer for this one, so that it "
        f"cannot be run again{help_ if memory else ''}"
    )


def _versions(window: Window) -> list[int]:
    """How often each of the window's tensors was written to."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(window.batches)]


def _is_for_memory(error: BaseException, pieces: Sequence[Any], minimum: int) -> bool:
    """Whether smaller micro-batches may get past `error`.

    What may be for want of memory is tried smaller too: if that was not it, it fails again at the smallest, and counts.
    """
    verdict = judge(error)
    smallest = max(map(tree.batch_size, pieces), default=0) <= minimum
    return verdict is Verdict.SURELY or (verdict is Verdict.PERHAPS and not smallest)

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
from autoaccum.window.phase import Phase
from autoaccum.window.record import StepRecord
from autoaccum.window.window_start import WindowStart

__all__ = ["OptimizerOutOfMemoryError", "SafeWindow"]


class OptimizerOutOfMemoryError(AutoaccumError, torch.cuda.OutOfMemoryError):
    """Memory ran out inside the optimizer's step, so that its state and the weights may be half updated."""


class SafeWindow:
    """Trains one window at a time, of one optimizer.

    Attributes:
        accumulator, phase: run the windows; whose they are, where several optimizers take turns.
        replays: how small micro-batches have become.
        inside: a window is being trained.
        broken: what left the weights half updated; None where nothing did.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        modules: Sequence[nn.Module],
        device: Device,
        events: Events,
        regrow_after: int | None,
        verified: int | None = None,
        noted: Callable[[], Any] | None = None,
        phase: Phase | None = None,
    ) -> None:
        """Keeps references only.

        Args:
            accumulator, phase: as the attributes.
            device, events: what memory is asked for, and who hears of replays.
            modules: whose buffers return to the window's start.
            regrow_after: undisturbed windows after which larger micro-batches are tried again.
            verified: a micro-batch that the probe ran; None: none was.
            noted: what a trainer's step has noted beside its loss; goes back with `restore()`. None: it notes nothing.
        """
        self.accumulator, self.phase = accumulator, phase
        self._device, self._events = device, events
        self._start = WindowStart(modules, device.torch_device, noted)
        self.replays = Replays(regrow_after, verified)
        self._strained = 0  # windows in a row in which the allocator had to empty its cache
        self._easing = False
        self._kept = False  # each rank that ran out had kept freed blocks, and has given them back since
        self.inside = False
        self.broken: str | None = None

    def train(self, window: Window, random: RandomState | None = None) -> StepRecord:
        """One window, replayed in smaller pieces until it fits; `random`: the generators as they are, where known.

        Raises:
            NothingFitsError: memory ran out at the smallest micro-batch.
            OptimizerOutOfMemoryError: memory ran out inside the optimizer's step.
            LossError: the loss is not finite, and such windows are not skipped.
        """
        self.accumulator.epoch = window.epoch
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
        plan, ranks = self.accumulator.plan, self.accumulator.ranks
        if self._easing:
            plan = self.replays.ease(plan, self._strained > PERSISTENT, ranks, self.accumulator.step + 1)
            self._strained, self._easing = 0, False
            if plan is not self.accumulator.plan:
                self._events.note(plan.reasons["limit"])
        grown = self.replays.grow()
        if grown is not None:
            plan = grown
            self._events.note(f"windows have run undisturbed: micro-batches of {grown.micro_batch} are tried again")
        self.accumulator.plan = plan
        return record

    def _run(self, window: Window, versions: Sequence[int]) -> None:
        """Forward and backward of all pieces, until memory is enough on all ranks; a DataError where the model wrote
        into them.
        """
        ranks, pieces = self.accumulator.ranks, window.batches
        while True:
            here = self._attempt(partial(_until_the_vote, self.accumulator, pieces), pieces)
            out_of_memory, too_small = self._vote(*here)
            rank_sum = self.accumulator.rank_sum
            if rank_sum.uneven and not out_of_memory and not too_small:
                here = self._attempt(partial(rank_sum.level, self.accumulator.place), pieces)
                out_of_memory, too_small = self._vote(*here)
            if not out_of_memory and not too_small:
                return
            self.accumulator.discard()
            self._start.restore()
            self._device.release()  # what malloc kept as well
            if _versions(window) != versions:
                raise DataError(
                    f"step {self.accumulator.step + 1} ran out of memory and cannot be run again in smaller pieces, "
                    "since the model writes into its inputs in place and its samples are no longer what they were: "
                    "have it work on a copy (x = x * 2 for x.mul_(2)), or lower max_batch"
                )
            if too_small:
                self.accumulator.plan = with_floor(self.accumulator.plan)
                pieces = cut_smaller(window.batches, self.accumulator.plan.limits[ranks.rank], 2)
            else:
                pieces = self._in_smaller_pieces(pieces, ran_out=here[0])

    def _vote(self, ran_out: bool, too_small: bool) -> tuple[bool, bool]:
        """Whether memory ran out on any rank, and whether a micro-batch was too small on any."""
        short = ran_out and not self._device.keeps  # else its holes may have been what was missing
        votes = self.accumulator.vote([ran_out, too_small, self._strained >= PERSISTENT, short])
        ran_out, too_small, self._easing, short = map(bool, votes)
        self._kept = ran_out and not short
        return ran_out, too_small

    def _attempt(self, work: Callable[[], None], pieces: list[Any]) -> tuple[bool, bool]:
        """(whether memory ran out in `work`, whether a BatchNorm layer took no single sample); what it held is free
        then.
        """
        accumulator = self.accumulator
        try:
            work()
        except Exception as error:
            if accumulator.stepping:  # in the backward pass: its window cannot be run again
                self._break(error)
                raise
            if accumulator.meets_inside and accumulator.is_open:
                raise told(
                    AutoaccumError(
                        f"{type(error).__name__} in step {accumulator.step + 1}, in which the other ranks wait in a "
                        f"SyncBatchNorm layer for this one, so that it cannot be run again: {error}. Where memory ran "
                        "out: lower max_batch, or train with BatchNorm, whose running statistics are pooled over the "
                        "ranks as well"
                    )
                ) from error
            # On several ranks an error before the window is open is in the middle of an exchange, and ends them all.
            if accumulator.ranks.size == 1 or accumulator.is_open:
                verdict, minimum, sizes = judge(error), accumulator.plan.minimum, list(map(tree.batch_size, pieces))
                # What may be for want of memory is tried smaller too: if that was not it, it fails again at the
                # smallest, and counts.
                maybe = verdict is Verdict.PERHAPS and max(sizes, default=0) > minimum
                if verdict is Verdict.SURELY or maybe:
                    return True, False
                if needs_two(error) and minimum == 1 and sum(sizes) > 1:
                    return False, True
            raise
        return False, False

    def _in_smaller_pieces(self, pieces: list[Any], *, ran_out: bool) -> list[Any]:
        """The pieces to run again; the same ones where malloc kept freed blocks, which it has given back since."""
        accumulator, step = self.accumulator, self.accumulator.step + 1
        plan = accumulator.plan
        if self._kept:
            text = (
                f"out of memory in step {step} while malloc kept freed blocks, whose holes count under the limit on "
                "this process: the same samples run again in the same micro-batches, and blocks are given back from "
                f"here on, which takes less memory and more time; the batch stays {plan.target_batch}"
            )
        else:
            largest = max(map(tree.batch_size, pieces), default=0)
            plan, limit = self.replays.shrink(plan, largest, ran_out, accumulator.ranks, step)
            if not plan.by_length:
                pieces = cut_smaller(pieces, limit, plan.minimum)
            elif ran_out:
                pieces = cut_in_half(pieces, plan.minimum)
            accumulator.plan, text = plan, plan.reasons["limit"]
        self._events.warn(text, WindowReplayed(step, plan.micro_batch, plan.accumulation_steps, text))
        return pieces

    def _finish(self, window: Window) -> StepRecord:
        """The step itself. Whatever ends it half-way leaves weights that nobody can trust."""
        try:
            record = self.accumulator.finish()
        except BaseException as error:
            if not self.accumulator.stepping:  # nothing was stepped
                self._back()
                if not isinstance(error, LossError):
                    raise
                places: list[int] = []
                if self.accumulator.sharded is None:  # whose ranks meet in each forward
                    try:
                        places = culprits(window.batches, self.accumulator)
                    finally:
                        self._start.restore()
                where = named(places, window.samples, window.indices)
                raise LossError(f"{error}. In window {window.index} of epoch {window.epoch}, {where}") from None
            self.accumulator.discard()
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
        self.broken = f"{type(error).__name__} inside the step {self.accumulator.step + 1}"
        if judge(error) is Verdict.SURELY:
            raise OptimizerOutOfMemoryError(
                f"memory ran out inside the optimizer's step {self.accumulator.step + 1}: its state and the weights "
                "may be half updated, and are not trusted"
            ) from error

    def _back(self) -> None:
        """To the window's start."""
        self.accumulator.discard()
        self._start.restore()
        self.inside = False


def _until_the_vote(accumulator: Accumulator, pieces: list[Any]) -> None:
    accumulator.open(pieces)
    accumulator.run(pieces)
    accumulator.rank_sum.ready()


def _versions(window: Window) -> list[int]:
    """How often each of the window's tensors was written to."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors_in(window.batches)]

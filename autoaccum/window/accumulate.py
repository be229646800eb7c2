"""One window: the micro-batches of one optimizer step, giving exactly the gradient of the whole batch.

The one rule: loss = Σ numerators / Σ denominators, over the window and all ranks. The window's batches wait on the
host, so where the denominators follow from the batches they are known before the first backward, and each
micro-batch's mean is weighted by its share of them. No rank talks to another while micro-batches run: then one vote,
one sum of the gradients, one clip, one step.

A window is opened (`open`), its micro-batches run (`run`, in passes.py, or `backward` for each in a loop of the user's
own), and it is finished (`finish`) or dropped (`discard`). `window` does all of it for a loop of the user's own; the
training loop calls the parts, since it may have to run a window again.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from autoaccum.batch_norm.pooled_statistics import unequal
from autoaccum.data import tree
from autoaccum.data.structure import plain
from autoaccum.errors import CheckpointError, LossError, SetupError
from autoaccum.interrupts import uninterrupted
from autoaccum.loss.call import scalar
from autoaccum.loss.divisor import Divisor
from autoaccum.loss.graph import read
from autoaccum.loss.mean import Mean, Sum
from autoaccum.model.optimizer import check_no_gradient
from autoaccum.model.precision import clip_by_norm, scaled_step
from autoaccum.model.shards import local
from autoaccum.window.agreement import agree_on_windows
from autoaccum.window.own_loop import adds_up, micro_batches, without_synchronisation
from autoaccum.window.record import StepRecord
from autoaccum.window.sharded import ShardedPasses, norm_over_ranks
from autoaccum.window.two_passes import TwoPasses
from autoaccum.window.window_sums import WindowSums

__all__ = ["Accumulator"]


class Accumulator(TwoPasses):
    """Turns the micro-batches of a window into one optimizer step, for people who keep their own loop.

    ```python
    accumulator = autoaccum.Accumulator(model, optimizer, plan)
    for images, target in loader:                                    # the target batch, on the host
        for images, target in accumulator.window((images, target)):  # micro-batches, on the device
            accumulator.backward(loss(model(images), target))
    ```

    Leaving the inner loop divides, clips, steps, zeroes, commits BatchNorm's statistics and advances the scheduler.
    """

    _ended: tuple[float, float] | None = None  # the open window's loss and correction, once the ranks voted

    def window(self, batches: Any) -> Iterator[Any]:
        """Yields the micro-batches of one window, on the device; the step follows the last one.

        Args:
            batches: one batch on the host, which is cut by the plan; or a list of micro-batches that are cut already,
                each a tuple, list or dict of one structure and within the plan's limit.

        Yields:
            Micro-batches of the same structure. Call `backward` once for each.

        Raises:
            LossError: `backward` was not called once for a micro-batch, or the loss is not finite.
            SetupError: the optimizer was stepped, or a gradient changed, in between.
        """
        pieces = micro_batches(batches, self.plan, self._own_loop.lists)
        sums = self.open(pieces)
        finished = False
        try:
            self._own_loop.opens(sums.total_samples)
            with self._own_loop.inside(lambda: self.stepping):
                if self.sharded is not None:  # as many passes as on any other rank
                    idle = max(sums.micro_batches) - len(pieces)
                    for number in range(idle):
                        self.sharded.begin_pass(last=number == idle - 1 and not pieces)
                        with self.precision.autocast(), self.sharded.counting_nothing():
                            yield plain(tree.move(self.sharded.sample, self.device))
                for number, piece in enumerate(pieces):
                    if self.sharded is not None:
                        self.sharded.begin_pass(last=number == len(pieces) - 1)
                    before = sums.done
                    with self.precision.autocast(), without_synchronisation(self.model):
                        yield plain(self._ahead.take(piece))
                    self._own_loop.check()
                    if sums.done != before + 1:
                        raise LossError(
                            f"backward was called {sums.done - before} times for one micro-batch: "
                            "call accumulator.backward(loss) exactly once for each"
                        )
            self.finish()
            finished = True
        except Exception:
            self.ranks.fail()  # the others stop in their next exchange, instead of waiting for this one
            raise
        finally:
            if not finished:  # left early, or no step was taken: part of a window is no step
                self.discard()

    def backward(self, loss: Tensor | Mean, denominator: float | Tensor | None = None) -> None:
        """Adds one micro-batch's gradient.

        Args:
            loss: its mean loss, a scalar with a graph; or a Mean.
            denominator: what that mean was divided by (tokens, a sum of weights). None: the targets that count, or
                their weights, of one of torch's negative log likelihoods; nothing, of one of torch's losses with
                reduction="sum", which is added up; else the micro-batch's samples.

        Raises:
            LossError: not a scalar, or without a graph; or its graph divides by another count than the samples.
        """
        sums = self._running()
        self._own_loop.check()
        if self.sharded is not None and self.sharded.collectives.muted:
            self._backward_of_nothing({"loss": loss if isinstance(loss, Mean) else Mean.of(loss, 1.0)})
            return
        if not isinstance(loss, Mean):
            loss = scalar(loss, "the micro-batch")
            terms = read(loss) if denominator is None else []
            if adds_up(terms):
                loss = Sum(loss, sums.samples[sums.done])
            elif len(terms) == 1 and terms[0].name.startswith("NllLoss"):
                loss = Divisor().mean(terms[0], loss, None, rehearses=False)
            else:
                if denominator is None:
                    denominator = sums.samples[sums.done]
                    self._own_loop.divisors.check(terms, denominator)
                loss = Mean.of(loss, denominator)
        self._add({"loss": loss})
        self._own_loop.note()

    # --- a window in parts, for the training loop, which may have to run one again

    @uninterrupted
    def open(self, batches: Sequence[Any]) -> WindowSums:
        """Opens a window over this rank's micro-batches, which wait on the host; none where the rank idles."""
        if self._sums is not None:
            raise SetupError(
                "the window before is still open: something holds its generator, which the loop over it was left by; "
                "let the generator go (del, or its close()) before the next window"
            )
        check_no_gradient(self.parameters)  # whatever was left there would be taken for this window's
        self._memory.reset_peak()
        if self.sharded is not None:
            self._begin_sharded(self.sharded, batches)
        denominators = self.objective.prepare(batches, rehearses=self.rehearses, on_phase=self.on_phase)
        if self._settings:
            facts = self.objective.reading.facts
            agree_on_windows(self.ranks, self.plan, self.model, self.optimizer, self._settings, facts)
            self._settings = {}
        sums = WindowSums(batches, self.objective, denominators, self.ranks, f"step {self.step + 1}")
        if self.meets_inside and len(set(sums.micro_batches)) > 1:
            raise SetupError(unequal(f"step {self.step + 1}", sums.micro_batches))
        self._sums = sums
        self._ahead.open(batches, rehearses=self.rehearses)
        self._statistics.begin(len(batches))
        watched = None if self.sharded is None else [self.sharded.whole(each) for each in self.parameters]
        self.noise_scale.open(sum(sums.micro_batches), watched)
        return sums

    def _begin_sharded(self, sharded: ShardedPasses, batches: Sequence[Any]) -> None:
        try:
            sharded.keep_sample(batches, self.plan.minimum)
        except SetupError:
            self.ranks.fail()
            raise
        sharded.late = self.plan.gradient_sync == "window"
        sharded.begin(self.place)
        if not self._is_told:
            sharded.compare(self._empty_pass)

    def vote(self, flags: Sequence[float] = ()) -> list[float]:
        """All ranks meet at the window's end, also those that failed in it; the sums of `flags` over the ranks.

        Where `rank_sum.uneven` is true afterwards, they `level` it and vote again before they `finish`.
        """
        reading, sums = self.objective.reading, (0.0, 0.0) if self._sums is None else self._sums.so_far
        noise = self.noise_scale.so_far() if self.ranks.size > 1 else []
        voted = self.rank_sum.vote(self.place, [*sums, *noise, *flags, *reading.floors])
        loss, late, *answers = reading.agree_on_floors(voted)
        self.noise_scale.over_ranks = answers[: len(noise)]
        self._ended = None if self._sums is None else self._sums.close(loss, late)
        return answers[len(noise) :]

    @property
    def place(self) -> str:
        """Where a rank is that is done with the window's micro-batches."""
        return f"the end of step {self.step + 1}"

    @uninterrupted
    def finish(self) -> StepRecord:
        """Sums over the ranks, corrects, clips, steps and zeroes; commits statistics; advances the scheduler.

        Raises:
            LossError: the loss, or a gradient norm that was asked for, is not finite; nothing was stepped.
        """
        sums = self._running()
        self._ahead.close()
        if self._ended is None:  # in a loop of one's own, where nobody has voted yet
            self.rank_sum.ready()
            self.vote()
            if self.rank_sum.uneven:
                self.rank_sum.level(self.place)
                self.vote()
        assert self._ended is not None
        loss, correction = self._ended
        lr = float(self.optimizer.param_groups[0]["lr"])  # of this step: the scheduler moves it on
        norm, skipped = None, self._why_not(sums, loss, correction)
        if skipped is None:
            norm, skipped = self._update(sums, correction)
        self.step += skipped is None
        self.skipped_windows += skipped is not None
        if self._statistics.is_open:  # what is not finite has dropped them
            self._statistics.commit(self.ranks)
        if self._steps or skipped is not None:  # else whoever steps takes the gradient first
            self._zero()
        self._close()
        self.stepping = False
        seconds = time.perf_counter() - sums.started
        self.last = StepRecord(
            step=self.step,
            epoch=self.epoch,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            samples=sums.total_samples,
            micro_batches=len(sums.samples),
            seconds=seconds,
            samples_per_second=sums.total_samples / seconds,
            peak_bytes=self._memory.peak(),
            noise_scale=self.noise_scale.value,
            skipped=skipped,
        )
        return self.last

    def _why_not(self, sums: WindowSums, loss: float, correction: float) -> str | None:
        """Why the window takes no step; None where it does."""
        if correction == 0:
            ignored = "every target of the window is ignored: its denominator is 0"
            return ignored if sums.total_samples else "the window has no samples"
        return None if math.isfinite(loss) else self._nonfinite(f"the loss of step {self.step + 1} is {loss}")

    def _update(self, sums: WindowSums, correction: float) -> tuple[float | None, str | None]:
        """The one step, of gradients × `correction` (for late denominators): (gradient norm, why it was skipped)."""
        scaler = self.precision.scaler
        self.on_phase("optimizer")
        self.rank_sum.run()  # from here on each rank has the whole window's gradient
        if scaler.is_enabled() and self._steps:
            scaler.unscale_(self.optimizer)
        held = self._gradients()
        gradients = [gradient for _, gradient in held]
        if correction != 1.0:
            for gradient in gradients:
                gradient.mul_(correction)
        asked = self._clip_norm is not None or self._log_grad_norm
        # A finite loss may have gradients that are not (a root of 0): to leave that window out, they are looked at.
        looks = asked or (self._on_nonfinite == "skip" and not any(gradient.is_sparse for gradient in gradients))
        norm = found = None
        if (gradients and looks) or (self.sharded is not None and (looks or self.noise_scale.watches)):
            norm = norm_over_ranks(held, self.sharded, self.ranks, f"the norm of step {self.step + 1}")
        whole = gradients if norm is None or self.sharded is None else [norm]
        self.noise_scale.finish(whole, sums.total_samples, correction)
        if norm is not None and looks:
            if self._clip_norm is not None:
                clip_by_norm(gradients, norm, self._clip_norm)
            found = float(norm)
            if not math.isfinite(found) and not scaler.is_enabled():  # a scaler sees to that itself
                skipped = self._nonfinite(f"the gradient norm of step {self.step + 1} is {found}")
                if skipped is not None:
                    return found, skipped
        self.side.give_back()  # cast once, from the fp32 in which they were summed, into `.grad`
        overflowed = None
        if self._steps:
            self.stepping = True
            overflowed = scaled_step(scaler, self.optimizer)
            if overflowed is None and self.scheduler is not None:
                self.scheduler.step()
        return found if asked else None, overflowed

    def _nonfinite(self, what: str) -> str | None:
        """Why nothing is stepped, where such windows are left out; None in a rehearsal, which steps; or a LossError."""
        if self._on_nonfinite == "skip":
            if self.rehearses:
                for _, gradient in self._gradients():
                    (gradient._values() if gradient.is_sparse else gradient).zero_()
                return None
            self._statistics.discard()  # they would stay what the samples made of them, NaN for instance
            return what
        self.discard()
        raise LossError(
            f"{what}, and no step was taken: lower the learning rate, look at the data of this window, "
            'or pass on_nonfinite="skip" to leave such windows out'
        )

    @uninterrupted
    def discard(self) -> None:
        """Drops the window's gradients and statistics, as if it had not been opened."""
        self._zero()
        self._ahead.close()
        self._statistics.discard()
        self.rank_sum.drop()
        self._close()  # `stepping` stays: where a step broke off, weights may be half updated, and somebody asks

    def _close(self) -> None:
        self.noise_scale.close()
        self._sums = self._ended = None
        if self.sharded is not None:
            self.sharded.end()

    def _zero(self) -> None:
        self.side.clear()
        for parameter in self.parameters:
            parameter.grad = None

    # --- what others ask of it

    @property
    def meets_inside(self) -> bool:
        """Whether the ranks meet inside the forward pass (SyncBatchNorm), where no vote reaches one that waits."""
        return self.ranks.size > 1 and self._statistics.synchronised

    @property
    def is_open(self) -> bool:
        """Whether a window is."""
        return self._sums is not None

    @property
    def optimizers(self) -> list[Optimizer]:
        """The one that is stepped, and those beside it."""
        return [self.optimizer, *self.beside]

    def state_dict(self) -> dict[str, Any]:
        """The counts of a loop of one's own, for its checkpoints: plain values, without model, optimizer and schedule.

        An Accelerator keeps them where it is told to: `accelerator.register_for_checkpointing(accumulator)`.

        Raises:
            SetupError: a window is open.
        """
        if self.is_open:
            raise SetupError(
                "a window is open, and part of one is no checkpoint: call state_dict() between two windows"
            )
        counts = {"step": self.step, "epoch": self.epoch, "skipped_windows": self.skipped_windows}
        return {**counts, "target_batch": self.plan.target_batch, "noise_scale": self.noise_scale.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        """Goes on counting from what `state_dict` gave.

        Raises:
            CheckpointError: it gave something else, or of another target batch.
        """
        try:
            counts = {name: int(state[name]) for name in ("step", "epoch", "skipped_windows", "target_batch")}
            noise_scale = {name: float(state["noise_scale"][name]) for name in self.noise_scale.state_dict()}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"this is not what Accumulator.state_dict() gave: {error}") from error
        if counts["target_batch"] != self.plan.target_batch:
            raise CheckpointError(
                f"the checkpoint was trained with target_batch={counts['target_batch']}, and this plan says "
                f"{self.plan.target_batch}: make the plan with the same"
            )
        self.step, self.epoch, self.skipped_windows = counts["step"], counts["epoch"], counts["skipped_windows"]
        self.noise_scale.load_state_dict(noise_scale)

    @uninterrupted
    def close(self) -> None:
        """Takes the hooks off the model."""
        if self.sharded is not None:
            self.sharded.close()
        self.noise_scale.close()
        self._statistics.close()

    def _gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter's gradient of the window, what lies on this rank."""
        gradient = self.side.gradient
        found = [(parameter, own) for parameter in self.parameters if (own := gradient(parameter)) is not None]
        return found if self.sharded is None else [(parameter, local(own)) for parameter, own in found]

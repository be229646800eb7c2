"""A plan in another trainer's words: the lines to put there, and what of it that trainer cannot express.

Those trainers know one micro-batch size and one number of micro-batches, alike on all ranks. So a ragged split (86, 85,
85) becomes the largest equal one that holds the same samples (4 of 64), and where the ranks cannot share the target
evenly there is none: the nearest target that they can is written, and said.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from autoaccum.errors import PlanError, shown
from autoaccum.planning.learning_rate import number
from autoaccum.planning.reasons import Sized, format_sizes

__all__ = ["TRAINERS", "as_config"]

_WIDTH = 78  # columns of a comment
_TRIED = 100_000  # numbers of micro-batches that are tried for an equal split; beyond, one sample at a time


class Planned(Sized, Protocol):
    """What these lines read of a plan."""

    @property
    def micro_batches(self) -> tuple[int, ...]: ...

    @property
    def lr(self) -> float | None: ...

    @property
    def optimizer_overrides(self) -> Mapping[str, Any]: ...


class _Equal(NamedTuple):
    """What such a trainer is told: `steps` micro-batches of `size` samples on each of `ranks`."""

    size: int
    steps: int
    ranks: int
    lr: float | None

    @property
    def total(self) -> int:
        return self.size * self.steps * self.ranks


def _transformers(equal: _Equal) -> list[str]:
    return _arguments("TrainingArguments", equal)


def _trl(equal: _Equal) -> list[str]:
    return _arguments("SFTConfig", equal)  # its other trainers' configurations take the same names


def _arguments(kind: str, equal: _Equal) -> list[str]:
    rate = [] if equal.lr is None else [f"    learning_rate={number(equal.lr)},"]
    sizes = [f"    per_device_train_batch_size={equal.size},", f"    gradient_accumulation_steps={equal.steps},"]
    return [f"{kind}(", *sizes, *rate, ")"]


def _lightning(equal: _Equal) -> list[str]:
    return [f"DataLoader(dataset, batch_size={equal.size})", f"Trainer(accumulate_grad_batches={equal.steps})"]


def _accelerate(equal: _Equal) -> list[str]:
    return [
        f"DataLoader(dataset, batch_size={equal.size})",
        f"Accelerator(gradient_accumulation_steps={equal.steps})  # and the loop inside accelerator.accumulate(model)",
    ]


def _deepspeed(equal: _Equal) -> list[str]:
    values = {
        "train_batch_size": equal.total,
        "train_micro_batch_size_per_gpu": equal.size,
        "gradient_accumulation_steps": equal.steps,
    }
    return json.dumps(values, indent=2).splitlines()


def _torchtitan(equal: _Equal) -> list[str]:
    rate = [] if equal.lr is None else ["", "[optimizer]", f"lr = {number(equal.lr)}"]
    return ["[training]", f"local_batch_size = {equal.size}", f"global_batch_size = {equal.total}", *rate]


def _axolotl(equal: _Equal) -> list[str]:
    return _yaml("micro_batch_size", equal)


def _llamafactory(equal: _Equal) -> list[str]:
    return _yaml("per_device_train_batch_size", equal)


def _yaml(size: str, equal: _Equal) -> list[str]:
    rate = [] if equal.lr is None else [f"learning_rate: {number(equal.lr)}"]
    return [f"{size}: {equal.size}", f"gradient_accumulation_steps: {equal.steps}", *rate]


# What was measured of each trainer's own accumulation: tests/conformance.
_TRANSFORMERS = (
    "a smaller last micro-batch weighs as much as a whole one, and models that take **kwargs and ignore the count of "
    "tokens (BERT, RoBERTa, DistilBERT, T5) get a gradient that is as many times too large as there are micro-batches"
)
_MEANS = (
    "a shorter last window is divided by the full number of micro-batches, and a mean over tokens is taken in each "
    "micro-batch by itself"
)
_ALIKE = "each micro-batch weighs alike, however many of its tokens count"

TRAINERS: dict[str, tuple[Callable[[_Equal], list[str]], str, bool]] = {
    "transformers": (_transformers, _TRANSFORMERS, True),
    "trl": (_trl, _TRANSFORMERS, True),
    "lightning": (_lightning, _MEANS, False),
    "accelerate": (_accelerate, _MEANS, False),
    "deepspeed": (_deepspeed, _ALIKE, False),
    "torchtitan": (_torchtitan, "samples are sequences of training.seq_len tokens", True),
    "axolotl": (_axolotl, _TRANSFORMERS, True),
    "llamafactory": (_llamafactory, _TRANSFORMERS, True),
}
"""By name: the lines, what differs there, and whether they hold the learning rate."""


def as_config(plan: Planned, name: str) -> str:
    """The plan in the words of the trainer called `name`: comments on what it means there, then the lines to put.

    Raises:
        PlanError: a trainer that is not known.
    """
    if not isinstance(name, str) or name not in TRAINERS:
        raise PlanError(f"{shown(name)} is no trainer known here: choose one of {', '.join(map(repr, TRAINERS))}")
    lines, differs, holds_rate = TRAINERS[name]
    equal = _equal(plan)
    notes = [_split_note(plan, equal), *_limits_note(plan), f"there {differs}"]
    if plan.lr is not None and not holds_rate:
        notes.append(f"the optimizer's learning rate: {number(plan.lr)}")
    if plan.optimizer_overrides:
        notes.append(f"and its {', '.join(f'{key}={value}' for key, value in plan.optimizer_overrides.items())}")
    comments = [
        line
        for note in notes
        for line in textwrap.wrap(note, _WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
    ]
    return "\n".join([*comments, *lines(equal)])


def _equal(plan: Planned) -> _Equal:
    """The fewest equal micro-batches on equal ranks that hold the plan's window and fit on every rank.

    Where the ranks cannot share it evenly: the nearest window that they can, in the fewest micro-batches.
    """
    share, rest = divmod(plan.usual_window, plan.world_size)
    if rest or not share:
        return _nearest(plan)
    fewest = -(-share // min(plan.limits))
    steps = next((k for k in range(fewest, min(share, fewest + _TRIED) + 1) if share % k == 0), share)
    return _Equal(share // steps, steps, plan.world_size, plan.lr)


def _nearest(plan: Planned) -> _Equal:
    """The window nearest to the plan's in the fewest micro-batches of one size, whatever it holds."""
    limit, window = min(plan.limits), plan.usual_window
    steps = -(-window // (limit * plan.world_size))
    size = min(max(round(window / (steps * plan.world_size)), 1), limit)
    return _Equal(size, steps, plan.world_size, plan.lr)


def _split_note(plan: Planned, equal: _Equal) -> str:
    ranks = f" on each of {equal.ranks} processes" if equal.ranks > 1 else ""
    told = f"{equal.total} samples a step: {equal.steps} × {equal.size}{ranks}"
    if equal.total != plan.usual_window:
        return f"{told}; {plan.usual_window} cannot be expressed, since {equal.ranks} processes share evenly there"
    if set(plan.micro_batches) == {equal.size} and len(plan.micro_batches) == equal.steps:
        return f"{told}, exactly as planned"
    planned = f"the plan's {len(plan.micro_batches)} micro-batches of {format_sizes(plan.micro_batches)}"
    text = f"{told}; {planned} cannot be expressed, since all are of one size there"
    nearest = _nearest(plan)
    if equal.steps > 2 * nearest.steps:
        text += f", and a target of {nearest.total} would take {nearest.steps} × {nearest.size}"
    return text


def _limits_note(plan: Planned) -> list[str]:
    lost = ["a replay in smaller pieces after running out of memory"]
    if plan.by_length:
        lost.append("windows cut by length")
    if plan.batch_norm == "pooled" and plan.batch_norm_layers != 0:
        lost.append("BatchNorm's pooled statistics")
    return [f"not to be had there: {', '.join(lost)}"]

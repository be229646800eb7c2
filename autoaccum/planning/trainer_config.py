"""A plan in another trainer's words: the lines to put there, and what of it that trainer cannot express.

Those trainers know one micro-batch size and one number of micro-batches, alike on all ranks. So a ragged split (86, 85,
85) becomes the largest equal one that holds the same samples (4 of 64), and where the ranks cannot share the target
evenly there is none: the nearest target that they can is written, and said.
"""

import textwrap

from autoaccum.checks import one_of
from autoaccum.errors import PlanError
from autoaccum.planning.learning_rate import number
from autoaccum.planning.plan_fields import PlanFields
from autoaccum.planning.reasons import format_sizes

__all__ = ["TRAINERS", "as_config"]

_WIDTH = 78  # columns of a comment
_TRIED = 100_000  # numbers of micro-batches that are tried for an equal split; beyond, one sample at a time


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

_ARGUMENTS = """{kind}(
    per_device_train_batch_size={size},
    gradient_accumulation_steps={steps},
    learning_rate={lr},
)"""
_YAML = """{kind}: {size}
gradient_accumulation_steps: {steps}
learning_rate: {lr}"""
_ACCELERATE = """DataLoader(dataset, batch_size={size})
Accelerator(gradient_accumulation_steps={steps})  # and the loop inside accelerator.accumulate(model)"""
_DEEPSPEED = """{{
  "train_batch_size": {total},
  "train_micro_batch_size_per_gpu": {size},
  "gradient_accumulation_steps": {steps}
}}"""
_TORCHTITAN = """[training]
local_batch_size = {size}
global_batch_size = {total}

[optimizer]
lr = {lr}"""

TRAINERS = {
    "transformers": (_ARGUMENTS, "TrainingArguments", _TRANSFORMERS),
    "trl": (_ARGUMENTS, "SFTConfig", _TRANSFORMERS),  # its other trainers' configurations take the same names
    "lightning": ("DataLoader(dataset, batch_size={size})\nTrainer(accumulate_grad_batches={steps})", "", _MEANS),
    "accelerate": (_ACCELERATE, "", _MEANS),
    "deepspeed": (_DEEPSPEED, "", _ALIKE),
    "torchtitan": (_TORCHTITAN, "", "samples are sequences of training.seq_len tokens"),
    "axolotl": (_YAML, "micro_batch_size", _TRANSFORMERS),
    "llamafactory": (_YAML, "per_device_train_batch_size", _TRANSFORMERS),
}
"""By name: the lines, what they name at {kind}, and what differs there."""


def as_config(plan: PlanFields, name: str) -> str:
    """The plan in the words of the trainer called `name`: comments on what it means there, then the lines to put."""
    one_of("the trainer", name, tuple(TRAINERS), PlanError)
    template, kind, differs = TRAINERS[name]
    (size, steps), rate = _equal(plan), "" if plan.lr is None else number(plan.lr)
    lost = {
        "a replay in smaller pieces after running out of memory": True,
        "windows cut by length": bool(plan.by_length),
        "BatchNorm's pooled statistics": plan.batch_norm == "pooled" and plan.batch_norm_layers != 0,
    }
    not_there = f"not to be had there: {', '.join(what for what, is_so in lost.items() if is_so)}"
    notes = [_split_note(plan, size, steps), not_there, f"there {differs}"]
    if rate and "{lr}" not in template:
        notes.append(f"the optimizer's learning rate: {rate}")
    if plan.optimizer_overrides:
        notes.append(f"and its {', '.join(f'{key}={value}' for key, value in plan.optimizer_overrides.items())}")
    comments = [
        line
        for note in notes
        for line in textwrap.wrap(note, _WIDTH, initial_indent="# ", subsequent_indent="#   ", break_on_hyphens=False)
    ]
    if not rate:
        template = "\n".join(line for line in template.replace("\n\n[optimizer]", "").split("\n") if "{lr}" not in line)
    total = size * steps * plan.world_size
    return "\n".join([*comments, template.format(kind=kind, size=size, steps=steps, total=total, lr=rate)])


def _equal(plan: PlanFields) -> tuple[int, int]:
    """(size, number) of the fewest equal micro-batches on equal ranks that hold the plan's window and fit on every one.

    Where the ranks cannot share it evenly: the nearest window that they can, in the fewest micro-batches.
    """
    share, rest = divmod(plan.usual_window, plan.world_size)
    if rest or not share:
        return _nearest(plan)
    fewest = -(-share // min(plan.limits))
    steps = next((k for k in range(fewest, min(share, fewest + _TRIED) + 1) if share % k == 0), share)
    return share // steps, steps


def _nearest(plan: PlanFields) -> tuple[int, int]:
    """(size, number) of the fewest micro-batches of one size, whose window is the nearest to the plan's."""
    limit, window = min(plan.limits), plan.usual_window
    steps = -(-window // (limit * plan.world_size))
    return min(max(round(window / (steps * plan.world_size)), 1), limit), steps


def _split_note(plan: PlanFields, size: int, steps: int) -> str:
    ranks, total = plan.world_size, size * steps * plan.world_size
    told = f"{total} samples a step: {steps} × {size}{f' on each of {ranks} processes' if ranks > 1 else ''}"
    if total != plan.usual_window:
        return f"{told}; {plan.usual_window} cannot be expressed, since {ranks} processes share evenly there"
    if plan.micro_batches == (size,) * steps:
        return f"{told}, exactly as planned"
    planned = f"the plan's {len(plan.micro_batches)} micro-batches of {format_sizes(plan.micro_batches)}"
    text = f"{told}; {planned} cannot be expressed, since all are of one size there"
    size, fewer = _nearest(plan)
    if steps > 2 * fewer:
        text += f", and a target of {size * fewer * ranks} would take {fewer} × {size}"
    return text

"""`autoaccum fit`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from autoaccum.cli.calling import arguments_of, call, need_target_batch
from autoaccum.cli.command import Answer, Command, first_rank
from autoaccum.cli.endings import NOT_SAVED
from autoaccum.cli.options import new_file, takes, target_argument
from autoaccum.cli.saving import saved, write_weights

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["fit"]


@click.command(cls=Command, short_help="Probe, plan, check and train.")
@target_argument
@takes(
    "target_batch", "epochs", "max_steps", "memory", "device", "precision", "accumulate", "reduction",
    "optimizer", "lr", "lr_batch", "lr_rule", "schedule", "warmup_steps", "clip_norm", "batch_norm", "tail", "shuffle",
    "prefer", "micro_batch", "plan", "multiple_of", "max_batch", "isolate", "cache", "check",
    "checkpoint", "checkpoint_every", "resume", "compile", "regrow_after", "on_nonfinite", "seed", "progress",
)  # fmt: skip
@new_file("save", "Save the trained weights: the model's state_dict.")
@new_file("save-plan", "Save the plan, for fit --plan FILE.")
def fit(target: str, save: Path | None, save_plan: Path | None, **options: Any) -> Answer:
    """Train with exactly the target batch, in as few micro-batches as fit."""
    import autoaccum

    arguments = arguments_of(autoaccum.fit, target, options)
    need_target_batch(target, arguments, "fit")
    result = call(autoaccum.fit, arguments)
    done = True
    if first_rank():
        done = saved(save, "the weights", lambda path: write_weights(result.model, path))
        done &= saved(save_plan, "the plan", result.plan.save)
    return Answer(result.to_dict(), _view, 0 if done else NOT_SAVED)


def _view(values: Mapping[str, Any]) -> "RenderableType":
    from autoaccum.display.terminal import fit_view

    return fit_view(values)

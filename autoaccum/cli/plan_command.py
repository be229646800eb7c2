"""`autoaccum plan`: arithmetic only, and no torch."""

from pathlib import Path
from typing import Any

import click

from autoaccum.cli.command import Answer, Command, saved
from autoaccum.cli.endings import FAILED
from autoaccum.cli.options import COUNT, given, new_file, takes
from autoaccum.planning.trainer_config import TRAINERS

__all__ = ["plan"]


@click.command(cls=Command, short_help="Work out the plan for a target batch: arithmetic only.")
@click.option(
    "--limit", type=COUNT, metavar="N", multiple=True, required=True,
    help="The largest micro-batch that fits; once, or once for every rank.",
)  # fmt: skip
@click.option("--target-batch", type=COUNT, metavar="N", required=True, help="Samples per optimizer step.")
@click.option("--world-size", type=COUNT, metavar="N", help="Ranks that train together.")
@click.option("--rank", type=click.IntRange(min=0), metavar="N", help="Whose plan; 0 if not given.")
@click.option("--samples", type=COUNT, metavar="N", help="Samples in an epoch.")
@takes("optimizer", "lr", "lr_batch", "lr_rule")
@click.option("--betas", type=(float, float), metavar="B1 B2", help="The optimizer's betas, where a rule changes them.")
@click.option("--eps", type=float, metavar="EPS", help="The optimizer's eps, where a rule changes it.")
@click.option("--bn-momentum", type=float, metavar="M", help="BatchNorm's own momentum.")
@takes("batch_norm")
@click.option("--minimum", type=COUNT, metavar="N", help="No micro-batch below this size.")
@takes("multiple_of", "tail")
@click.option(
    "--as", "trainer", type=click.Choice(list(TRAINERS)), metavar="TRAINER",
    help=f"Print the lines to put into another trainer's configuration: {', '.join(TRAINERS)}.",
)  # fmt: skip
@new_file("save-plan", "Save the plan, for fit --plan FILE.")
def plan(
    limit: tuple[int, ...], target_batch: int, trainer: str | None, save_plan: Path | None, **options: Any
) -> Answer:
    """Work out micro-batches, learning rate and BatchNorm momentum for a target batch, each with its reason."""
    from autoaccum.planning.plan import plan as make

    chosen = given(options)
    if len(limit) > 1:
        chosen.setdefault("world_size", len(limit))
    made = make(limit[0] if len(limit) == 1 else limit, target_batch, **chosen)
    done = saved(save_plan, "the plan", made.save)
    code = 0 if done else FAILED
    if trainer is None:
        return Answer(made.to_dict(), "plan_view", code)
    return Answer({**made.to_dict(), "config": made.as_config(trainer)}, "config_view", code)

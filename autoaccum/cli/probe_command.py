"""`autoaccum probe`."""

import os
from pathlib import Path
from typing import Any

import click

from autoaccum.cli.asked import Asked
from autoaccum.cli.command import Answer, Command
from autoaccum.cli.endings import FAILED
from autoaccum.cli.options import COUNT, new_file, new_picture, takes_all, target_argument
from autoaccum.cli.ways import SHARD

__all__ = ["probe"]


@click.command(cls=Command, short_help="Find the micro-batch that fits, and the plan for a target batch.")
@target_argument
@takes_all("probe", but=("isolate",))
# On for this command alone. A child of `fit` would not see what the training's own process holds already or will hold
# beside it (its data, a context, libraries), and would take that for somebody else's.
@click.option(
    "--isolate/--no-isolate",
    default=None,
    help="Work in a child process, which a kill may take; on if not given. A debugger needs --no-isolate.",
)
@click.option("--nproc", type=COUNT, metavar="N", help="Answer for N ranks on this machine, which are started for it.")
@click.option(
    "--shard", type=click.Choice(list(SHARD)),
    help="On several ranks: the model whole on each, sharded (fully_shard), or the first that fits; auto with --nproc.",
)  # fmt: skip
@new_file("save-plan", "Save the plan, for fit --plan FILE.")
@new_picture("Draw the forecast and the trials: .png, .svg or .pdf.")
@click.option(
    "--for", "cards", multiple=True, metavar="CARD", help="Say what would fit on a card, such as 'RTX 4090' or 24GiB."
)
def probe(
    *,
    target: str,
    isolate: bool | None,
    progress: bool | None,
    save_plan: Path | None,
    plot: Path | None,
    cards: tuple[str, ...],
    nproc: int | None,
    shard: str | None,
    **options: Any,
) -> Answer:
    """Find the largest micro-batch that fits, by running the real training step on small batches.

    Without a target batch it looks for the largest that fits at all; with one, for the fewest even micro-batches.

    On several ranks (--nproc, or under torchrun with --shard) it tells what fits how, and runs the first that does.
    """
    _expect_ranks(nproc, shard, isolate)
    if cards:
        from autoaccum.probing.elsewhere import known_card

        cards = tuple(map(known_card, cards))  # an unknown one is refused before the probe, not after
    asked = Asked(
        target, options, isolate, progress, plot, save_plan, cards, nproc, shard or ("auto" if nproc else None)
    )
    values, done = asked.answer()
    return Answer(values, "probe_view", 0 if done else FAILED)


def _expect_ranks(nproc: int | None, shard: str | None, isolate: bool | None) -> None:
    """Usage errors for options that say different things of how many processes there are."""
    under_torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if nproc is not None and under_torchrun:
        raise click.UsageError(f"--nproc {nproc}: torchrun has started the ranks already; leave it out")
    if shard is not None and nproc is None and not under_torchrun:
        raise click.UsageError(f"--shard {shard} is about several ranks: give --nproc N, or start this by torchrun")
    if isolate is not None and (nproc is not None or shard is not None):
        raise click.UsageError("the ranks are processes of their own: leave --isolate and --no-isolate out")

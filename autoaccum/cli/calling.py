"""From TARGET and the options to a call of the library."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import click

from autoaccum.cli.command import first_rank
from autoaccum.cli.options import given
from autoaccum.cli.target import Target

__all__ = ["arguments_of", "call", "keywords_of", "need_target_batch"]


def arguments_of(function: Callable[..., Any], target: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that TARGET returns, with the given options in it, for a call of `function`.

    Where --plan is a search's result, what its best trial was trained with stands in the place of TARGET's own. Trials
    in a child get TARGET itself, since the child has to build a model of its own. Progress is told unless someone says
    otherwise: it goes to stderr, and is lines where there is no terminal.
    """
    options, known = given(options), keywords_of(function)
    for name in options:
        if known is not None and name not in known:
            raise click.UsageError(f"--{name.replace('_', '-')}: {function.__name__} takes no {name!r}; leave it out")
    factory = Target.parse(target, options)
    best = None
    if "plan" in options:
        from autoaccum.searching.search_result import best_arguments

        rest = {name: value for name, value in options.items() if name != "plan"}
        best = best_arguments(options["plan"], Target.parse(target, rest))
    arguments = factory() if best is None else {**best, **rest}
    if arguments.get("isolate") is True:
        arguments["isolate"] = factory
    return {"progress": first_rank(), **arguments}


def call(function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """`function(model, data, ...)` with those of fit's arguments that it takes: probe has no use for epochs."""
    known = keywords_of(function)
    rest = {name: value for name, value in arguments.items() if known is None or name in known}
    return function(rest.pop("model"), rest.pop("data", None), **rest)


def keywords_of(function: Callable[..., Any]) -> list[str] | None:
    """The names of a function's parameters; None where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def need_target_batch(target: str, arguments: Mapping[str, Any], what: str, *, or_plan: bool = False) -> None:
    """A usage error where neither the command line nor TARGET says how large a batch is wanted."""
    if arguments.get("target_batch") is None and not (or_plan and arguments.get("plan") is not None):
        raise click.UsageError(
            f'{what} needs a target batch: give --target-batch N, or put "target_batch" into the dict that {target} '
            "returns"
        )

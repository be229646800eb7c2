"""The user's setup: a function that builds fit's arguments anew, called once for each trial with its parameters.

A parameter goes to the setup where it takes one of that name, else into the dict that it returned, if `fit` knows it.
The random generators are seeded before every call, so that all trials begin with the same weights where their shapes
are the same, and so that the best one can be had again.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from autoaccum.checks import misfit
from autoaccum.errors import SetupError, shown
from autoaccum.random_state import seed_everything
from autoaccum.settings import FIT_ARGUMENTS, check_arguments

__all__ = ["Recipe"]

# What belongs to one long training: trials would write over one another, and go on from another's weights.
DROPPED = ("checkpoint", "checkpoint_every", "resume", "progress")
UNSEARCHED = {
    **dict.fromkeys(("model", "data"), "the setup makes itself: search what it takes"),
    **dict.fromkeys(DROPPED, "belongs to one long training, and changes nothing in a trial: leave it out"),
    "plan": "fixes the target batch: search target_batch instead",
}


@dataclass(frozen=True)
class Recipe:
    """A setup with the seed before it. Can be pickled where the setup can.

    Attributes:
        setup: the user's.
        seed: set before each call.
        insists: whether the seed was asked for, and so wins over the setup's own.
    """

    setup: Callable[..., Mapping[str, Any]]
    seed: int
    insists: bool = False

    @property
    def name(self) -> str:
        """What the setup is called: TARGET on the command line, else the function's module and name."""
        text = getattr(self.setup, "text", None)
        if isinstance(text, str):
            return text
        module = getattr(self.setup, "__module__", "")
        own = getattr(self.setup, "__qualname__", type(self.setup).__name__)
        return own if module in ("__main__", "__mp_main__", "") else f"{module}.{own}"

    def _parameters(self) -> dict[str, inspect.Parameter]:
        """By name; those of any name, such as **keywords, under the name "**"."""
        if not callable(self.setup):
            raise SetupError(
                f"setup={shown(self.setup)} is {type(self.setup).__name__}: give a function that returns a dict of "
                "fit's arguments, since every trial needs a model of its own"
            )
        try:
            found = inspect.signature(self.setup).parameters.values()
        except ValueError:  # a builtin without a signature
            return {}
        return {"**" if p.kind is p.VAR_KEYWORD else p.name: p for p in found if p.kind is not p.VAR_POSITIONAL}

    def defaults(self) -> dict[str, Any]:
        """Its parameters that have a default, with that."""
        return {name: p.default for name, p in self._parameters().items() if p.default is not p.empty}

    def check_names(self, names: Collection[str]) -> None:
        """Refuses, by its name, a parameter that has nowhere to go; and a search without one that the setup needs."""
        own = self._parameters()
        for name in names:
            if name in UNSEARCHED and (name not in own or name in ("model", "data")):
                raise SetupError(f"space has the parameter {name!r}, which {UNSEARCHED[name]}")
            if not {name, "**"} & own.keys() and name not in FIT_ARGUMENTS:
                close = difflib.get_close_matches(name, [*own, *FIT_ARGUMENTS], n=1)
                meant = f"did you mean {close[0]!r}?" if close else f"the setup takes {', '.join(own) or 'nothing'}."
                raise SetupError(
                    f"space has the parameter {name!r}, which neither the setup nor fit takes: {meant} Give the setup "
                    "a parameter of that name to use it there"
                )
        error = misfit(self.setup, **{name: None for name in names if {name, "**"} & own.keys()})
        if error is not None:
            raise SetupError(f"the setup {self.name}: {error}; give it a default, or add it to space") from error

    def build(self, params: Mapping[str, Any], *, whole: bool = False) -> dict[str, Any]:
        """fit's arguments for these parameters, of a fresh call; `whole` keeps what trials have no use for.

        A SetupError where it gives no dict of fit's arguments, or one that a search has no use for.
        """
        own = self._parameters()
        seed_everything(self.seed)
        arguments = self.setup(**{name: value for name, value in params.items() if {name, "**"} & own.keys()})
        check_arguments(f"the setup {self.name}", arguments)
        merged = dict(arguments)
        if self.insists:
            merged["seed"] = self.seed
        for name, value in params.items():
            if name == "target_batch" or (name in FIT_ARGUMENTS and not {name, "**"} & own.keys()):
                merged[name] = value
            elif name in FIT_ARGUMENTS and name not in own:
                merged.setdefault(name, value)  # its **keywords took it, and it may not have passed it on
        if merged.get("plan") is not None and not whole:
            raise SetupError(
                f"the setup {self.name} returned 'plan', which fixes the target batch, which is searched: leave it "
                "out, and give micro_batch for a known limit"
            )
        return {name: value for name, value in merged.items() if whole or name not in DROPPED}

    def slug(self) -> str:
        """The name as a folder can be called, without the folders of a file."""
        text = self.name.rpartition("/")[2].replace(".py:", "-")
        return "".join(sign if sign.isalnum() or sign in "-_." else "-" for sign in text).strip("-.") or "search"

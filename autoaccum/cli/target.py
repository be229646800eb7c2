"""TARGET: the user's function that returns a dict of fit's arguments, found by "file.py:name" or "module:name"; and the
call of the library that is made of it and the options.

A `Target` holds names and plain values only. It can be pickled, and a spawned child that gets one loads the user's code
again by itself: that is how trials run in a process of their own, and how a search runs its workers.

All that is wrong with TARGET is a SetupError that names the value, the reason and the remedy. What the user's own code
raises passes through as it is.
"""

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from autoaccum.checks import misfit
from autoaccum.cli.command import first_rank
from autoaccum.errors import SetupError, shown
from autoaccum.settings import check_arguments

__all__ = ["Target", "arguments_of", "call", "need_target_batch"]


@dataclass(frozen=True)
class Target:
    """The user's function, to be called for a fresh dict of fit's arguments.

    Attributes:
        text: TARGET as it was written.
        folder, file: absolute; the module is imported with the folder on the path. No file where TARGET names a module.
        module, name: the module's name, or the file's without the suffix; the function's in it, dots lead into classes.
        overrides: the options given on the command line, which win over the dict's keys.
    """

    text: str
    folder: str
    file: str | None
    module: str
    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, overrides: Mapping[str, Any] | None = None) -> "Target":
        """Read TARGET; nothing is imported yet. A SetupError where it is of neither form, or the file is not there."""
        where, _, name = text.rpartition(":")
        if not where or not name:
            raise SetupError(
                f"{shown(text)} does not name a function: write FILE.py:NAME or MODULE:NAME, such as train.py:build, "
                "where NAME is a function that returns a dict of fit's arguments"
            )
        if not where.endswith(".py") and os.sep not in where:
            if not all(part.isidentifier() for part in where.split(".")):
                raise SetupError(
                    f"{shown(text)}: {shown(where)} is no module's name, such as package.train: for a file write its "
                    "path, such as train.py:build"
                )
            return cls(text, os.getcwd(), None, where, name, dict(overrides or {}))
        try:
            path = Path(where).resolve()
            is_file = path.is_file()
        except (OSError, ValueError) as error:  # too long, or with a character that no path has
            raise SetupError(f"{shown(text)} does not name a file: {error}") from error
        if not is_file:
            beside = sorted(file.name for file in path.parent.glob("*.py"))
            hint = _nearest(path.name, beside, ": give its path from the current folder, or from /")
            raise SetupError(f"{shown(text)}: there is no file {str(path)!r}{hint}")
        return cls(text, str(path.parent), str(path), path.stem, name, dict(overrides or {}))

    @property
    def __signature__(self) -> inspect.Signature:
        """The user's function's, by which a search finds the parameters that it takes."""
        return inspect.signature(self.load())

    def __call__(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        """The dict that the user's function returns for these arguments, with the overrides in it, and checked."""
        found = self._find()
        if not _is_trained_by_another(found):
            function = self.load()
            if error := misfit(function, *args, **keywords):
                names = ", ".join([*map(repr, args), *keywords])
                wanted = f"the arguments {names}" if names else "no arguments"
                is_ = f"{function.__name__}{inspect.signature(function)}"
                raise SetupError(
                    f"{shown(self.text)} is called with {wanted}, but is {is_}: {error}; give the parameters defaults, "
                    "or write a function around it"
                ) from error
            found = function(*args, **keywords)
        if _is_trained_by_another(found):
            trainer, *rest = found if isinstance(found, tuple) else (found,)
            found = {"model": trainer, "data": tuple(rest) or None}
        else:
            check_arguments(shown(self.text), found)
        return {**found, **self.overrides}

    def load(self) -> Callable[..., Any]:
        """Import the module and find the function; a SetupError where that cannot be done."""
        found = self._find()
        if not callable(found):
            raise SetupError(
                f"{shown(self.text)} is {shown(found)}, which cannot be called: name a function that returns a dict of "
                "fit's arguments"
            )
        return found  # type: ignore[no-any-return]  # callable, as was just seen

    def _find(self) -> Any:
        """What has the name: a function, or a trainer."""
        found: Any = self._module()
        for part in self.name.split("."):
            if not hasattr(found, part):
                place = getattr(found, "__file__", None) or getattr(found, "__name__", found)
                public = [name for name in dir(found) if name[0] != "_" and callable(getattr(found, name, None))]
                hint = _nearest(part, public, f": it defines {', '.join(public)}" if public else "")
                raise SetupError(f"{shown(self.text)}: there is no {part!r} in {place}{hint}")
            found = getattr(found, part)
        return found

    def _module(self) -> ModuleType:
        if self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        if self.file is not None:
            path = Path(self.file)
            try:
                return _module_of_file(path)
            except ImportError as error:
                if "no known parent package" not in str(error):
                    raise
                raise SetupError(
                    f"{shown(self.text)} has a relative import, which a file by its path has no package for ({error}): "
                    f"write it as a module from above its package, such as {path.parent.name}.{path.stem}:{self.name}"
                ) from error
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                raise  # the module is there, and imports another that is not
            raise SetupError(
                f"{shown(self.text)}: no module named {shown(error.name)} can be imported from {self.folder}: check "
                "the name, install the package, or write the path of a file, such as train.py:build"
            ) from error


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under its own name, by which a child process finds what was pickled from it.

    Where another module already has that name (a file called `types.py`), or it cannot be one (`my.train.py`), it gets
    a name made up for it.
    """
    own, made_up = path.stem, f"_target_{path.stem.replace('.', '_')}"
    for name in (own, made_up):
        origin = getattr(sys.modules.get(name), "__file__", None)
        if origin is not None and Path(origin).resolve() == path:
            return sys.modules[name]
    if own.isidentifier() and own not in sys.modules:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(own)
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path:
            return importlib.import_module(own)
    spec = importlib.util.spec_from_file_location(made_up, path)
    if spec is None or spec.loader is None:
        raise SetupError(f"{str(path)!r} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[made_up] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[made_up]  # as import itself does: half a module must not be found the next time
        raise
    return module


def _is_trained_by_another(found: Any) -> bool:
    """Whether this is a trainer that `autoaccum verify` knows, alone or first in a tuple with its module and data."""
    from autoaccum.integrations.trainers import is_trainer

    return is_trainer(found[0] if isinstance(found, tuple) and found else found)


def _nearest(name: str, names: Sequence[str], otherwise: str) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f": did you mean {close[0]!r}?" if close else otherwise


# --- the library's functions, called with what TARGET returns ---


def arguments_of(function: Callable[..., Any], target: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that TARGET returns, with the given options in it, for a call of `function`.

    Where --plan is a search's result, what its best trial was trained with stands in the place of TARGET's own. Trials
    in a child get TARGET itself, since the child has to build a model of its own. Progress is told unless someone says
    otherwise: it goes to stderr, and is lines where there is no terminal.
    """
    for name in options:
        if name not in inspect.signature(function).parameters:
            raise SetupError(f"--{name.replace('_', '-')}: {function.__name__} takes no {name!r}; leave it out")
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
    known = inspect.signature(function).parameters
    rest = {name: value for name, value in arguments.items() if name in known}
    return function(rest.pop("model"), rest.pop("data", None), **rest)


def need_target_batch(target: str, arguments: Mapping[str, Any], what: str) -> None:
    """Refuses a call for which neither the command line nor TARGET says how large a batch is wanted."""
    if arguments.get("target_batch") is None:
        raise SetupError(
            f'{what} needs a target batch: give --target-batch N, or put "target_batch" into the dict that {target} '
            "returns"
        )

"""TARGET: the user's function that returns a dict of fit's arguments, found by "file.py:name" or "module:name".

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from autoaccum.errors import SetupError, shown

__all__ = ["Target", "keywords_of"]

_REQUIRED = ("model", "data")


@dataclass(frozen=True)
class Target:
    """The user's function, to be called for a fresh dict of fit's arguments.

    Attributes:
        text: TARGET as it was written.
        folder: absolute; the module is imported with it on the path.
        file: absolute; None where TARGET names a module.
        module: its name; for a file, the name without the suffix.
        name: of the function in the module; dots lead into classes.
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
        """Read TARGET; nothing is imported yet.

        Raises:
            SetupError: not of the two forms, or a file that is not there.
        """
        where, colon, name = text.rpartition(":")
        if not colon or not where or not name:
            raise SetupError(
                f"{shown(text)} does not name a function: write FILE.py:NAME or MODULE:NAME, such as train.py:build, "
                "where "
                "NAME is a function that returns a dict of fit's arguments"
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
        except (OSError, ValueError) as error:
            raise SetupError(f"{shown(text)} does not name a file: {error}") from error
        if path.is_dir():
            raise SetupError(
                f"{shown(text)}: {str(path)!r} is a folder, and no file: name the Python file in it that defines "
                f"{name}, "
                f"such as {Path(where) / 'train.py'}:{name}"
            )
        if not path.is_file():
            raise SetupError(f"{shown(text)}: there is no file {str(path)!r}{_near(path)}")
        return cls(text, str(path.parent), str(path), path.stem, name, dict(overrides or {}))

    @property
    def __signature__(self) -> inspect.Signature:
        """The user's function's, by which a search finds the parameters that it takes."""
        return inspect.signature(self.load())

    def __call__(self, *args: Any, **keywords: Any) -> dict[str, Any]:
        """The dict that the user's function returns for these arguments, with the overrides in it, and checked.

        Raises:
            SetupError: no such function, one that cannot be called so, or not a dict of fit's arguments.
        """
        found = self.find()
        if not _is_trained_by_another(found):
            function = self._callable(found)
            _check_call(self.text, function, args, keywords)
            found = function(*args, **keywords)
        if _is_trained_by_another(found):
            trainer, *rest = found if isinstance(found, tuple) else (found,)
            found = {"model": trainer, "data": tuple(rest) or None}
        else:
            _check_arguments(self.text, found)
        return {**found, **self.overrides}

    def load(self) -> Callable[..., Any]:
        """Import the module and find the function.

        Raises:
            SetupError: no such module, no such name in it, or not callable.
        """
        return self._callable(self.find())

    def find(self) -> Any:
        """Import the module and find what has the name: a function, or a trainer.

        Raises:
            SetupError: no such module, or no such name in it.
        """
        found: Any = self._module()
        for part in self.name.split("."):
            names = dir(found)
            if part not in names and not hasattr(found, part):
                place = getattr(found, "__file__", None) or getattr(found, "__name__", found)
                public = [name for name in names if not name.startswith("_") and callable(getattr(found, name, None))]
                raise SetupError(
                    f"{shown(self.text)}: there is no {part!r} in {place}{_nearest(part, public, 'it defines')}"
                )
            found = getattr(found, part)
        return found

    def _callable(self, found: Any) -> Callable[..., Any]:
        if not callable(found):
            raise SetupError(
                f"{shown(self.text)} is {_kind(found)}, which cannot be called: name a function that returns a dict of "
                "fit's arguments"
            )
        return found  # type: ignore[no-any-return]  # callable, as was just seen

    def _module(self) -> ModuleType:
        if self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        if self.file is not None:
            return _module_of_file(Path(self.file))
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


def keywords_of(function: Callable[..., Any]) -> list[str] | None:
    """The names of a function's parameters; None where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters]


def _module_of_file(path: Path) -> ModuleType:
    """Import a file under its own name, by which a child process finds what was pickled from it.

    Where another module already has that name (a file called `types.py`), or it cannot be one (`my.train.py`), it gets
    a name made up for it.
    """
    name = path.stem
    if _is_of_file(sys.modules.get(name), path):
        return sys.modules[name]
    if name.isidentifier() and name not in sys.modules:
        importlib.invalidate_caches()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path:
            return importlib.import_module(name)
    name = f"_target_{name.replace('.', '_')}"
    if _is_of_file(sys.modules.get(name), path):
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SetupError(f"{str(path)!r} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # as import itself does: half a module must not be found the next time
        raise
    return module


def _is_of_file(module: ModuleType | None, path: Path) -> bool:
    origin = getattr(module, "__file__", None)
    return origin is not None and Path(origin).resolve() == path


def _check_call(text: str, function: Callable[..., Any], args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without one: calling it will tell
        return
    try:
        signature.bind(*args, **keywords)
    except TypeError as error:
        wanted = f"the arguments {', '.join([*map(repr, args), *keywords])}" if args or keywords else "no arguments"
        raise SetupError(
            f"{shown(text)} is called with {wanted}, but is {function.__name__}{signature}: {error}; give the "
            "parameters "
            "defaults, or write a function around it"
        ) from error


def _check_arguments(text: str, arguments: Any) -> None:
    if not isinstance(arguments, Mapping):
        raise SetupError(
            f"{shown(text)} returned {_kind(arguments)}, but must return a dict of fit's arguments: "
            'return {"model": model, "data": data, ...}'
        )
    import autoaccum

    known = keywords_of(autoaccum.fit)
    for key in arguments:
        if known is not None and key not in known:
            raise SetupError(f"{shown(text)} returned the unknown key {key!r}{_nearest(str(key), known, 'fit takes')}")
    for key in _REQUIRED:
        if key not in arguments:
            has = ", ".join(map(repr, arguments)) or "nothing"
            raise SetupError(
                f"{shown(text)} returned a dict without {key!r}, only with {has}: add the {key} under that key"
            )


def _is_trained_by_another(found: Any) -> bool:
    """Whether this is a trainer that `autoaccum verify` knows, alone or first in a tuple with its module and data."""
    from autoaccum.integrations.trainers import is_trainer

    return is_trainer(found[0] if isinstance(found, tuple) and found else found)


def _kind(value: object) -> str:
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _nearest(name: str, names: list[str], all_of: str) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f": did you mean {close[0]!r}?"
    return f": {all_of} {', '.join(names)}" if names else ""


def _near(path: Path) -> str:
    """A file of a similar name beside the one that is missing."""
    files = sorted(file.name for file in path.parent.glob("*.py")) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, files, n=1)
    return f": did you mean {close[0]!r}?" if close else ": give its path from the current folder, or from /"

"""What stands in for an object's attributes, such as a module's `forward`, for a while, and leaves when that is over.

It is an attribute of the one object, so that its class, its `state_dict`, its hooks and its submodules' names stay as
they are. A copy or a pickle of a module, such as an average of its weights, gets the plain forward: a stand-in would
call the module that it was made for.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn

__all__ = ["OwnStatistics", "StandIn", "standing"]


@contextmanager
def standing(owner: Any, **attributes: Any) -> Iterator[None]:
    """Attributes of one object inside, in the place of its own or its class's."""
    held = vars(owner)
    before = {name: held[name] for name in attributes if name in held}
    held.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            held.pop(name, None)
        held.update(before)


class StandIn:
    """Called in place of one module's `forward`; a context that puts itself there and takes itself away.

    Attributes:
        module: whose forward it is.
        forward: what stood there before.
    """

    def __init__(self, module: nn.Module) -> None:
        """Changes nothing until it is entered."""
        self.module = module
        self.forward = module.forward
        functools.update_wrapper(self, self.forward)  # people and libraries read a forward's signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward itself."""
        return self.forward(*args, **kwargs)

    def __enter__(self) -> "StandIn":
        self.forward = self.module.forward
        self._stands = standing(self.module, forward=self)
        self._stands.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stands.__exit__(kind, error, tb)

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _itself, (self.forward,)


class OwnStatistics(StandIn):
    """SyncBatchNorm over this rank's samples alone: a trial has sizes of its own, and may wait for no other rank."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a BatchNorm that shares nothing."""
        return nn.modules.batchnorm._BatchNorm.forward(self.module, *args, **kwargs)  # type: ignore[arg-type]


def _itself(forward: Any) -> Any:
    return forward

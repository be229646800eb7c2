"""What stands in for a module's `forward` while a training runs, and leaves when it is over.

The stand-in is an attribute of the one module, so that its class, its `state_dict`, its hooks and its submodules' names
stay as they are. A copy or a pickle of the module, such as an average of its weights, gets the plain forward: a
stand-in would call the module that it was made for.
"""

import functools
from types import TracebackType
from typing import Any

from torch import nn

__all__ = ["OwnStatistics", "StandIn"]


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
        held = vars(self.module)
        self._own = "forward" in held
        self.forward = self.module.forward
        held["forward"] = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        held = vars(self.module)
        if self._own:
            held["forward"] = self.forward
        else:
            held.pop("forward", None)

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _itself, (self.forward,)


class OwnStatistics(StandIn):
    """SyncBatchNorm over this rank's samples alone: a trial has sizes of its own, and may wait for no other rank."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a BatchNorm that shares nothing."""
        return nn.modules.batchnorm._BatchNorm.forward(self.module, *args, **kwargs)  # type: ignore[arg-type]


def _itself(forward: Any) -> Any:
    return forward

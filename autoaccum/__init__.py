"""Finds the largest micro-batch that fits in memory, and trains with exactly the batch you asked for.

```python
import autoaccum

autoaccum.fit(model, data, target_batch=256)
```

Everything is loaded on first use, so that `import autoaccum` and `autoaccum --help` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from autoaccum import errors as errors

if TYPE_CHECKING:
    from autoaccum.api import fit as fit
    from autoaccum.api import prepare as prepare
    from autoaccum.api import probe as probe
    from autoaccum.api import verify as verify
    from autoaccum.checking.verify import VerifyReport as VerifyReport
    from autoaccum.integrations.trainers import attach as attach
    from autoaccum.loss.coupled import Coupled as Coupled
    from autoaccum.loss.mean import Mean as Mean
    from autoaccum.model.chunked_loss import chunked_cross_entropy as chunked_cross_entropy
    from autoaccum.planning.plan import Plan as Plan
    from autoaccum.planning.plan import plan as plan
    from autoaccum.probing.outcome import Trial as Trial
    from autoaccum.probing.report import ProbeReport as ProbeReport
    from autoaccum.searching.search import search as search
    from autoaccum.searching.search_result import SearchResult as SearchResult
    from autoaccum.training import events as events
    from autoaccum.training.events import JsonlSink as JsonlSink
    from autoaccum.training.events import StopTraining as StopTraining
    from autoaccum.training.events import TensorBoardSink as TensorBoardSink
    from autoaccum.training.loop import FitResult as FitResult
    from autoaccum.training.loop import TrainingLoop as TrainingLoop
    from autoaccum.window.accumulate import Accumulator as Accumulator
    from autoaccum.window.phase import Phase as Phase
    from autoaccum.window.record import StepRecord as StepRecord

__version__ = "0.1.0"

_HOMES = {
    "api": ("fit", "prepare", "probe", "verify"),
    "checking.verify": ("VerifyReport",),
    "integrations.trainers": ("attach",),
    "loss.coupled": ("Coupled",),
    "loss.mean": ("Mean",),
    "model.chunked_loss": ("chunked_cross_entropy",),
    "planning.plan": ("Plan", "plan"),
    "probing.outcome": ("Trial",),
    "probing.report": ("ProbeReport",),
    "searching.search": ("search",),
    "searching.search_result": ("SearchResult",),
    "training.events": ("JsonlSink", "StopTraining", "TensorBoardSink"),
    "training.loop": ("FitResult", "TrainingLoop"),
    "window.accumulate": ("Accumulator",),
    "window.phase": ("Phase",),
    "window.record": ("StepRecord",),
}
_HOME = {name: f"autoaccum.{module}" for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "errors", "events"])  # noqa: PLE0605 - for type checkers the names above are exported


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for (PEP 562)."""
    if name == "events":  # what callbacks get, a module as errors is
        return importlib.import_module("autoaccum.training.events")
    if name == "integrations":
        return importlib.import_module("autoaccum.integrations")
    if name not in _HOME:
        raise AttributeError(f"module 'autoaccum' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Finds the largest micro-batch that fits in memory, and trains with exactly the batch you asked for.

```python
import autoaccum

autoaccum.fit(model, data, target_batch=256)
```

Everything is loaded on first use, so that `import autoaccum` and `autoaccum --help` cost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

from autoaccum import errors

if TYPE_CHECKING:
    from autoaccum.api import fit, prepare, probe, verify
    from autoaccum.checking.verify import VerifyReport
    from autoaccum.integrations.trainers import attach
    from autoaccum.loss.coupled import Coupled
    from autoaccum.loss.mean import Mean
    from autoaccum.model.chunked_loss import chunked_cross_entropy
    from autoaccum.planning.plan import Plan, plan
    from autoaccum.probing.outcome import Trial
    from autoaccum.probing.report import ProbeReport
    from autoaccum.searching.search import search
    from autoaccum.searching.search_result import SearchResult
    from autoaccum.training import events
    from autoaccum.training.events import JsonlSink, StopTraining, TensorBoardSink
    from autoaccum.training.loop import FitResult, TrainingLoop
    from autoaccum.window.accumulate import Accumulator
    from autoaccum.window.phase import Phase
    from autoaccum.window.record import StepRecord

__version__ = "0.1.0"

_HOME = {
    "Accumulator": "autoaccum.window.accumulate",
    "Coupled": "autoaccum.loss.coupled",
    "FitResult": "autoaccum.training.loop",
    "JsonlSink": "autoaccum.training.events",
    "Mean": "autoaccum.loss.mean",
    "Phase": "autoaccum.window.phase",
    "Plan": "autoaccum.planning.plan",
    "ProbeReport": "autoaccum.probing.report",
    "SearchResult": "autoaccum.searching.search_result",
    "StepRecord": "autoaccum.window.record",
    "StopTraining": "autoaccum.training.events",
    "TensorBoardSink": "autoaccum.training.events",
    "TrainingLoop": "autoaccum.training.loop",
    "Trial": "autoaccum.probing.outcome",
    "VerifyReport": "autoaccum.checking.verify",
    "attach": "autoaccum.integrations.trainers",
    "chunked_cross_entropy": "autoaccum.model.chunked_loss",
    "fit": "autoaccum.api",
    "plan": "autoaccum.planning.plan",
    "prepare": "autoaccum.api",
    "probe": "autoaccum.api",
    "search": "autoaccum.searching.search",
    "verify": "autoaccum.api",
}

__all__ = [
    "Accumulator",
    "Coupled",
    "FitResult",
    "JsonlSink",
    "Mean",
    "Phase",
    "Plan",
    "ProbeReport",
    "SearchResult",
    "StepRecord",
    "StopTraining",
    "TensorBoardSink",
    "TrainingLoop",
    "Trial",
    "VerifyReport",
    "attach",
    "chunked_cross_entropy",
    "errors",
    "events",
    "fit",
    "plan",
    "prepare",
    "probe",
    "search",
    "verify",
]


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

"""Other people's trainers: what a window is becomes ours, everything else stays theirs. Each is imported on use."""

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    """Imports a trainer's module when it is first asked for, so that `import autoaccum` is enough to name it."""
    if name in ("deepspeed", "lightning", "transformers"):
        return importlib.import_module(f"autoaccum.integrations.{name}")
    raise AttributeError(f"module 'autoaccum.integrations' has no attribute {name!r}")

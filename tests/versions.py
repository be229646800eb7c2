"""What only newer PyTorch can do, in tests that are about just that."""

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def since(version: str, why: str) -> pytest.MarkDecorator:
    """Skips a test before torch `version`, such as "2.6"."""
    needed = tuple(map(int, version.split(".")))
    return pytest.mark.skipif(needed > TORCH, reason=f"torch {torch.__version__}; needs {version}: {why}")

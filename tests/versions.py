"""Versions: what only newer PyTorch can do, and the releases of trainers that the tests of attach and verify hold."""

import importlib.util
from importlib.metadata import version
from typing import Any

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def since(version: str, why: str) -> pytest.MarkDecorator:
    """Skips a test before torch `version`, such as "2.6"."""
    needed = tuple(map(int, version.split(".")))
    return pytest.mark.skipif(needed > TORCH, reason=f"torch {torch.__version__}; needs {version}: {why}")


# Oldest and newest release on which the tests of integrations ran. What reaches into a trainer (its loops, its step,
# its loader) is held on both; releases between them share one of the two shapes that the code knows.
TESTED = {
    "transformers": ("4.50.0", "5.24.0"),
    "lightning": ("2.4.0", "2.6.6"),
    "accelerate": ("1.5.2", "1.15.0"),
    "peft": ("0.13.2", "0.21.2"),
    "trl": ("1.16.0", "1.16.0"),
    "deepspeed": ("0.19.8", "0.19.8"),
}


def peer(name: str) -> Any:
    """The trainer's package, whose import skips a test or a file where it is not installed.

    Raises:
        AssertionError: it is older than what was ever tested.
    """
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: it is in the group peers", allow_module_level=True)
    oldest, installed = TESTED[name][0], version(name)
    assert _numbers(installed) >= _numbers(oldest), f"{name} {installed}: run its tests with it, then name it here"
    return importlib.import_module(name)


def as_newest(name: str) -> bool:
    """Whether the installed release is of the newest tested one's minor version, or newer."""
    return _numbers(version(name))[:2] >= _numbers(TESTED[name][1])[:2]


def _numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".")[:3] if part.isdigit()]

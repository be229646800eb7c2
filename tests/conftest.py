"""For all tests: property tests are not timed, since how long an example takes says nothing on a busy machine."""

import importlib
import multiprocessing
import os

import pytest
from hypothesis import HealthCheck, settings

from tests.warm import WARM, serve, use

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_configure(config):
    """All of pytest-xdist's processes fork from one: its imports take as much time as dozens of tests."""
    if hasattr(config, "workerinput"):
        use(config.workerinput["served"])
    elif config.getoption("numprocesses", None):
        config.served = serve()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tells a process of pytest-xdist's where that one is."""
    node.workerinput["served"] = node.config.served


def pytest_collection_finish(session):
    """Imports all that tests need, and sets it aside from the collection of garbage; only a large run is worth that."""
    if len(session.items) > 300:
        importlib.import_module("tests.warmed")


@pytest.fixture(autouse=True, scope="session")
def nobody_waits_for_the_disk():
    """What a process has written outlives it without this; only a power cut would tell, which no test makes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda handle: None)
    yield
    patch.undo()


@pytest.fixture
def spawns_warm(monkeypatch):
    """Processes that the package spawns begin as forks of one that has imported PyTorch."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: WARM)

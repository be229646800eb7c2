"""Each test runs once a trainer; what is not installed is skipped with the reason."""

from typing import Any

import pytest
import torch

from tests.conformance.figures import Figures
from tests.conformance.trainers import TRAINERS, Trainer


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "case(number, title): the row of the table that a test measures")


def pytest_generate_tests(metafunc: Any) -> None:
    if "trainer" in metafunc.fixturenames:
        chosen = metafunc.definition.get_closest_marker("case").kwargs.get("trainers")
        trainers = [each for each in TRAINERS if (not each.of_pairs if chosen is None else each.name in chosen)]
        metafunc.parametrize("trainer", trainers, ids=lambda trainer: trainer.name, indirect=True)


@pytest.fixture
def trainer(request: Any) -> Trainer:
    found: Trainer = request.param
    if found.missing:
        pytest.skip(found.missing)
    return found


@pytest.fixture
def figures(request: Any, trainer: Trainer, record_property: Any) -> Figures:
    number, title = request.node.get_closest_marker("case").args
    return Figures(trainer, number, title, record_property)


@pytest.fixture(autouse=True)
def _same_generators() -> Any:
    """Each trainer begins with the same generators, and leaves default dtypes as they were."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)

"""What would fit on another card."""

import pytest

from autoaccum.errors import SetupError
from autoaccum.probing.cache import Lines
from autoaccum.probing.elsewhere import CONTEXT_BYTES, elsewhere
from autoaccum.probing.report import ProbeReport
from autoaccum.units import GIB


def report(a, b):
    return ProbeReport(1, 1, "cap", 1, "", "cpu", (), None, {}, forecaster=Lines(((float(a), float(b)),), None))


def test_the_limit_is_the_largest_whose_forecast_is_within_the_cards_memory_less_a_context():
    found = elsewhere(report(GIB, GIB // 4), "RTX 4090", on_cpu=True)
    assert found.budget_bytes == 24 * GIB - CONTEXT_BYTES
    assert found.limit == 90  # 1 + 90/4 = 23.5 GiB
    assert "CPU kernels" in found.note
    assert "CPU kernels" not in elsewhere(report(GIB, GIB // 4), "RTX 4090", on_cpu=False).note
    assert elsewhere(report(30 * GIB, 1), "RTX 4090", on_cpu=True).limit == 0


@pytest.mark.parametrize("name", ["rtx 4090", "NVIDIA GeForce RTX 4090", "GeForce RTX 4090"])
def test_names_are_forgiving(name):
    assert elsewhere(report(1, 1), name, on_cpu=False).card == "RTX 4090"


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(SetupError, match=r"RTX 4091.*did you mean RTX 40"):
        elsewhere(report(1, 1), "RTX 4091", on_cpu=False)

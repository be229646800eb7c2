"""What would fit on another card."""

import re
from dataclasses import replace

import pytest

from autoaccum.errors import SetupError
from autoaccum.probing.cache import Lines
from autoaccum.probing.elsewhere import CARDS, CONTEXT_BYTES, elsewhere, known_card
from autoaccum.probing.report import ProbeReport
from autoaccum.units import GIB, MIB


def report(a, b):
    return ProbeReport(1, 1, "cap", 1, "", "cpu", (), None, {}, forecaster=Lines(((float(a), float(b)),), None))


def test_the_limit_is_the_largest_whose_forecast_is_within_the_cards_memory_less_a_context():
    found = elsewhere(report(GIB, GIB // 4), "RTX 4090")
    assert found["memory_bytes"] == 24564 * MIB
    assert 23 * GIB - CONTEXT_BYTES < found["budget_bytes"] < 24207 * MIB - CONTEXT_BYTES  # what CUDA has of it
    assert found["limit"] == 87  # 1 + 87/4 = 22.75 GiB
    assert "CPU kernels" in found["note"]
    on_a_gpu = replace(report(GIB, GIB // 4), device_type="cuda")
    assert "CPU kernels" not in elsewhere(on_a_gpu, "RTX 4090")["note"]
    assert elsewhere(report(30 * GIB, 1), "RTX 4090")["limit"] == 0


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("rtx 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"), ("4090", "RTX 4090"), ("RTX4070TiSuper", "RTX 4070 Ti Super"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"), ("4060ti 16gb", "RTX 4060 Ti 16GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"), ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("A100-PCIE-40GB", "A100 40GB"), ("NVIDIA H100 80GB HBM3", "H100"), ("H100", "H100"), ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"), ("Tesla V100-SXM2-16GB", "V100 16GB"), ("NVIDIA A10G", "A10G"), ("a10", "A10"),
        ("NVIDIA RTX A6000", "RTX A6000"), ("A6000", "RTX A6000"), ("L4 24 GB", "L4"), (" 24GiB", "24GiB"),
    ],
)  # fmt: skip
def test_names_are_forgiving(said, name):
    assert known_card(said) == name


@pytest.mark.parametrize("name", CARDS)
def test_every_card_is_found_by_its_own_name_and_has_less_than_was_sold(name):
    assert known_card(name) == name
    found = elsewhere(report(1, GIB), name)
    assert found["memory_bytes"] == CARDS[name]
    assert 0.85 * CARDS[name] < found["budget_bytes"] < 0.97 * CARDS[name]


def test_a_memory_is_as_good_as_a_card():
    assert elsewhere(report(GIB, GIB // 4), "10 GiB")["limit"] == 32  # of 9.2 GiB


@pytest.mark.parametrize(
    ("said", "near"),
    [
        ("RTX 4091", "RTX 40"), ("A100", "A100 40GB, A100 80GB?"), ("v100", "V100 16GB, V100 32GB?"),
        ("RTX 40", "RTX 4060, RTX 4060 Ti 8GB, RTX 4060 Ti 16GB, RTX 4070"), ("A100 60GB", "A100 40GB, A100 80GB"),
        ("RTX 4090 24 GB Laptop", "RTX 4090"), ("H100 NVL", "H100"),
    ],
)  # fmt: skip
def test_an_unknown_card_names_the_nearest(said, near):
    with pytest.raises(SetupError, match=rf"{said}.*did you mean {re.escape(near)}"):
        elsewhere(report(1, 1), said)


def test_nothing_like_a_card_names_them_all():
    with pytest.raises(SetupError, match=r"known are GTX 1080 Ti.*give its memory instead, as --for 24GiB"):
        known_card("")

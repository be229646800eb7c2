"""Savers of the optimizer on a device: what is freed, what is forecast of it, and that steps are the same."""

import pytest
import torch
from torch import nn

import autoaccum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ASKED = {"loss": nn.MSELoss(), "optimizer": "adamw", "target_batch": 16, "device": "cuda", "precision": "fp32",
         "memory": "1GiB", "seed": 3, "cache": False}  # fmt: skip
SAVERS = ["optimizer_on_host", "step_in_backward"]


def make():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))


def data():
    chance = torch.Generator().manual_seed(1)
    return torch.randn(32, 1024, generator=chance), torch.randn(32, 1024, generator=chance)


@pytest.mark.parametrize("saver", SAVERS)
def test_what_is_freed_is_forecast(saver):
    plain, report = (autoaccum.probe(make(), data(), **ASKED, ladder=ladder) for ladder in (None, saver))
    weights = report.parts["parameters"]
    freed = plain.forecast(16).requested - report.forecast(16).requested
    assert freed >= (1.5 if saver == "optimizer_on_host" else 0.75) * weights  # of two moments, of the gradients
    assert report.parts["optimizer_state" if saver == "optimizer_on_host" else "gradients"] < weights / 100
    ran = [trial for trial in report.trials if trial.fits and trial.reserved_bytes]
    assert abs(report.forecast(ran[-1].batch).requested / ran[-1].peak_bytes - 1) <= 0.01
    assert abs(report.forecast(ran[-1].batch) / ran[-1].reserved_bytes - 1) <= 0.02


@pytest.mark.parametrize("saver", SAVERS)
def test_a_training_leaves_the_state_where_it_waits(saver):
    result = autoaccum.fit(make(), data(), **ASKED, ladder=saver, check=False, on_nonfinite="skip")
    assert result.plan.ladder == saver
    assert len(result.history) == 2


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_name().startswith("Fake"), reason="computes nothing"
)
def test_weights_are_those_of_a_usual_training(saver):
    plain, model = make(), make()
    for each, ladder in ((plain, None), (model, saver)):
        autoaccum.fit(each, data(), **ASKED, ladder=ladder)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))

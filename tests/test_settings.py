"""Every setting is said once: what the public functions, the command line and a plan make of it follows from there."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.cli.main import fit, search, verify
from autoaccum.cli.probe_command import probe
from autoaccum.settings import SETTINGS, deciding, reference, taken_by

# What a probe's and a check's own signatures say otherwise: a probe without a target looks for the largest that fits.
DATA = ("model", "data")


def keywords(function):
    return {n: p for n, p in inspect.signature(function).parameters.items() if n not in DATA}


@pytest.mark.parametrize("function", [autoaccum.fit, autoaccum.prepare])
def test_signatures_have_the_settings_in_their_order_with_their_defaults(function):
    found = keywords(function)
    assert list(found) == list(SETTINGS)
    assert {name: parameter.default for name, parameter in found.items()} == {n: s.default for n, s in SETTINGS.items()}


@pytest.mark.parametrize("function", [autoaccum.probe, autoaccum.verify])
def test_the_smaller_signatures_have_theirs(function):
    found = keywords(function)
    wanted = [name for name, setting in SETTINGS.items() if function.__name__ in setting.takers]
    assert [name for name in SETTINGS if name in found] == wanted
    assert {name: found[name].default for name in wanted} == {name: SETTINGS[name].default for name in wanted}


@pytest.mark.parametrize("command", [fit, probe, verify, search], ids=lambda command: command.name)
def test_the_command_line_has_an_option_for_all_that_can_be_written_there(command):
    options = {parameter.name for parameter in command.params}
    assert {name for name in taken_by(command.name) if SETTINGS[name].kind != "python"} <= options


CHOSEN = ("precision", "accumulate", "batch_norm", "tail", "prefer", "lr_rule", "schedule", "on_nonfinite", "ladder")


def test_choices_are_those_that_are_checked():
    for name in (
        "precision",
        "accumulate",
        "batch_norm",
        "tail",
        "prefer",
        "lr_rule",
        "schedule",
        "on_nonfinite",
        "ladder",
    ):
        with pytest.raises(ValueError, match="nonsense") as refused:
            autoaccum.prepare(
                nn.Linear(2, 2), (torch.randn(8, 2), torch.randn(8, 2)), target_batch=4, micro_batch=2,
                loss=nn.MSELoss(), device="cpu", check=False, **{name: "nonsense"},
            )  # fmt: skip
        for choice in SETTINGS[name].choices:
            assert repr(choice) in str(refused.value) or f'"{choice}"' in str(refused.value), (name, choice)


@pytest.mark.parametrize("name", list(deciding("plan")))
def test_what_a_plan_fixes_is_said_where_it_is_asked_for_beside_one(name):
    other = {"lr_batch": 3, "lr_rule": "linear", "batch_norm": "keep", "tail": "drop", "prefer": "fastest",
             "micro_batch": 3, "multiple_of": 2, "max_batch": 3}[name]  # fmt: skip
    said = []
    autoaccum.prepare(
        nn.Linear(2, 2), (torch.randn(8, 2), torch.randn(8, 2)), plan=autoaccum.plan(2, 4), loss=nn.MSELoss(),
        device="cpu", check=False, callbacks=[said.append], **{name: other},
    )  # fmt: skip
    assert any(f"{name}={other!r} is set aside" in getattr(event, "text", "") for event in said)


def test_the_reference_of_keywords_is_up_to_date():
    guide = Path(__file__).parent.parent / "examples" / "README.md"
    assert reference() in guide.read_text(encoding="utf-8"), "run: python -m tests.write_reference"

"""What `import autoaccum` promises: the names, lazily, and callable whatever else was imported."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import autoaccum


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)


def test_every_name_in_all_is_there_and_reports_a_home():
    for name in autoaccum.__all__:
        assert getattr(autoaccum, name) is not None
    assert sorted(autoaccum.__all__, key=str) == sorted(set(autoaccum.__all__))
    assert set(autoaccum.__all__) <= set(dir(autoaccum))


def test_all_holds_the_names_of_the_contract():
    promised = {
        "fit", "prepare", "probe", "plan", "verify", "search", "Accumulator", "Mean", "TrainingLoop", "ProbeReport",
        "Trial", "Plan", "FitResult", "StepRecord", "VerifyReport", "SearchResult", "errors", "events",
        "StopTraining", "JsonlSink", "TensorBoardSink", "attach", "Coupled", "Phase", "chunked_cross_entropy",
    }  # fmt: skip
    assert promised <= set(autoaccum.__all__)


def test_what_callbacks_get_and_raise_is_public():
    assert issubclass(autoaccum.events.EpochEnded, autoaccum.events.Event)
    assert autoaccum.events.StopTraining is autoaccum.StopTraining
    assert Path(autoaccum.__file__).with_name("py.typed").exists()
    done = run("from autoaccum import events, StopTraining; assert issubclass(events.StopTraining, StopTraining)")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_no_torch():
    assert run("import sys, autoaccum; sys.exit('torch' in sys.modules)").returncode == 0


def test_an_unknown_name_is_an_attribute_error():
    done = run("import autoaccum; autoaccum.prob")
    assert "has no attribute 'prob'" in done.stderr


@pytest.mark.slow
def test_public_functions_stay_callable_after_every_submodule_was_imported():
    done = run(
        """
        import importlib, pkgutil, warnings
        import torch
        from torch import nn
        import autoaccum

        for found in pkgutil.walk_packages(autoaccum.__path__, "autoaccum."):
            if not found.name.startswith("autoaccum.integrations") and not found.name.endswith("__main__"):
                importlib.import_module(found.name)
        x, y = torch.randn(32, 4), torch.randint(0, 3, (32,))
        loss = nn.CrossEntropyLoss()
        for _ in range(2):
            assert autoaccum.plan(10, 25).micro_batches == (9, 8, 8)
            report = autoaccum.probe(nn.Linear(4, 3), (x, y), loss=loss, target_batch=16, device="cpu")
            assert report.plan.target_batch == 16
            assert autoaccum.verify(nn.Linear(4, 3), (x, y), loss=loss, device="cpu").ok
            loop = autoaccum.prepare(nn.Linear(4, 3), (x, y), loss=loss, target_batch=16, device="cpu")
            assert [record.samples for record in loop] == [16, 16]
            assert len(autoaccum.fit(nn.Linear(4, 3), (x, y), loss=loss, target_batch=16, device="cpu").history) == 2
            assert callable(autoaccum.search)
        """
    )
    assert done.returncode == 0, done.stderr

"""What fits at every length: read off a forecast over lengths, checked by two runs, corrected where they surprise."""

import json
from dataclasses import dataclass, field

import pytest
import torch

import autoaccum
from autoaccum.errors import NothingFitsError
from autoaccum.planning.length_rule import limit_at
from autoaccum.planning.plan import plan
from autoaccum.probing.cache import Lines
from autoaccum.probing.length_search import LengthSearch, three_lengths
from autoaccum.probing.outcome import FITS, OUT_OF_MEMORY, OVER_BUDGET, Trial
from autoaccum.probing.report import ProbeReport
from tests.texts import Reader, loader, sentences, setup

LENGTHS = (5, 9, 14, 20, 31, 40, 58, 80)


@dataclass
class Fake:
    """A step of a + b·B·L + c·B·L² bytes; the forecast is right but for what is `hidden` at larger steps."""

    budget: int
    hidden: float = 1.0
    hard: bool = False
    cached: bool = True
    aligned: bool = True
    reserve: float = 1.0
    floor: int = 1
    trials: list[Trial] = field(default_factory=list)

    @property
    def allowance(self):
        return self

    @property
    def bytes(self):
        return self.budget

    @property
    def suffers(self):
        return self.hard

    @property
    def caches(self):
        return self.cached

    def peak(self, batch, length=None):
        return round(10_000 + 100 * batch * length + batch * length * length)

    def reserved(self, batch, length=None):
        return round(self.peak(batch, length) * self.reserve)

    def real(self, batch, length):
        return round(self.reserved(batch, length) * (self.hidden if batch > 4 else 1.0))

    def run(self, size, kind, length=None):
        real = self.real(size, length)
        fits = real <= self.budget
        lost = self.hard and not fits
        outcome = FITS if fits else OUT_OF_MEMORY if self.hard else OVER_BUDGET
        reserved = None if lost or self.reserve == 1.0 else real
        trial = Trial(size, kind, None if lost else round(real / self.reserve), reserved, 0.0, outcome, length)
        self.trials.append(trial)
        return trial

    def forecast(self, *, over_lengths):
        return self if self.aligned else None


def find_by_length(machine, lengths, *, known=None, **asked):
    return LengthSearch(machine, lengths, **asked).run(known)


def ran(machine, kind):
    return [(trial.batch, trial.length) for trial in machine.trials if trial.kind == kind]


def test_three_lengths_are_far_apart_and_end_with_the_longest():
    assert three_lengths(LENGTHS) == (20, 58, 80)
    assert three_lengths((98, 99, 100)) == (98, 99, 100)
    assert three_lengths((1, 2, 3, 4)) == (1, 2, 4)


def test_the_table_is_exact_and_its_corners_were_run():
    machine = Fake(1_000_000)
    answer = find_by_length(machine, LENGTHS, most=64)
    for length in (3, 20, 50, 80, 200, 700):
        exact = max((size for size in range(1, 65) if machine.peak(size, length) <= machine.budget), default=0)
        assert limit_at(answer.by_length, length) == exact
    assert len(ran(machine, "trace")) == 6
    assert ran(machine, "verify") == [(limit_at(answer.by_length, 80), 80), (limit_at(answer.by_length, 31), 31)]
    assert answer.micro_batch == limit_at(answer.by_length, 80)
    assert answer.forecast.residual == 0.0
    assert all(trial.fits for trial in machine.trials)


@pytest.mark.parametrize("hard", [False, True])
def test_a_step_larger_than_forecast_makes_the_whole_table_smaller(hard):
    machine = Fake(1_000_000, hidden=1.3, hard=hard)
    answer = find_by_length(machine, LENGTHS, most=64)
    for length in LENGTHS:
        size = limit_at(answer.by_length, length)
        assert machine.real(size, length) <= machine.budget
        assert size >= 0.6 * limit_at(find_by_length(Fake(1_000_000), LENGTHS, most=64).by_length, length)
    assert answer.forecast.residual == pytest.approx(0.3 / 1.3, abs=1e-3)
    assert sum(trial.outcome == OUT_OF_MEMORY for trial in machine.trials) == 0


def test_what_an_allocator_reserves_beyond_the_requests_is_counted():
    machine = Fake(1_000_000, reserve=1.2)
    answer = find_by_length(machine, LENGTHS, most=64)
    assert all(machine.reserved(limit_at(answer.by_length, length), length) <= machine.budget for length in LENGTHS)
    assert len(ran(machine, "verify")) == 2


def test_under_a_limit_of_the_process_room_is_kept_for_the_kernels_of_many_shapes():
    machine = Fake(1_000_000, hard=True, cached=False)
    answer = find_by_length(machine, LENGTHS, most=64)
    exact = max(size for size in range(1, 65) if machine.peak(size, 80) <= machine.budget // 2)
    assert answer.micro_batch == exact


def test_where_surprises_do_not_end_the_largest_shape_that_fitted_is_the_measure():
    machine = Erratic(1_000_000)
    answer = find_by_length(machine, LENGTHS, most=64)
    assert machine.peak(answer.micro_batch, 80) <= machine.peak(4, 80)
    assert limit_at(answer.by_length, 5) > answer.micro_batch


class Erratic(Fake):
    """Whatever is larger than the traces is over the budget by more each time."""

    def real(self, batch, length):
        return self.peak(batch, length) if batch <= 4 else self.budget + len(self.trials)


def test_without_a_forecast_there_is_no_table():
    assert find_by_length(Fake(1_000_000, aligned=False), LENGTHS, most=64) is None


def test_the_longest_sample_must_fit():
    with pytest.raises(NothingFitsError, match="longest samples looked at, of length 80"):
        find_by_length(Fake(20_000), LENGTHS, most=64)
    with pytest.raises(NothingFitsError, match="a micro-batch of 2 of the longest"):
        find_by_length(Fake(30_000, floor=2), LENGTHS, most=64)


# --- on a real model -------------------------------------------------------------------------------------------------


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    return autoaccum.probe(Reader(), loader(), target_batch=32, memory="5MiB", device="cpu")


@pytest.mark.parametrize(("batch", "length"), [(4, 77), (9, 30), (2, 300)])
def test_any_shape_is_forecast_to_the_byte(report, batch, length):
    """Also shapes longer than anything that was looked at."""
    alike = loader([torch.full((length,), 65)] * 96)
    alone = autoaccum.probe(Reader(), alike, target_batch=batch, memory="1GiB", cache=False, device="cpu")
    measured = max(trial.peak_bytes for trial in alone.trials if trial.batch == batch)
    assert report.forecast(batch, length) == pytest.approx(measured, rel=1e-3)


def test_the_report_says_what_it_stands_on(report):
    lengths = sorted({len(sample) for sample in sentences()})
    assert report.by_length[0][1] == 32
    assert report.by_length[-1][1] == 1
    assert report.by_length[-1][0] > lengths[-1]
    assert report.micro_batch == limit_at(report.by_length, max(trial.length for trial in report.trials))
    assert "samples differ in length" in report.notes[0]
    assert report.residual < 1e-3
    assert report.plan.by_length == report.by_length
    values = report.to_dict()
    assert values["curve"]
    assert autoaccum.ProbeReport.from_dict(values).by_length == report.by_length


def test_samples_that_are_alike_are_probed_as_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    alike = [torch.full((40,), 65)] * 96
    report = autoaccum.probe(Reader(), loader(alike), target_batch=32, memory="5MiB", device="cpu")
    assert report.by_length == report.plan.by_length == ()
    assert all(trial.length is None for trial in report.trials)


def test_the_second_probe_takes_the_cached_forecast_after_one_small_step(report):
    second = autoaccum.probe(Reader(), loader(), target_batch=32, memory="5MiB", device="cpu")
    assert sum(trial.kind == "trace" for trial in report.trials) == 6
    assert [trial.kind for trial in second.trials] == ["trace", "verify", "verify"]
    assert (second.micro_batch, second.by_length) == (report.micro_batch, report.by_length)
    for shape in ((1, 8), (4, 77), (9, 30), (2, 300), (5, None)):
        assert second.forecast(*shape) == report.forecast(*shape)
    assert "earlier run" in second.notes[-1]
    other = autoaccum.probe(Reader(), loader(), target_batch=32, memory="4MiB", device="cpu")
    assert other.by_length[-1][0] < report.by_length[-1][0]  # the same forecast, for another budget


def test_a_cached_forecast_that_no_longer_holds_is_traced_anew(tmp_path, report):
    (path,) = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    kept["lines"] = [[2 * number for number in line] for line in kept["lines"]]
    del kept["checksum"]  # as the warning about values that do not fit it asks of who changes them on purpose
    path.write_text(json.dumps(kept))
    again = autoaccum.probe(Reader(), loader(), target_batch=32, memory="5MiB", device="cpu")
    assert sum(trial.kind == "trace" for trial in again.trials) == 7
    assert again.by_length == report.by_length


@pytest.mark.slow
def test_a_probe_in_a_child_brings_its_table_and_its_forecast_back(report):
    found = autoaccum.probe(**setup(), target_batch=32, memory="5MiB", device="cpu", isolate=setup)
    assert found.by_length == found.plan.by_length == report.by_length
    assert found.forecast(9, 30) == report.forecast(9, 30)


def test_the_peak_of_windows_that_are_cut_by_length_is_that_of_the_fullest_shape():
    """By it malloc is told whether there is room for freed blocks."""
    tokens = Lines(((0.0, 0.0, 0.0, 1.0, 0.0, 0.0),), None, longest=32)
    report = ProbeReport(4, 4, "cap", 1, "", "cpu", (), None, {}, forecaster=tokens)
    assert report.expected(plan(4, 16, by_length=((20, 16), (32, 4)))) == 20 * 16
    assert report.expected(plan(4, 16)) == 4 * 32
    assert ProbeReport(4, 4, "cap", 1, "", "cpu", (), None, {}).expected(plan(4, 16)) is None

"""The pure search, on a fake device."""

import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.errors import NothingFitsError
from autoaccum.planning.split import even_split
from autoaccum.probing.find_size import Search
from autoaccum.probing.outcome import OUT_OF_MEMORY, OVER_BUDGET
from tests.fakes import FakeMachine, card

CARDS = 1000  # for each kind of card
REACH = 8192


def find(machine, **asked):
    return Search(machine, **asked).run()


def besides_traces(machine):
    return sum(trial.kind != "trace" for trial in machine.trials)


def ooms(machine):
    return sum(trial.outcome == OUT_OF_MEMORY for trial in machine.trials)


def quantile(values, share):
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


@pytest.fixture(scope="module", params=[0.0, 0.02, 0.1], ids=["affine maximum", "slightly bent", "bent"])
def runs(request):
    found = []
    for seed in range(CARDS):
        machine, true = card(seed, bend=request.param)
        found.append((find(machine, ceiling=REACH), machine, true))
    return request.param, found


def test_the_answer_was_run_and_fits(runs):
    for answer, machine, _ in runs[1]:
        assert any(trial.batch == answer.micro_batch and trial.fits for trial in machine.trials)


def test_few_trials_besides_traces(runs):
    counts = [besides_traces(machine) for _, machine, _ in runs[1]]
    assert statistics.median(counts) <= 2
    assert quantile(counts, 0.95) <= 5


def test_hardly_ever_out_of_memory(runs):
    counts = [ooms(machine) for _, machine, _ in runs[1]]
    assert statistics.median(counts) == 0
    assert quantile(counts, 0.95) <= 1


def test_the_limit_is_exact_where_memory_is_an_affine_maximum_and_near_elsewhere(runs):
    bend, found = runs
    ratios = [answer.limit / true for answer, _, true in found]
    assert max(ratios) <= 1.0
    if bend == 0.0:
        assert min(ratios) == 1.0
    else:
        assert statistics.median(ratios) >= 0.98
        assert quantile(ratios, 0.05) >= 0.95


def test_where_memory_jumps_by_up_to_a_third_the_answer_is_found_all_the_same():
    """Nothing seen at small sizes tells of such a jump: it costs an overrun, never a wrong answer."""
    trials, overruns, ratios = [], [], []
    for seed in range(CARDS):
        machine, true = card(seed, bend=0.3)
        answer = find(machine, ceiling=REACH)
        assert any(trial.batch == answer.micro_batch and trial.fits for trial in machine.trials)
        trials.append(besides_traces(machine))
        overruns.append(ooms(machine))
        ratios.append(answer.limit / true)
    assert max(ratios) <= 1.0
    assert statistics.median(ratios) >= 0.98
    assert statistics.median(trials) <= 2
    assert quantile(trials, 0.95) <= 5
    assert quantile(overruns, 0.95) <= 2


@given(st.integers(0, 10**9), st.integers(1, 2000))
def test_a_target_gets_the_fewest_micro_batches_that_fit(seed, target):
    machine, true = card(seed)

    def wanted(limit):
        return even_split(target, limit)[0]

    answer = find(machine, ceiling=target, wanted=wanted, reach=REACH)
    assert answer.micro_batch == wanted(min(true, target))


@given(st.integers(0, 10**9))
def test_without_a_forecast_sizes_that_surely_fit_still_find_the_limit(seed):
    machine, true = card(seed, aligned=False)
    answer = find(machine, ceiling=REACH)
    assert answer.limit is None or answer.limit <= true
    assert answer.micro_batch <= true
    assert answer.forecast is None


@given(st.integers(0, 10**9), st.integers(1, 64))
def test_the_ceiling_is_never_passed(seed, ceiling):
    machine, _ = card(seed)
    answer = find(machine, ceiling=ceiling, reach=REACH)
    assert max(trial.batch for trial in machine.trials) <= ceiling
    assert answer.limit <= ceiling
    if answer.limit == ceiling:
        assert answer.proof == "cap"


def test_nothing_fits():
    machine = FakeMachine(10, [lambda n: 100 + n])
    with pytest.raises(NothingFitsError):
        find(machine, ceiling=100)


def test_a_floor_of_two_is_never_undercut():
    machine = FakeMachine(10, [lambda n: 100 + n], floor=2)
    with pytest.raises(NothingFitsError):
        find(machine, ceiling=100)
    assert [trial.batch for trial in machine.trials] == [2]


def test_a_limit_by_out_of_memory_says_so():
    # The forecast from small sizes sees nothing of a wall at 50 samples.
    machine = FakeMachine(1000, [lambda n: 10 + n + (10_000 if n > 50 else 0)])
    answer = find(machine, ceiling=400)
    assert answer.limit <= 50
    assert answer.micro_batch <= 50


@pytest.mark.parametrize(("hard", "traces_all"), [(True, False), (True, True), (False, True)])
def test_an_exact_forecast_needs_one_run_or_two(hard, traces_all):
    machine, true = card(0, hard=hard, traces_all=traces_all)
    answer = find(machine, ceiling=REACH)
    assert (answer.limit, answer.micro_batch, answer.proof) == (true, true, "forecast")
    assert besides_traces(machine) == 1
    traces = [trial.batch for trial in machine.trials if trial.kind == "trace"]
    if hard and not traces_all:  # an overrun hurts, and not all that runs is traced: one more trace is near the limit
        assert traces[-2:] == [true // 4 | 1, int(true * 0.85)]
    else:
        assert traces[-1] == (true // 2 | 1 if hard else true // 4 | 1)


def test_what_an_allocator_reserved_after_a_retry_is_no_measure():
    """It is what the allocator was allowed: taken for what the size needs, the search ended at three quarters."""

    class Strained(FakeMachine):
        def run(self, size, kind):
            trial = super().run(size, kind)
            if kind == "trace" or size <= 300:
                return trial
            # Over 300 the allocator empties its cache, and gets through with less than it would have liked.
            strained = replace(trial, peak_bytes=int(0.9 * trial.peak_bytes), outcome=OVER_BUDGET)
            self.trials[-1] = strained
            return strained

    machine = Strained(round(1e9 + 1e6 * 330), [lambda n: 1e9 + 1e6 * n])
    answer = find(machine, ceiling=REACH)
    assert 0.97 * 300 <= answer.limit <= 300


@pytest.mark.parametrize("hard", [True, False])
def test_under_a_process_limit_the_last_hundredth_is_not_worth_a_step(hard):
    """A step there may end in out of memory; where an overrun is only counted the limit is looked for to the sample."""
    levels = [lambda n: 1e9 + 1e7 * n * (1 + 0.02 * (n >= 8))]
    machine = FakeMachine(round(1e9 + 1e7 * 400 * 1.02), levels, hard=hard, traces_all=True)
    answer = find(machine, ceiling=REACH)
    assert (answer.limit == 400) is not hard
    assert 400 / 1.025 <= answer.limit <= 400
    assert answer.proof == (None if hard else "forecast")
    assert besides_traces(machine) == (1 if hard else 2)

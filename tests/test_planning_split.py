"""Samples into windows, shares and micro-batches: what holds for every target, limit, floor and world."""

import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from autoaccum.errors import PlanError
from autoaccum.planning.split import (
    Windows,
    can_split,
    even_split,
    nearest_targets,
    shares,
    usable_size,
    whole,
)
from tests.strategies import limits, minimums, rank_limits, tails, targets, world_sizes

small = st.integers(0, 60)


def cuttable_by_hand(samples, limit, minimum):
    return samples == 0 or any(k * minimum <= samples <= k * limit for k in range(1, samples + 1))


# --- even_split


def test_256_with_at_most_100_at_once_are_86_85_85():
    assert even_split(256, 100) == (86, 85, 85)


@given(targets, limits)
def test_sizes_sum_to_the_samples_fit_and_differ_by_at_most_one_in_the_fewest_micro_batches(samples, limit):
    sizes = even_split(samples, limit)
    assert sum(sizes) == samples
    assert max(sizes) <= limit
    assert max(sizes) - min(sizes) <= 1
    assert (len(sizes) - 1) * limit < samples  # one fewer could not hold them
    assert list(sizes) == sorted(sizes, reverse=True)


@given(targets, limits, minimums)
@example(5, 3, 2)
@example(201, 100, 2)
def test_no_size_is_under_the_minimum(samples, limit, minimum):
    assume(limit >= minimum and can_split(samples, limit, minimum))
    sizes = even_split(samples, limit, minimum=minimum)
    assert sum(sizes) == samples
    assert all(minimum <= size <= limit for size in sizes)
    assert (len(sizes) - 1) * limit < samples


@given(small, st.integers(1, 12), st.integers(1, 12))
def test_can_split_is_that_some_number_of_allowed_sizes_sums_to_the_samples(samples, limit, minimum):
    assume(limit >= minimum)
    assert can_split(samples, limit, minimum) == cuttable_by_hand(samples, limit, minimum)


@pytest.mark.parametrize(("limit", "minimum"), [(2, 2), (3, 2), (5, 4), (7, 7), (9, 8), (10, 6)])
def test_an_infeasible_batch_is_refused_with_the_nearest_feasible_one(limit, minimum):
    feasible = [n for n in range(1, 120) if cuttable_by_hand(n, limit, minimum)]
    infeasible = sorted(set(range(1, 100)) - set(feasible))
    assert infeasible
    for samples in infeasible:
        distance = min(abs(n - samples) for n in feasible)
        nearest = tuple(n for n in feasible if abs(n - samples) == distance)
        assert nearest_targets(samples, limit, minimum) == nearest
        with pytest.raises(PlanError, match=f"cut is {' or '.join(map(str, nearest))}$"):
            even_split(samples, limit, minimum=minimum)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 4), st.integers(2, 12))
@example(10, 8, 3, 8)  # 8 + 2 would leave one under the minimum
def test_multiples_are_kept_just_where_the_fewest_micro_batches_allow_it(samples, limit, minimum, unit):
    assume(limit >= minimum and can_split(samples, limit, minimum))
    sizes = even_split(samples, limit, minimum=minimum, multiple_of=unit)
    plain = even_split(samples, limit, minimum=minimum)
    assert sum(sizes) == samples
    assert len(sizes) == len(plain)
    assert all(minimum <= size <= limit for size in sizes)
    odd = sum(size % unit > 0 for size in sizes)
    assert sizes == plain or (odd <= 1 and max(sizes) - min(sizes) <= unit)
    assert list(sizes) == sorted(sizes, reverse=True)
    # Any k - 1 multiples and one other size that are as near to each other, found by trying all odd sizes and levels.
    possible = False
    for other in range(max(minimum, 1), limit + 1):
        left = samples - other
        if len(sizes) == 1:
            possible |= left == 0
        elif left > 0 and left % unit == 0:
            low, extra = divmod(left // unit, len(sizes) - 1)
            levels = [low * unit] + [(low + 1) * unit] * (extra > 0) + [other]
            possible |= all(minimum <= size <= limit for size in levels) and max(levels) - min(levels) <= unit
    assert possible == (odd <= 1)


def test_multiples_of_eight_for_256_with_100_are_88_88_80():
    assert even_split(256, 100, multiple_of=8) == (88, 88, 80)
    assert even_split(260, 100, multiple_of=8) == (88, 88, 84)  # the remainder goes into one odd size
    assert even_split(260, 65, multiple_of=8) == (65, 65, 65, 65)  # multiples would take a fifth


def test_no_samples_need_no_micro_batch():
    assert even_split(0, 4, minimum=2) == ()


def test_a_limit_under_the_minimum_is_refused_with_both_values():
    with pytest.raises(PlanError, match="limit=1 is less than minimum=2, .*BatchNorm.*micro_batch=") as refused:
        even_split(4, 1, minimum=2)
    assert "memory" not in str(refused.value)  # which has nothing to do with it


@pytest.mark.parametrize("limit", [1, 2, 8])
def test_a_batch_under_the_minimum_is_refused_as_a_batch(limit):
    with pytest.raises(PlanError, match="batch of 1 is too small .*minimum=2; BatchNorm.* can be cut is 2"):
        even_split(1, limit, minimum=2)
    with pytest.raises(PlanError, match="batch of 1 is too small"):
        shares(1, [limit], minimum=2)


@pytest.mark.parametrize("value", [True, 4.0, "4", None])
def test_what_is_not_an_int_is_refused_by_value(value):
    with pytest.raises(PlanError, match="give an int"):
        even_split(value, 4)
    with pytest.raises(PlanError, match="give an int"):
        even_split(4, value)


def test_numpy_integers_count_as_integers():
    assert whole("target_batch", np.int64(7), 1) == 7
    with pytest.raises(PlanError, match="target_batch=0 is too small"):
        whole("target_batch", np.int64(0), 1)


# --- shares


@given(targets, limits, world_sizes)
def test_equal_ranks_share_evenly_and_run_the_fewest_micro_batches(samples, limit, world_size):
    parts = shares(samples, [limit] * world_size)
    assert sum(parts) == samples
    assert max(parts) - min(parts) <= 1
    assert max(len(even_split(part, limit)) for part in parts) == -(-samples // (limit * world_size))


@given(st.integers(0, 400), st.data(), minimums)
def test_every_share_can_be_cut_on_its_rank_whenever_the_window_can_at_all(samples, data, minimum):
    allowed = data.draw(rank_limits(minimum))
    if not can_split(samples, max(allowed), minimum):
        with pytest.raises(PlanError, match="nearest"):
            shares(samples, allowed, minimum=minimum)
        return
    parts = shares(samples, allowed, minimum=minimum)
    assert sum(parts) == samples
    assert len(parts) == len(allowed)
    for part, limit in zip(parts, allowed, strict=True):
        assert part == 0 or part >= minimum
        assert sum(even_split(part, limit, minimum=minimum)) == part


@given(
    st.integers(0, 24),
    st.integers(1, 4).flatmap(lambda m: st.tuples(st.just(m), st.lists(st.integers(m, 6), min_size=1, max_size=3))),
)
def test_no_other_sharing_has_fewer_micro_batches_on_its_busiest_rank(samples, minimum_and_limits):
    minimum, allowed = minimum_and_limits
    assume(can_split(samples, max(allowed), minimum))

    def busiest(parts):
        return max(-(-part // limit) for part, limit in zip(parts, allowed, strict=True))

    every = itertools.product(range(samples + 1), repeat=len(allowed))
    possible = [
        parts
        for parts in every
        if sum(parts) == samples and all(map(can_split, parts, allowed, [minimum] * len(allowed)))
    ]
    assert busiest(shares(samples, allowed, minimum=minimum)) == min(map(busiest, possible))


def test_unequal_ranks_share_in_proportion_to_their_limits():
    assert shares(300, [100, 50]) == (200, 100)
    assert shares(7, [2, 1, 4]) == (2, 1, 4)


def test_more_ranks_than_samples_leave_ranks_idle_and_none_under_the_minimum():
    assert shares(3, [8] * 5) == (1, 1, 1, 0, 0)
    assert shares(5, [8] * 4, minimum=2) == (3, 2, 0, 0)
    assert shares(1, [8], minimum=1) == (1,)


def test_a_floor_equal_to_the_limit_shares_whole_micro_batches():
    assert shares(6, [2, 2], minimum=2) == (4, 2)  # 3 + 3 could not be cut into twos


def test_a_window_for_one_rank_goes_to_the_rank_that_can_hold_it():
    assert shares(3, [2, 3], minimum=2) == (0, 3)


def test_a_rank_with_a_limit_under_the_minimum_is_named():
    with pytest.raises(PlanError, match="limit=1 on rank 1 is less than minimum=2"):
        shares(8, [4, 1], minimum=2)


# --- windows


@given(st.integers(0, 300), st.integers(1, 40), tails, minimums, st.just(10**6) | st.integers(1, 20))
@example(257, 256, "step", 2, 10**6)
def test_every_window_but_the_last_is_the_target_and_nothing_cuttable_is_lost(length, target, tail, minimum, limit):
    assume(limit >= minimum and can_split(target, limit, minimum))
    sizes = list(Windows(target, tail=tail, minimum=minimum, limit=limit).sizes(length))
    lost = length - sum(sizes)
    assert all(size == target for size in sizes[:-1])
    assert all(can_split(size, limit, minimum) for size in sizes)
    if tail == "drop":
        assert sizes == [target] * (length // target)
    else:
        assert 0 <= lost < minimum
        # What is lost could not have joined the last window, nor been a window.
        assert not lost or not can_split(lost, limit, minimum)
        assert not lost or not sizes or not can_split(sizes[-1] + lost, limit, minimum)


def test_a_lone_sample_joins_the_window_before_it_where_a_layer_needs_two():
    assert list(Windows(4, tail="step", minimum=2).sizes(9)) == [4, 5]
    assert list(Windows(4, tail="step", minimum=1).sizes(9)) == [4, 4, 1]
    assert list(Windows(4, tail="drop", minimum=2).sizes(9)) == [4, 4]


def test_a_lone_sample_that_can_join_nothing_is_dropped():
    assert list(Windows(4, tail="step", minimum=2, limit=2).sizes(9)) == [4, 4]  # 5 cannot be cut into twos
    assert list(Windows(4, tail="step", minimum=2).sizes(1)) == []  # there is no window before it
    assert list(Windows(4, tail="step", minimum=2, limit=2).sizes(11)) == [4, 4, 2]


def test_an_epoch_under_the_target_is_one_short_window():
    assert list(Windows(8, tail="step").sizes(3)) == [3]
    assert list(Windows(8, tail="drop").sizes(3)) == []


def cut_a_stream(length, chunk, target, **settings):
    """The windows cut from a stream of `length` samples that comes `chunk` at a time, and the most it held."""
    drawn = held = most = 0
    windows = []
    while True:
        size = Windows(target, **settings).next(held, ended=False)
        if size is None and drawn < length:
            more = min(chunk, length - drawn)
            drawn, held = drawn + more, held + more
            most = max(most, held)
            continue
        if size is None:
            size = Windows(target, **settings).next(held, ended=True)
        if not size:
            return windows, most
        windows.append(size)
        held -= size


@given(
    st.integers(0, 200), st.integers(1, 30), st.integers(1, 30), tails, minimums, st.just(10**6) | st.integers(1, 20)
)
@example(9, 1, 4, "step", 2, 10**6)
def test_a_stream_is_cut_into_the_windows_of_a_list_as_long(length, chunk, target, tail, minimum, limit):
    assume(limit >= minimum and can_split(target, limit, minimum))
    settings = {"tail": tail, "minimum": minimum, "limit": limit}
    windows, most = cut_a_stream(length, chunk, target, **settings)
    assert windows == list(Windows(target, **settings).sizes(length))
    assert most <= target + Windows(target, **settings).look_ahead + chunk


@given(st.integers(1, 60), tails, st.integers(1, 9), st.integers(1, 20))
def test_the_look_ahead_is_more_than_the_longest_tail_that_would_join_a_window(target, tail, minimum, limit):
    assume(limit >= minimum and can_split(target, limit, minimum))
    joining = [
        rest
        for rest in range(1, target)
        if not cuttable_by_hand(rest, limit, minimum) and cuttable_by_hand(target + rest, limit, minimum)
    ]
    expected = max(joining, default=-1) + 1 if tail == "step" else 0
    assert Windows(target, tail=tail, minimum=minimum, limit=limit).look_ahead >= expected


def test_a_stream_needs_no_look_ahead_without_a_minimum_and_two_samples_for_batch_norm():
    assert Windows(256).look_ahead == 0
    assert Windows(256, minimum=2).look_ahead == 2
    assert Windows(256, minimum=2, tail="drop").look_ahead == 0


# --- however large the numbers are


@given(st.integers(1, 3000), st.integers(1, 200), tails, st.integers(1, 4), st.integers(1, 60))
def test_runs_of_windows_are_the_windows_themselves(length, target, tail, minimum, limit):
    assume(limit >= minimum and can_split(target, limit, minimum))
    settings = {"tail": tail, "minimum": minimum, "limit": limit}
    windows = list(Windows(target, **settings).sizes(length))
    runs = Windows(target, **settings).runs(length)
    assert sorted(windows, key=lambda size: (size != target, size)) == [size for size, n in runs for _ in range(n)]
    assert Windows(target, **settings).usual(length) == (windows[0] if windows else target)


@given(targets, limits, minimums, st.integers(1, 16))
def test_the_usable_size_is_the_first_of_the_split(samples, limit, minimum, unit):
    assume(limit >= minimum and can_split(samples, limit, minimum))
    settings = {"minimum": minimum, "multiple_of": unit}
    assert usable_size(samples, limit, **settings) == even_split(samples, limit, **settings)[0]


def test_more_micro_batches_than_a_plan_lists_are_refused_with_the_target_that_fits():
    with pytest.raises(PlanError, match="lower the target batch to 1048576 or less"):
        even_split(10**8, 1)
    assert len(even_split(2**20, 1)) == 2**20
    assert usable_size(2**63 - 1, 3) == 3
    assert Windows(2).runs(2**63 - 1) == [(2, 2**62 - 1), (1, 1)]


@pytest.mark.parametrize("minimum", [1, 2, 10**5])
def test_the_look_ahead_of_huge_windows_is_worked_out_at_once(minimum):
    assert Windows(2**62, minimum=minimum, limit=minimum + 1).look_ahead <= minimum * minimum + 1

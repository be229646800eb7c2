"""Windows cut by length: every sample once, every micro-batch within what fits at its length, at the least cost."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.errors import PlanError
from autoaccum.planning import length_rule as module
from autoaccum.planning.length_rule import LengthRule, check_room, limit_at, narrowest, room_of, scaled
from autoaccum.planning.plan import Plan, plan

sample_lengths = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@st.composite
def rooms(draw, longest=60):
    """Tables that have room for a sample of every length drawn here."""
    falling = sorted(draw(st.sets(st.integers(1, 50), min_size=1, max_size=8)), reverse=True)
    rising = sorted(draw(st.sets(st.integers(1, 59), min_size=len(falling), max_size=len(falling))))
    return tuple(zip([*rising[:-1], longest], falling, strict=True))


def cost(rule, lengths, pieces):
    """What the cut is chosen by: tokens with their padding, and a part of the fullest micro-batch for each."""
    fullest = max(length * min(rule.limit(length), len(lengths)) for length in lengths)
    return sum(len(piece) * max(lengths[at] for at in piece) for piece in pieces) + len(pieces) * fullest / 32


def all_cuts(order):
    for at in range(1, len(order) + 1):
        if at == len(order):
            yield [order]
        for rest in all_cuts(order[at:]) if at < len(order) else []:
            yield [order[:at], *rest]


def longest_first(lengths):
    return sorted(range(len(lengths)), key=lambda at: -lengths[at])


@given(sample_lengths, rooms(), st.sampled_from([1, 1, 2, 3]))
def test_each_sample_runs_once_and_each_micro_batch_fits_at_its_own_length(lengths, room, minimum):
    rule = LengthRule(room, minimum, 1)
    try:
        pieces = rule.split(lengths)
    except PlanError:
        assert minimum > 1  # a single sample always fits in these tables
        return
    assert sorted(at for piece in pieces for at in piece) == list(range(len(lengths)))
    for piece in pieces:
        assert minimum <= len(piece) <= rule.limit(max(lengths[at] for at in piece))
    assert [at for piece in pieces for at in piece] == longest_first(lengths)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), rooms(), st.sampled_from([1, 2]))
def test_no_other_cut_of_the_sorted_window_costs_less(lengths, room, minimum):
    rule = LengthRule(room, minimum, 1)
    allowed = [
        pieces
        for pieces in all_cuts(longest_first(lengths))
        if all(minimum <= len(piece) <= rule.limit(lengths[piece[0]]) for piece in pieces)
    ]
    if not allowed:
        with pytest.raises(PlanError, match="cannot be cut"):
            rule.split(lengths)
        return
    best = min(cost(rule, lengths, pieces) for pieces in allowed)
    assert cost(rule, lengths, rule.split(lengths)) == pytest.approx(best, rel=1e-12)


@given(sample_lengths, rooms())
def test_where_tokens_cost_nothing_the_micro_batches_are_the_fewest(lengths, room):
    """As many as fit, from the longest on: no other cut of the sorted window reaches further with as many."""
    rule, order, fewest = LengthRule(room, 1, 1), longest_first(lengths), 0
    while order:
        order, fewest = order[rule.limit(lengths[order[0]]) :], fewest + 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "OVERHEAD", 1e-9)
        assert len(rule.split(lengths)) == fewest


@given(st.integers(1, 63), rooms())
def test_samples_of_one_length_are_cut_into_the_fewest(count, room):
    rule = LengthRule(room, 1, 1)
    assert len(rule.split([30] * count)) == -(-count // rule.limit(30))


def test_short_samples_run_many_at_once_and_long_ones_few():
    rule = LengthRule(room_of(lambda samples, length: samples * length <= 400, 16, 100), 1, 4)
    lengths = [100, 90, 95, 100, *[10] * 12]
    assert [len(piece) for piece in rule.split(lengths)] == [4, 12]


def test_large_windows_are_cut_in_steps_and_still_fit():
    rule = LengthRule(room_of(lambda samples, length: samples * length <= 40000, 3000, 100), 1, 4)
    lengths = [1 + 7 * at % 199 for at in range(3000)]
    pieces = rule.split(lengths)
    assert sum(map(len, pieces)) == 3000
    assert all(len(piece) * lengths[piece[0]] <= 40000 for piece in pieces)
    assert cost(rule, lengths, pieces) < 1.2 * sum(lengths)


def test_a_sample_longer_than_anything_that_fits_is_refused():
    rule = LengthRule(((10, 4), (50, 1)), 1, 1)
    assert rule.longest == 50
    with pytest.raises(PlanError, match="lengths 5 to 51 cannot be cut.*up to a length of 50"):
        rule.split([5, 51])
    assert LengthRule(((10, 4), (50, 1)), 2, 1).longest == 10


@given(st.integers(1, 200), st.integers(1, 300), st.integers(100, 10000))
def test_the_table_says_what_the_forecast_says(most, longest, budget):
    def fits(samples, length):
        return 50 + samples * length + length * length // 4 <= budget

    room = room_of(fits, most, longest)
    check_room(room)
    for length in (1, 2, 3, 7, 20, 55, 90, 140, 400):
        exact = max((samples for samples in range(1, most + 1) if fits(samples, length)), default=0)
        told = limit_at(room, length)
        assert told <= exact
        assert told == exact if exact <= 64 else told >= exact - exact // 64 - 1


def test_nothing_fits_where_not_even_one_short_sample_does():
    assert room_of(lambda samples, length: False, 8, 10) == ()
    assert limit_at((), 1) == 0


@given(rooms(), st.integers(1, 4))
def test_half_as_much_is_half_at_every_length(room, minimum):
    half = check_room(scaled(room, 1, 2, minimum))
    for length, samples in room:
        assert limit_at(half, length) == max(samples // 2, min(samples, minimum))
        assert limit_at(half, length + 1000) == 0


@given(rooms())
def test_scaling_by_one_changes_nothing(room):
    assert scaled(room, 3, 3, 1) == room


@given(st.lists(rooms(), min_size=1, max_size=3))
def test_what_fits_on_all_ranks_is_the_least_of_what_fits_on_each(tables):
    common = check_room(narrowest(tables))
    for length in range(1, 62):
        assert limit_at(common, length) == min(limit_at(room, length) for room in tables)
    assert narrowest([*tables, ()]) == ()


@pytest.mark.parametrize("room", [((10, 4), (5, 2)), ((10, 4), (20, 4)), ((0, 4),), ((10, 0),)])
def test_what_is_no_table_is_refused(room):
    with pytest.raises(PlanError, match="no table of what fits"):
        plan(4, 16, by_length=room)


def test_a_plan_keeps_its_table_in_its_file_and_says_so(tmp_path):
    made = plan(4, 64, by_length=((30, 64), (100, 8), (200, 4), (800, 1)), multiple_of=8)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    assert made.reasons["by_length"].startswith(
        "samples at once by padded length: 64 of up to 30, 4 of up to 200, 1 of"
    )
    assert "none longer than 800 fits" in made.reasons["by_length"]
    assert made.reasons["multiple_of"].startswith("8: set aside")
    assert made.length_rule == LengthRule(made.by_length, 1, 4)


def test_a_plan_without_a_table_is_what_it_was():
    made = plan(4, 64)
    assert made.length_rule is None
    older = {name: value for name, value in made.to_dict().items() if name != "by_length"}
    assert Plan.from_dict(json.loads(json.dumps(older))) == made


def test_a_lower_limit_lowers_the_table_in_proportion():
    made = plan(8, 64, by_length=((30, 64), (100, 8), (200, 2)))
    assert made.with_limit(4, "less").by_length == ((30, 32), (100, 4), (200, 1))

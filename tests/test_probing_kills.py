"""How far to look where a size has killed its process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.probing.isolate import MOST_KILLS
from autoaccum.probing.kills import CLOSE_ENOUGH, ceiling_below, near_enough


def same(limit):
    return limit


def split(share):
    """The micro-batch of the fewest even ones."""
    return lambda limit: min(share, -(-share // -(-share // max(limit, 1))))


@given(st.integers(2, 65536), st.booleans(), st.data())
def test_few_processes_are_lost_until_the_answer_is_near(start, even, data):
    """Between the first kill and the answer lie at most 16 more, so that two for each come to less than the bound."""
    wanted = split(start) if even else same
    first_that_kills = data.draw(st.integers(2, start))
    lived, killed, kills = 0, start, 1
    while not near_enough(lived, killed, wanted):
        size = ceiling_below(lived, killed, wanted)
        assert lived < size < killed
        if size < first_that_kills:
            lived = size
        else:
            killed, kills = size, kills + 1
    assert lived < first_that_kills <= killed
    assert wanted(killed - 1) <= lived or killed - 1 <= CLOSE_ENOUGH * lived
    assert 2 * kills <= MOST_KILLS


@pytest.mark.parametrize(("lived", "near"), [(39, False), (40, True), (41, True)])
def test_what_the_target_takes_decides_whether_it_is_near(lived, near):
    assert near_enough(lived, 80, split(80)) is near

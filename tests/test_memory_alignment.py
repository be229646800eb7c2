"""Which groups of two traces are the same: equal calls, loops that run more often, and stretches that differ."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.memory.alignment import ForecastFailed, align, common
from tests.synthetic import play


def _longest(first: str, second: str) -> int:
    best = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            best[i + 1][j + 1] = best[i][j] + 1 if a == b else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


@given(st.text("abcd", max_size=16), st.text("abcd", max_size=16))
def test_the_common_subsequence_is_a_longest_one(first, second):
    pairs = common(first, second)
    assert all(first[i] == second[j] for i, j in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in pairwise(pairs))
    assert len(pairs) == _longest(first, second)


def test_very_different_sequences_match_at_their_ends_only():
    first, second = ["a", *range(3000), "z"], ["a", *range(5000, 8000), "z"]
    assert common(first, second) == [(0, 0), (3001, 3001)]


def _trace(names: str):
    """One call a letter; each keeps 10 bytes."""
    return play([(name + "'" * at, f"+{at}", 10) for at, name in enumerate(names)])


def _spans(first: str, second: str):
    cells, share = align([_trace(first), _trace(second)])
    taken = [(first[a:b], second[c:d], cell.matched) for cell in cells for (a, b), (c, d) in [cell.spans]]
    return taken, share


def test_equal_traces_match_call_by_call():
    taken, share = _spans("abcde", "abcde")
    assert taken == [(letter, letter, True) for letter in "abcde"]
    assert share == 0


def test_another_algorithm_in_the_middle_becomes_a_stretch():
    taken, share = _spans("abcdXYefgh", "abcdZefgh")
    assert [cell for cell in taken if not cell[2]] == [("XY", "Z", False)]
    assert [cell[0] for cell in taken if cell[2]] == list("abcdefgh")
    assert share == pytest.approx(2 / 10)


def test_a_single_agreement_between_two_stretches_is_taken_for_chance():
    taken, _ = _spans("abcdXYeZWfghi", "abcdPeQfghi")
    assert [cell for cell in taken if not cell[2]] == [("XYeZW", "PeQ", False)]


def test_a_stretch_may_be_empty_in_one_trace():
    taken, share = _spans("abcefg", "abcDefg")
    assert ("", "D", False) in taken
    assert share == pytest.approx(1 / 7)


def test_a_loop_matches_however_often_it_ran():
    taken, share = _spans("ab" + "xyz" * 3 + "cd", "ab" + "xyz" * 7 + "cd")
    assert taken == [
        ("a", "a", True),
        ("b", "b", True),
        ("xyz" * 3, "xyz" * 7, True),
        ("c", "c", True),
        ("d", "d", True),
    ]
    assert share == 0


def test_two_loops_after_each_other_are_two_cells():
    taken, share = _spans("a" + "xy" * 3 + "m" + "xw" * 3 + "b", "a" + "xy" * 5 + "m" + "xw" * 5 + "b")
    assert [cell[0] for cell in taken] == ["a", "xy" * 3, "m", "xw" * 3, "b"]
    assert share == 0


def test_three_traces_share_their_anchors():
    cells, share = align([_trace("abcdXefgh"), _trace("abcdefgh"), _trace("abcdYZefgh")])
    (stretch,) = [cell for cell in cells if not cell.matched]
    assert stretch.spans == ((4, 5), (4, 4), (4, 6))
    assert share == pytest.approx(2 / 10)


def test_stretches_do_not_cross_phases():
    def trace(forward: str, backward: str):
        script = [(name + "'" * at, f"+{at}{name}", 10) for at, name in enumerate(forward)]
        script += [(f"backward: {name}" + "'" * at, f"+b{at}{name}", 10) for at, name in enumerate(backward)]
        return play(script)

    cells, _ = align([trace("abcX", "Pdef"), trace("abcY", "Qdef")])
    assert [cell.spans for cell in cells if not cell.matched] == [((3, 4), (3, 4)), ((4, 5), (4, 5))]


def test_traces_of_different_phases_are_refused():
    plain = play([("mm", "+a", 1)])
    marked = play([("mm", "+a", 1), ("mark", "optimizer", 0), ("mm", "+b", 1)])
    with pytest.raises(ForecastFailed, match="different phases"):
        align([plain, marked])

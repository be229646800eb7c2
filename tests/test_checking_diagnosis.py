"""The arithmetic behind a diagnosis, on gradients that are made up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoaccum.checking.diagnosis import Evidence, ragged

SIZES = st.integers(4, 9)


class MadeUp:
    """A loss of terms, each a sum over samples divided by what `counts` gives for them; then `twist`ed."""

    def __init__(self, samples, counts, *, seed, elements=40, twist=lambda gradient, rows: gradient):
        generator = torch.Generator().manual_seed(seed)
        self.sums = torch.randn(len(counts), samples, elements, dtype=torch.float64, generator=generator)
        self.counts, self.twist = counts, twist
        self.evidence = Evidence(samples, lambda rows: rows, self.accumulated, 1e-7)

    def accumulated(self, pieces):
        return torch.stack([self.gradient(list(rows)) for rows in pieces]).sum(0)

    def gradient(self, rows):
        terms = [sums[rows].sum(0) / count(rows) for sums, count in zip(self.sums, self.counts)]
        return self.twist(sum(terms[1:], start=terms[0]), rows)


def squares(rows):
    return float(sum((row + 1) ** 2 for row in rows))


@given(samples=st.integers(2, 100))
def test_two_ragged_parts_make_up_the_batch(samples):
    first, second = ragged(samples)
    assert first + second == samples
    assert first >= second >= 1
    assert first > second or samples == 2


@given(samples=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_mean_is_explained_by_its_own_denominator_only(samples, seed):
    evidence = MadeUp(samples, [squares], seed=seed).evidence
    assert evidence.residual(squares) < 1e-10
    assert evidence.residual(len) > 1e-4
    assert evidence.residual(lambda rows: 1.0) > 1e-2


@given(samples=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_two_terms_are_explained_by_their_two_denominators_and_by_no_single_one(samples, seed):
    evidence = MadeUp(samples, [squares, len], seed=seed).evidence
    assert evidence.residual(squares, len) < 1e-10
    assert evidence.residual(len, squares) < 1e-10
    assert evidence.residual(squares) > 1e-4
    assert evidence.residual(len) > 1e-4
    assert evidence.weights() is None


@given(samples=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_what_compares_samples_is_explained_by_nothing(samples, seed):
    def twist(gradient, rows):
        return gradient * gradient.roll(1)  # pairs of samples

    evidence = MadeUp(samples, [len], seed=seed, twist=twist).evidence
    assert evidence.residual(len) > 1e-3
    assert evidence.residual(len, squares) > 1e-4
    assert evidence.weights() is None


@given(samples=SIZES, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_weights_are_found_for_a_denominator_that_nobody_counts(samples, seed):
    evidence = MadeUp(samples, [squares], seed=seed).evidence
    weights = evidence.weights()
    assert weights == pytest.approx([squares(part) / squares(evidence.whole) for part in evidence.parts], rel=1e-6)


def test_weights_prove_nothing_for_a_model_with_fewer_elements_than_parts():
    assert MadeUp(8, [squares], seed=0, elements=3).evidence.weights() is None


def test_a_part_in_which_nothing_counts_brings_nothing():
    def late(rows):
        return float(sum(row > 4 for row in rows))

    made = MadeUp(8, [lambda rows: max(late(rows), 1.0)], seed=0)
    made.sums[:, :5] = 0
    assert made.evidence.parts[-1] == (5, 6, 7)
    assert made.evidence.residual(late) < 1e-10
    made.sums[:, :5] = 1.0
    assert MadeUp(8, [len], seed=0).evidence.residual(late) > 1e-2


def test_an_undivided_sum_is_told_from_a_weighted_one():
    assert MadeUp(8, [len], seed=0).evidence.adds_up
    weighted = MadeUp(8, [len], seed=0)
    plain = weighted.gradient
    weighted.evidence = Evidence(
        8,
        lambda rows: rows,
        lambda pieces: torch.stack([plain(list(rows)) * len(rows) for rows in pieces]).sum(0) / sum(map(len, pieces)),
        1e-7,
    )
    assert not weighted.evidence.adds_up


def test_gradients_are_run_once_and_only_when_asked_for():
    runs = []

    def gradient(pieces):
        runs.append(pieces)
        return torch.ones(5, dtype=torch.float64)

    evidence = Evidence(8, lambda rows: rows, gradient, 1e-4)
    assert runs == []
    evidence.residual(len)
    evidence.residual(squares)
    assert len(runs) == len(evidence.parts) + 1
    assert evidence.cancelled == pytest.approx(1)

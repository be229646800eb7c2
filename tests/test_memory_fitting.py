"""Coefficients over the batch and the length: exact where the figures are, cautious where they are rounded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.memory.fitting import basis, determined, fit

SIX = [(batch, length) for batch in (2, 4) for length in (8, 16, 24)]
SEVEN = [*SIX, (5, 32)]
coefficients = st.integers(0, 10**6)


def _figures(terms, sizes):
    return torch.stack([basis(size) for size in sizes]) @ torch.tensor(terms, dtype=torch.float64)


@given(st.tuples(coefficients, coefficients), st.lists(st.integers(1, 64), min_size=2, max_size=4, unique=True))
def test_a_line_in_the_batch_is_found_to_the_byte(terms, batches):
    sizes = [(batch,) for batch in batches]
    found = fit(_figures(terms, sizes)[None], sizes) @ basis((100_000,))
    assert round(float(found)) == terms[0] + terms[1] * 100_000


@given(st.tuples(*[coefficients] * 6))
def test_terms_in_the_length_squared_are_found_to_the_byte(terms):
    found = fit(_figures(terms, SEVEN)[None], SEVEN) @ basis((64, 512))
    assert float(found) == pytest.approx(float(_figures(terms, [(64, 512)])), rel=1e-9)


@pytest.mark.parametrize("power", range(6))
def test_six_traces_tell_what_a_single_tensor_grows_with(power):
    terms = [0.0] * 6
    terms[power] = 48.0
    found = fit(_figures(terms, SIX)[None], SIX) @ basis((64, 512))
    assert float(found) == pytest.approx(float(_figures(terms, [(64, 512)])), rel=1e-9)


def test_the_line_goes_through_the_two_largest_batches():
    figures = torch.tensor([[7.0, 100.0, 200.0, 100.0]], dtype=torch.float64)
    assert fit(figures, [(1,), (10,), (20,), (10,)]).tolist() == [[0.0, 10.0]]


def test_rounding_to_pages_does_not_become_a_parabola():
    def pages(batch: int, length: int) -> int:
        return -(-batch * length * 300 // 4096) * 4096

    figures = torch.tensor([[float(pages(*size)) for size in SEVEN]], dtype=torch.float64)
    found = float(fit(figures, SEVEN) @ basis((6, 256)))
    assert found == pytest.approx(pages(6, 256), rel=0.05)
    design = torch.stack([basis(size) for size in SIX])
    parabola = torch.linalg.solve(design, figures[0, :6]) @ basis((6, 256))
    assert abs(float(parabola) / pages(6, 256) - 1) > 0.3


def test_sizes_that_do_not_determine_the_fit_are_told_from_those_that_do():
    assert determined([(2,), (4,)])
    assert determined(SIX)
    for sizes in (
        [(2,)],
        [(3,), (3,)],
        SIX[:5],
        [(2, 8), (4, 16)],
        [(2, 16), (4, 16)],
        [(b, n) for b in (2, 3, 4) for n in (8, 16)],
    ):
        assert not determined(sizes)

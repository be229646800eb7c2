"""BatchNorm's momentum for k updates in the place of one."""

import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.errors import PlanError
from autoaccum.planning.bn_momentum import MODES, bn_momentum, mode_reason, momentum_reason

momenta = st.floats(0, 1)
counts = st.integers(1, 2048)


@given(momenta, counts)
def test_k_updates_keep_as_much_of_the_past_as_one_update_did(momentum, k):
    assert (1 - bn_momentum(momentum, k)) ** k == pytest.approx(1 - momentum, rel=1e-9, abs=1e-12)


@given(momenta, counts)
def test_the_momentum_shrinks_with_k_and_stays_a_momentum(momentum, k):
    assert 0 <= bn_momentum(momentum, k + 1) <= bn_momentum(momentum, k) <= 1


@given(momenta)
def test_one_update_keeps_the_layers_own_momentum_to_the_bit(momentum):
    assert bn_momentum(momentum, 1) == momentum
    assert bn_momentum(momentum, 0) == momentum  # an idle rank


@pytest.mark.parametrize(("momentum", "k"), [(1e-12, 7), (0.1, 1024), (1e-6, 100_000)])
def test_small_momenta_keep_their_digits(momentum, k):
    getcontext().prec = 60
    exact = 1 - (1 - Decimal(momentum)) ** (1 / Decimal(k))
    assert bn_momentum(momentum, k) == pytest.approx(float(exact), rel=1e-14, abs=0)


def test_a_cumulative_average_has_no_momentum_to_change():
    assert bn_momentum(None, 4) is None
    assert "cumulative average" in momentum_reason(None, 4, "pooled")


@pytest.mark.parametrize("momentum", [-0.1, 1.5, math.nan, "0.1", True])
def test_what_is_not_a_momentum_is_refused_by_value(momentum):
    with pytest.raises(PlanError, match=f"bn_momentum={momentum!r}"):
        bn_momentum(momentum, 2)


def test_a_batch_norm_layer_with_it_ends_near_one_large_update():
    """On statistics that are alike in every micro-batch it is exact: the same batch four times over."""
    batch = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole, accumulated = (torch.nn.BatchNorm1d(3, dtype=torch.float64) for _ in range(2))
    accumulated.momentum = bn_momentum(whole.momentum, 4)
    whole(batch)
    for _ in range(4):
        accumulated(batch)
    torch.testing.assert_close(accumulated.running_mean, whole.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(accumulated.running_var, whole.running_var, rtol=1e-12, atol=0)


def test_the_reason_gives_value_and_formula_and_says_whether_the_mode_uses_it():
    lines = {mode: momentum_reason(0.1, 3, mode) for mode in MODES}
    assert all(line.startswith("0.03451 = 1 − (1 − 0.1)^(1/3)") for line in lines.values())
    assert "what the layers train with" in lines["momentum"]
    assert "not used" in lines["keep"]


def test_small_micro_batches_are_warned_of_and_large_ones_are_not():
    assert "Caution: 8 samples are few" in mode_reason("pooled", 24, (8, 8, 8), 1)
    assert "Caution" not in mode_reason("pooled", 48, (16, 16, 16), 1)
    assert "Caution: 4 samples are few" in mode_reason("pooled", 4, (4,), 1)
    assert "Caution" not in mode_reason("pooled", 4, (), 8)  # an idle rank normalises nothing


@pytest.mark.parametrize("mode", MODES)
def test_the_reason_says_that_normalisation_stays_a_micro_batches_unless_it_is_the_whole_window(mode):
    assert "Ghost BatchNorm" in mode_reason(mode, 256, (86, 85, 85), 1)
    assert "Ghost BatchNorm" in mode_reason(mode, 256, (64,), 4)
    assert "Ghost BatchNorm" not in mode_reason(mode, 256, (256,), 1)

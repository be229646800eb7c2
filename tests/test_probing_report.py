"""What a report says of its limit: one wording for a plan's line and for what is printed."""

import pytest

from autoaccum.probing.cache import Lines
from autoaccum.probing.outcome import Trial
from autoaccum.probing.report import ProbeReport

MIB = 2**20


def trial(batch, outcome="fits"):
    return Trial(batch, "verify", batch * MIB, None, 0.1, outcome)


def report(limit, proof, *trials, forecaster=None):
    return ProbeReport(
        micro_batch=8, limit=limit, limit_proof=proof, budget_bytes=10 * MIB, budget_reason="", device="cpu",
        trials=trials, residual=None, parts={}, forecaster=forecaster,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (report(None, None, trial(8)), "the target needs no larger size"),
        (report(None, None, trial(8), trial(9, "out of memory")), "it is not known which larger sizes fit"),
        (report(9, "forecast", forecaster=Lines(((0.0, MIB),), None)), "at 10 the forecast is 10.0 MiB"),
        (report(9, "forecast"), "at 10 the forecast is over the budget"),
        (report(9, "forecast", trial(10, "over budget")), "a step at 10 took 10.0 MiB"),
        (report(9, "out of memory"), "10 ran out of memory"),
        (report(9, "cap"), "nothing larger was allowed or looked for; memory has room for more"),
        (report(9, None), "the largest that was run: the little more that may fit was not worth a step near the limit"),
        (report(9, None, trial(12, "over budget")), "larger ones did not fit where the forecast let them"),
    ],
)
def test_the_limit_says_how_it_was_proved(found, said):
    assert said in found.limit_reason
    assert found.to_dict()["limit_reason"] == found.limit_reason

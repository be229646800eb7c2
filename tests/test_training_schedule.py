"""Schedules: counted in optimizer steps, from the peak that the optimizer has."""

import math

import pytest
import torch

from autoaccum.errors import SetupError
from autoaccum.training.schedule import build_schedule


def rates(schedule, steps, *, warmup=0, total=None):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = build_schedule(schedule, optimizer, warmup_steps=warmup, total_steps=total)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return seen


def test_a_constant_rate_without_warmup_needs_no_scheduler():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    assert build_schedule("constant", optimizer, warmup_steps=0, total_steps=None) is None


def test_warmup_rises_in_equal_steps_to_the_peak():
    assert rates("constant", 6, warmup=4) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_linear_and_cosine_fall_to_nothing_at_the_end():
    assert rates("linear", 5, total=4) == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])
    want = [0.25 * (1 + math.cos(math.pi * step / 4)) for step in range(5)]
    assert rates("cosine", 5, total=4) == pytest.approx(want, abs=1e-12)
    assert rates("linear", 6, warmup=2, total=4) == pytest.approx([0.25, 0.5, 0.5, 0.25, 0.0, 0.0])


def test_a_function_makes_the_users_own():
    made = rates(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2), 5)
    assert made == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])


def test_a_schedule_holds_no_state_that_a_longer_training_would_contradict():
    """A resumed training may be asked for more epochs: the end moves, the steps taken stay."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    short = build_schedule("linear", optimizer, warmup_steps=0, total_steps=4)
    for _ in range(2):
        optimizer.step()
        short.step()
    long = build_schedule("linear", optimizer, warmup_steps=0, total_steps=8)
    long.load_state_dict(short.state_dict())
    optimizer.step()
    long.step()
    assert long.get_last_lr() == pytest.approx([1 - 3 / 8])


@pytest.mark.parametrize(
    ("schedule", "settings", "message"),
    [
        ("exponential", {}, "choose"),
        ("cosine", {}, "has no length"),
        ("constant", {"warmup": -1}, "warmup_steps=-1"),
        ("constant", {"warmup": True}, "warmup_steps=True"),
        (lambda optimizer: None, {"warmup": 3}, "schedule of your own"),
    ],
)
def test_what_makes_no_schedule_is_refused(schedule, settings, message):
    with pytest.raises(SetupError, match=message):
        rates(schedule, 1, **settings)

"""Schedules: counted in optimizer steps, from the peak that the optimizer has."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from autoaccum.errors import SetupError
from autoaccum.training.schedule import build_schedule, schedule_name
from tests.versions import TORCH, since


def sgd(lr=0.5):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


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
        (lambda optimizer: None, {}, "schedule= gave None, which is no schedule: return something with step"),
        (lambda optimizer: 3, {}, "schedule= gave 3, which is no schedule"),
        (lambda optimizer: lr_scheduler.StepLR(sgd(), 2), {}, "a StepLR of another optimizer, a SGD"),
        (
            lambda optimizer: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(sgd(), 2)]),
            {},
            "gave a ChainedScheduler of another optimizer",
        ),
    ],
)
def test_what_makes_no_schedule_is_refused(schedule, settings, message):
    with pytest.raises(SetupError, match=message):
        rates(schedule, 1, **settings)


def told_of(schedule, optimizer):
    told = []
    made = build_schedule(schedule, optimizer, warmup_steps=0, total_steps=4, tell=told.append)
    assert made.step is not None
    return told


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1.0), "LambdaLR"),
        (lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=4), "OneCycleLR"),
    ],
)
def test_a_schedule_that_was_built_before_the_rate_was_scaled_is_refused_with_both_rates(build, name):
    optimizer = sgd(lr=0.1)
    before = build(optimizer)
    counts_from = before.base_lrs[0]
    for group in optimizer.param_groups:  # as a plan does
        group.update(lr=group["lr"] * 4, initial_lr=group["initial_lr"] * 4)
    peak = optimizer.param_groups[0]["initial_lr"]
    with pytest.raises(SetupError, match=rf"a {name} that was built before .* from {counts_from:.6g}, .*{peak:.6g}, w"):
        told_of(lambda optimizer: before, optimizer)


def test_a_schedule_from_before_may_go_on_where_nothing_was_scaled():
    optimizer = sgd()
    before = lr_scheduler.StepLR(optimizer, 2)
    assert told_of(lambda optimizer: before, optimizer) == []


@pytest.mark.parametrize(
    "build",
    [
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer), lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)],
            [2],
        ),
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_a_schedule_with_rates_of_its_own_is_told_of_in_one_line(build, used):
    optimizer = sgd(lr=0.4)
    if used:
        lr_scheduler.StepLR(optimizer, 2)
    (text,) = told_of(build, optimizer)
    assert "sets its own rates" in text
    assert "the plan's rate of 0.4 is not used" in text
    assert "\n" not in text


@pytest.mark.parametrize(
    "build",
    [
        lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1),
        lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 8)),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=4),
        lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, float(optimizer.param_groups[0]["lr"])),
        lambda optimizer: lr_scheduler.SequentialLR(
            optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.StepLR(optimizer, 2)], [2]
        ),
        lr_scheduler.ReduceLROnPlateau,
    ],
)
@pytest.mark.parametrize("lr", [0.4, lambda: torch.tensor(0.4)], ids=["number", "tensor"])
def test_a_schedule_that_counts_from_the_plans_rate_is_not_told_of(build, lr):
    if TORCH < (2, 5) and callable(lr):
        pytest.skip("torch 2.4 writes into a first rate that is a tensor")
    assert told_of(build, sgd(lr=lr() if callable(lr) else lr)) == []


@since("2.5", "a chain inside a sequence")
def test_a_schedule_is_named_with_its_parts():
    optimizer = sgd()
    steps = lr_scheduler.StepLR(optimizer, 2)
    nested = lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer), lr_scheduler.ChainedScheduler([steps])], [2]
    )
    assert schedule_name(nested) == "SequentialLR(LinearLR, ChainedScheduler(StepLR))"
    assert schedule_name(None) is None


def one_cycle(total):
    return lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=total)


def warmed_up(total):
    def schedule(optimizer):
        parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=total)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[5])

    return schedule


def test_a_cycle_that_ends_before_the_training_is_refused_beforehand():
    with pytest.raises(SetupError, match="give total_steps=15"):
        build_schedule(one_cycle(10), sgd(), warmup_steps=0, total_steps=15)


@pytest.mark.parametrize("schedule", [one_cycle(15), one_cycle(20), warmed_up(10)])
def test_a_cycle_as_long_as_the_training_takes_every_step(schedule):
    optimizer = sgd()
    scheduler = build_schedule(schedule, optimizer, warmup_steps=0, total_steps=15)
    for _ in range(15):
        optimizer.step()
        scheduler.step()


def test_a_cycle_over_a_stream_is_told_of():
    told = []
    build_schedule(one_cycle(10), sgd(), warmup_steps=0, total_steps=None, tell=told.append)
    assert any("give max_steps" in line for line in told)

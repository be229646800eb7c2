"""A plan's rates in the user's own optimizer: once, however often they train with it."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import autoaccum
from autoaccum.errors import SetupError
from autoaccum.training.events import TrainingWarning

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 4


def rates(optimizer, **keywords):
    """The rate of each step of one more training with this optimizer: batches of 4 as tuned, of 16 as trained."""
    (parameters,) = [group["params"] for group in optimizer.param_groups]
    model = nn.Linear(6, 4)
    model.weight, model.bias = parameters
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    found = autoaccum.fit(model, loader, **{"loss": F.cross_entropy, "optimizer": optimizer, "target_batch": 16,
                                            "micro_batch": 8, "device": "cpu", **keywords})  # fmt: skip
    return [record.lr for record in found.history]


def sgd(**settings):
    return torch.optim.SGD(nn.Linear(6, 4).parameters(), **{"lr": 0.1, **settings})


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_a_second_training_does_not_scale_what_is_scaled(lr):
    optimizer = sgd(lr=lr)
    for _ in range(3):
        assert rates(optimizer) == pytest.approx([0.4, 0.4])


def test_adams_other_settings_are_scaled_once_as_well():
    optimizer = torch.optim.AdamW(nn.Linear(6, 4).parameters(), lr=0.1)
    found = []
    for _ in range(2):
        rates(optimizer, lr_rule="adam-sde")
        found.append({name: optimizer.param_groups[0][name] for name in ("lr", "betas", "eps")})
    assert found[0] == found[1]
    assert found[0]["betas"] == pytest.approx((0.6, 0.996))


def test_a_training_that_could_not_begin_scaled_nothing():
    optimizer = sgd()
    for _ in range(2):
        with pytest.raises(SetupError, match="schedule='cosin'"):
            rates(optimizer, schedule="cosin")
    assert rates(optimizer) == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("schedule", ["cosine", lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)])
def test_a_second_schedule_begins_where_the_first_did(schedule):
    optimizer = sgd()
    first = rates(optimizer, schedule=schedule)
    assert first[0] == pytest.approx(0.4)
    assert first[1] < 0.3
    assert rates(optimizer, schedule=schedule) == pytest.approx(first)
    assert rates(optimizer) == pytest.approx([0.4, 0.4])


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_rate_set_between_two_trainings_holds(schedule):
    optimizer = sgd()
    rates(optimizer, schedule=schedule)
    optimizer.param_groups[0]["lr"] = 0.02
    assert rates(optimizer, schedule=schedule)[0] == pytest.approx(0.08)


def test_a_group_that_was_added_since_is_scaled_from_its_own_rate():
    optimizer = sgd()
    rates(optimizer)
    extra = nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [extra], "lr": 1.0})
    model = nn.Linear(6, 4)
    model.weight, model.bias, model.extra = *optimizer.param_groups[0]["params"], extra
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    autoaccum.prepare(
        model, loader, loss=F.cross_entropy, optimizer=optimizer, target_batch=16, micro_batch=8, device="cpu"
    )
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.4, 4.0])


def test_a_scheduler_that_wants_a_loss_is_refused_with_what_to_do():
    with pytest.raises(SetupError, match="ReduceLROnPlateau wants a loss .* EpochEnded"):
        rates(sgd(), schedule=torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_an_optimizer_that_nobody_holds_any_more_is_let_go():
    optimizer = sgd()
    rates(optimizer, schedule="cosine")
    seen = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert seen() is None


def test_a_schedule_that_was_built_beforehand_is_refused_and_may_be_kept_without_scaling():
    optimizer = sgd()
    before = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(SetupError, match=r'counts from 0.1, and the plan\'s rate is 0.4.*lr_rule="none"'):
        rates(optimizer, schedule=lambda optimizer: before)
    assert rates(optimizer, schedule=lambda optimizer: before, lr_rule="none") == pytest.approx([0.1, 0.01])


def test_a_schedule_with_rates_of_its_own_is_warned_of_where_the_plan_had_scaled():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)

    with pytest.warns(TrainingWarning, match="the plan's rate of 0.4 is not used"):
        rates(sgd(), schedule=schedule)
    notes = []
    rates(sgd(), schedule=schedule, lr_rule="none", callbacks=[lambda event: notes.append(getattr(event, "text", ""))])
    assert any("the plan's rate of 0.1 is not used" in note for note in notes) is False
    rates(sgd(lr=0.2), schedule=schedule, lr_rule="none",
          callbacks=[lambda event: notes.append(getattr(event, "text", ""))])  # fmt: skip
    assert any("the plan's rate of 0.2 is not used" in note for note in notes)

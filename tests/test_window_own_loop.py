"""What a loop of one's own did at each batch before, left in it: refused instead of trained with."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoaccum import Accumulator, plan
from autoaccum.errors import LossError, SetupError

LEFT_IN = {
    "zeroed before": ("zero_grad", None),
    "zeroed to zeros before": (lambda model, optimizer: optimizer.zero_grad(set_to_none=False), None),
    "zeroed after": (None, "zero_grad"),
    "clipped": (None, lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 1e-3)),
    "stepped": (None, "step"),
}


def act(what, model, optimizer):
    if what is not None:
        getattr(optimizer, what)() if isinstance(what, str) else what(model, optimizer)


@pytest.mark.parametrize("kind", LEFT_IN)
def test_what_an_accumulator_does_at_the_end_is_refused_in_the_middle(kind):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, after = LEFT_IN[kind]
    kept = model.weight.detach().clone()
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    accumulator = Accumulator(model, optimizer, plan(3, 8))
    window = accumulator.window((x, y))
    with pytest.raises(SetupError, match=r"inside a window: leave it out|gradients were changed between two"):
        for inputs, target in window:
            act(before, model, optimizer)
            accumulator.backward(F.cross_entropy(model(inputs), target))
            act(after, model, optimizer)
    window.close()
    assert torch.equal(model.weight, kept)
    assert not optimizer._optimizer_step_pre_hooks
    optimizer.zero_grad()  # between two windows it harms nothing
    for inputs, target in accumulator.window((x, y)):
        accumulator.backward(F.cross_entropy(model(inputs), target))
    assert not torch.equal(model.weight, kept)
    optimizer.step()


def test_gradients_of_parameters_that_another_optimizer_steps_are_not_looked_at():
    judge, painter = nn.Linear(4, 1), nn.Linear(2, 4)
    both = nn.Sequential(painter, judge)
    judges = torch.optim.SGD(judge.parameters(), lr=0.1)
    accumulator = Accumulator(both, torch.optim.SGD(painter.parameters(), lr=0.1), plan(2, 6))
    for noise in accumulator.window(torch.randn(6, 2)):
        judges.zero_grad()
        accumulator.backward(both(noise).mean())
    assert accumulator.step == 1


def test_what_a_plan_leaves_to_the_loop_is_told():
    model = nn.Linear(6, 3)
    made = plan(4, 16, optimizer="sgd", lr=0.1, lr_batch=4)
    with pytest.warns(
        UserWarning, match=r"its learning rate is 0\.4, and the optimizer's 0\.1: set that in its groups$"
    ):
        Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), made)
    under = dataclasses.replace(plan(4, 16), ladder="checkpointing")
    with pytest.warns(UserWarning, match=r"fit under ladder='checkpointing'"):
        Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), under)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.4), made)


@pytest.mark.parametrize(("sizes", "told"), [((16, 16, 5, 16), False), ((8, 8), True), ((16, 20), True)])
def test_windows_that_are_not_the_plans_target_are_told_of(sizes, told):
    model = nn.Linear(6, 3)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), plan(4, 16))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for size in sizes:
            for x, y in accumulator.window((torch.randn(size, 6), torch.arange(size) % 3)):
                accumulator.backward(F.cross_entropy(model(x), y))
    found = [str(each.message) for each in heard]
    expected = f"windows hold {sizes[-1]} samples, and the plan's target is 16: give window() batches of that"
    assert found == [expected] * told


def beside_a_sum(outputs, target, reduction):
    """As the loss of a variational autoencoder."""
    return F.mse_loss(outputs, target, reduction=reduction) - 0.5 * torch.sum(1 - outputs.square())


@pytest.mark.parametrize("function", [F.mse_loss, F.smooth_l1_loss, F.cross_entropy, beside_a_sum])
def test_a_sum_of_torchs_is_added_up_as_over_the_whole_batch(function):
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    y = torch.randint(3, (8,)) if function is F.cross_entropy else torch.randn(8, 3, dtype=torch.float64)
    whole = torch.autograd.grad(function(model(x), y, reduction="sum"), model.weight)[0]
    before = model.weight.detach().clone()
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), plan(3, 8))
    for inputs, target in accumulator.window((x, y)):
        accumulator.backward(function(model(inputs), target, reduction="sum"))
    torch.testing.assert_close(before - model.weight, whole, rtol=1e-12, atol=1e-12)


def test_a_sum_beside_another_term_is_refused():
    model = nn.Linear(6, 3)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), plan(3, 8))
    with pytest.raises(LossError, match="adds up"):
        for inputs, target in accumulator.window((torch.randn(8, 6), torch.randint(3, (8,)))):
            accumulator.backward(F.cross_entropy(model(inputs), target, reduction="sum") + model.weight.square().mean())

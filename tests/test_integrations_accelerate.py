"""A person's own loop with an Accelerator: four lines of its documentation's loop change."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import autoaccum
from autoaccum.errors import CheckpointError, SetupError
from tests.versions import peer

accelerate = peer("accelerate")

torch.manual_seed(0)
X, Y = torch.randn(70, 6, dtype=torch.float64), torch.randint(0, 5, (70,))
Y[::5] = -100


@pytest.fixture
def accelerator():
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return accelerate.Accelerator(cpu=True)


def parts():
    torch.manual_seed(1)
    net = nn.Linear(6, 5).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)


def whole_batches(epochs=1):
    net, optimizer, scheduler = parts()
    for _ in range(epochs):
        for x, y in DataLoader(TensorDataset(X, Y), 32):
            cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return net, scheduler


def train(accelerator, accumulator, net, loader):
    for batch in loader:
        for x, y in accumulator.window(tuple(batch)):
            accumulator.backward(cross_entropy(net(x), y), denominator=(y != -100).sum())


def test_the_update_and_the_schedule_are_the_whole_batchs(accelerator, tmp_path):
    net, optimizer, scheduler = accelerator.prepare(*parts())
    loader = accelerator.prepare(DataLoader(TensorDataset(X, Y), 32))
    accumulator = autoaccum.Accumulator(
        net, optimizer, autoaccum.plan(7, 32), scheduler=scheduler, clip_norm=0.5, accelerator=accelerator
    )
    accelerator.register_for_checkpointing(accumulator)
    train(accelerator, accumulator, net, loader)
    accelerator.save_state(str(tmp_path))
    train(accelerator, accumulator, net, loader)
    reference, schedule = whole_batches(2)
    assert torch.allclose(net.weight, reference.weight, rtol=1e-10, atol=0)
    assert scheduler.get_last_lr() == schedule.get_last_lr()
    assert accumulator.step == 6
    accelerator.load_state(str(tmp_path))
    assert (accumulator.step, scheduler.get_last_lr()) == (3, [pytest.approx(0.1 * 0.9**3)])
    train(accelerator, accumulator, net, loader)
    assert torch.allclose(net.weight, reference.weight, rtol=1e-10, atol=0)


def test_a_checkpoint_of_something_else_or_in_mid_window_is_refused():
    net, optimizer, _ = parts()
    accumulator = autoaccum.Accumulator(net, optimizer, autoaccum.plan(7, 32))
    kept = accumulator.state_dict()
    with pytest.raises(CheckpointError, match="target_batch=32, and this plan says 16"):
        autoaccum.Accumulator(net, optimizer, autoaccum.plan(7, 16)).load_state_dict(kept)
    with pytest.raises(CheckpointError, match="not what Accumulator.state_dict"):
        accumulator.load_state_dict({**kept, "noise_scale": None})
    for _ in accumulator.window((X, Y)):
        with pytest.raises(SetupError, match="a window is open"):
            accumulator.state_dict()
        break


def test_an_accelerator_that_accumulates_by_itself_is_refused(accelerator):
    accelerator.gradient_accumulation_steps = 4
    net, optimizer, _ = parts()
    with pytest.raises(SetupError, match="accumulates twice"):
        autoaccum.Accumulator(net, optimizer, autoaccum.plan(7, 32), accelerator=accelerator)

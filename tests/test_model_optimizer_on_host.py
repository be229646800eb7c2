"""An optimizer whose state waits on the host: the same steps, the state nowhere else, all given back."""

import copy

import pytest
import torch
from torch import nn

from autoaccum.model.optimizer_on_host import OptimizerOnHost, why_not_apart
from autoaccum.training.state import load_optimizer

CPU = torch.device("cpu")
KINDS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9, centered=True),
}


def make(kind):
    if kind == "adafactor" and not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8), nn.Linear(8, 4)).double()
    first, *rest = model.parameters()
    return model, KINDS[kind]([{"params": [first], "weight_decay": 0.3}, {"params": rest}])


def train(model, optimizer, steps=3, seed=1):
    chance = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(5, 8, generator=chance, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def alike(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_are_the_optimizers_own_bit_for_bit(kind):
    (plain, usual), (model, optimizer) = make(kind), make(kind)
    rates = [torch.optim.lr_scheduler.StepLR(each, 1) for each in (usual, optimizer)]
    for _ in range(2):  # state that was there before is gone on from
        train(plain, usual)
        with OptimizerOnHost(optimizer, CPU):
            train(model, optimizer)
        for rate in rates:
            rate.step()
    assert alike(plain, model)
    assert "load_state_dict" not in vars(optimizer)


def test_no_more_state_is_on_the_device_than_the_largest_parameters(monkeypatch):
    model, optimizer = make("adamw")
    largest = max(parameter.numel() for parameter in model.parameters())
    with OptimizerOnHost(optimizer, CPU) as on_host:
        train(model, optimizer, 1)
        hosts = {tensor.data_ptr() for tensor in on_host._hosts.values()}
        seen = []
        usual = on_host._step

        def step():
            seen.append(sum(value.numel() for state in optimizer.state.values() for value in state.values()
                            if value.dim() and value.data_ptr() not in hosts))  # fmt: skip
            usual()

        on_host._step = step
        train(model, optimizer, 1)
        held = [value.data_ptr() for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert set(held) == hosts
    assert max(seen) == 3 * largest  # two moments and their maximum
    assert sum(seen) == 3 * sum(parameter.numel() for parameter in model.parameters())


def test_a_state_that_is_loaded_waits_on_the_host_in_the_formats_that_it_had():
    (plain, usual), (model, optimizer) = make("adamw"), make("adamw")
    train(plain, usual)
    model.load_state_dict(plain.state_dict())
    saved = copy.deepcopy(usual.state_dict())
    saved["param_groups"][0]["lr"] = usual.param_groups[0]["lr"] = 0.03
    with OptimizerOnHost(optimizer, CPU) as on_host:
        load_optimizer(optimizer, saved)
        hosts = {tensor.data_ptr() for tensor in on_host._hosts.values()}
        assert all(v.data_ptr() in hosts for state in optimizer.state.values() for v in state.values() if v.dim())
        train(model, optimizer, seed=2)
    train(plain, usual, seed=2)
    assert alike(plain, model)


def test_an_optimizer_of_somebody_elses_or_with_hooks_is_refused():
    class Own(torch.optim.SGD):
        pass

    model, optimizer = make("sgd")
    assert why_not_apart([optimizer]) is None
    assert "Own is none of torch's own" in why_not_apart([optimizer, Own(model.parameters(), lr=1.0)])
    optimizer.register_step_pre_hook(lambda *arguments: None)
    assert "SGD has hooks on its step" in why_not_apart([optimizer])

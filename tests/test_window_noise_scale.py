"""The gradient noise scale from micro-batches: unbiased, also ragged; off where it means nothing."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from autoaccum.planning.plan import plan
from autoaccum.window.accumulate import Accumulator
from autoaccum.window.noise_scale import NoiseScale, advice
from autoaccum.window.window_sums import Figures


def measured(sizes, windows, signal, noise, width=200):
    """Windows of a model whose per-sample gradient is `signal` everywhere plus noise of known covariance."""
    chance = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(width, dtype=torch.float64))
    holder = nn.Module()
    holder.weight = weight
    scale = NoiseScale(holder, [weight])
    total = sum(sizes)
    noises, signals = [], []
    for _ in range(windows):
        scale._windows = 0  # every window is measured, and its own figures are looked at
        scale._weight = scale._noise = scale._signal = 0.0
        scale.open(len(sizes))
        for size in sizes:
            per_sample = signal + noise * torch.randn(size, width, dtype=torch.float64, generator=chance)
            ((per_sample @ weight).mean() * (size / total)).backward()
            scale.micro(size / total)
        scale.finish([weight.grad], total)
        weight.grad = None
        noises.append(scale._noise)
        signals.append(scale._signal)
    return sum(noises) / windows, sum(signals) / windows


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (7, 3, 5, 1), (2, 14)])
def test_both_figures_are_unbiased(sizes):
    noise, signal = measured(sizes, windows=600, signal=0.1, noise=0.5)
    assert noise == pytest.approx(200 * 0.5**2, rel=0.03)
    assert signal == pytest.approx(200 * 0.1**2, rel=0.15)


def train(model, windows, accumulator):
    torch.manual_seed(0)
    for _ in range(windows):
        x = torch.randn(16, 4)
        y = (x[:, 0] > 0).long()  # something to learn, or noise would hide the gradient
        for x_, y_ in accumulator.window((x, y)):
            accumulator.backward(F.cross_entropy(model(x_), y_))


def test_a_window_that_is_left_out_for_its_gradient_stays_out_of_the_averages():
    torch.manual_seed(0)  # with some weights the noise hides the gradient, and there is no figure
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, plan(4, 16), on_nonfinite="skip")
    for x in accumulator.window(torch.zeros(16, 4)):
        accumulator.backward((model(x) - model.bias).square().sum(1).sqrt().mean())  # the root of 0
    assert accumulator.last.skipped is not None
    train(model, 10, accumulator)
    assert accumulator.last.noise_scale > 0


def test_it_is_in_the_record_and_changes_nothing():
    def run(watched):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), plan(4, 16))
        if not watched:
            accumulator.noise_scale.why_not = "switched off"
        train(model, 12, accumulator)
        return accumulator, model

    accumulator, model = run(True)
    _, other = run(False)
    assert accumulator.last.noise_scale is not None
    assert math.isfinite(accumulator.last.noise_scale)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_it_is_off_with_batch_norm_and_says_why():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), plan(4, 16))
    train(model, 2, accumulator)
    assert accumulator.last.noise_scale is None
    assert "BatchNorm (1)" in accumulator.noise_scale.why_not


def test_one_micro_batch_tells_nothing():
    model = nn.Linear(4, 3)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), plan(16, 16))
    train(model, 2, accumulator)
    assert accumulator.last.noise_scale is None


def test_a_window_whose_gradients_were_taken_away_tells_nothing():
    """A hook that comes after the first backward pass may use each gradient, and leave none for the window's end."""
    model = nn.Linear(4, 3)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), plan(4, 16))
    train(model, 1, accumulator)
    accumulator.noise_scale.load_state_dict({"windows": 0, "weight": 0.0, "noise": 0.0, "signal": 0.0})
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    train(model, 1, accumulator)
    assert accumulator.last.noise_scale is None


def test_the_averages_go_on_from_a_checkpoint():
    weight = nn.Parameter(torch.zeros(3))
    holder = nn.Module()
    holder.weight = weight
    scale, other = NoiseScale(holder, [weight]), NoiseScale(holder, [weight])
    scale.load_state_dict({"windows": 3, "weight": 1.0, "noise": 4.0, "signal": 2.0})
    other.load_state_dict(scale.state_dict())
    assert other.value == scale.value == 2.0


def test_the_sentence_compares_with_the_target():
    adam = plan(limit=64, target_batch=256, lr=1e-3, optimizer="adamw")
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=4e-3, betas=(0.9, 0.96))
    assert "larger target would pay" in advice(10_000, adam, optimizer)
    assert "same order" in advice(300, adam, optimizer)
    far = advice(10, adam, optimizer)
    assert "fewer accumulation steps" in far
    # sqrt(64 / 256) of the rate; 0.96^(64 / 256) forgets as much in 64 samples as 0.96 in 256
    assert "4 steps for each of now: target_batch=64, lr=0.002, betas=(0.9, 0.989846" in far
    sgd = torch.optim.SGD(optimizer.param_groups[0]["params"], lr=0.4)
    linear = plan(limit=64, target_batch=256, lr=0.4, optimizer="sgd")
    assert advice(10, linear, sgd).endswith("target_batch=64, lr=0.1 (κ = 64/256)")
    at_once = plan(limit=256, target_batch=256)
    assert "a smaller target" in advice(10, at_once, sgd)


def test_on_a_device_what_a_window_measured_is_taken_in_as_the_next_one_opens(monkeypatch):
    """The figures of the window are on their way: nobody waits for them."""
    scale = NoiseScale(nn.Linear(2, 1), list(nn.Linear(2, 1).parameters()))
    monkeypatch.setattr(Figures, "at_hand", property(lambda self: False, lambda self, value: None), raising=False)
    read = []
    monkeypatch.setattr(Figures, "read", lambda self: read.append(1) or self._values.tolist())
    scale.open(2)
    for square in (4.0, 3.0):
        scale._micro.append((0.5, torch.tensor(square)))
    scale.finish([torch.ones(2)], samples=8)
    assert (scale.value, read) == (None, [])
    scale.open(2)
    # whole 2, spread (4 + 3) / 0.5 - 2 = 12, noise 8 * 12 = 96, signal 2 - 12 < 0: hidden by noise
    assert (read, scale._noise, scale._signal) == ([1], pytest.approx(96.0), pytest.approx(-10.0))

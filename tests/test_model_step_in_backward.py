"""An optimizer that steps inside the backward pass: the same steps without the gradients; and what ends a training."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import autoaccum
from autoaccum.errors import LossError, PlanError, SetupError
from autoaccum.session import Session
from autoaccum.training.recover import OptimizerOutOfMemoryError

ASKED = {"loss": nn.MSELoss(), "optimizer": "adamw", "device": "cpu", "seed": 3, "cache": False}
NAMED = {**ASKED, "ladder": "step_in_backward"}


def make():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))


def data(samples=24):
    chance = torch.Generator().manual_seed(1)
    return torch.randn(samples, 64, generator=chance), torch.randn(samples, 64, generator=chance)


def alike(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_weights_are_those_of_steps_at_windows_ends_bit_for_bit_and_hooks_are_gone():
    plain, model = make(), make()
    usual = autoaccum.fit(plain, data(20), target_batch=8, epochs=2, warmup_steps=2, **ASKED)
    result = autoaccum.fit(model, data(20), target_batch=8, epochs=2, warmup_steps=2, **NAMED)
    assert result.plan.ladder == "step_in_backward"
    assert result.verify.ok
    assert [record.loss for record in result.history] == [record.loss for record in usual.history]
    assert [record.lr for record in result.history] == [record.lr for record in usual.history]
    assert alike(plain, model)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_a_denominator_that_is_known_afterwards_is_divided_by_before_the_step():
    def step(model, batch):
        x, y = batch
        late = (y > 0).sum()
        return autoaccum.Mean(((model(x) - y).square().sum(1) * (y[:, 0] > 0)).sum(), late)

    made = []
    for ladder in (None, "step_in_backward"):
        model = make()
        autoaccum.fit(model, data(8), step=step, optimizer="sgd", lr=0.1, target_batch=8, device="cpu", seed=3,
                      cache=False, check=False, ladder=ladder)  # fmt: skip
        made.append(model)
    for one, other in zip(*(model.parameters() for model in made), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_gradients_are_not_counted_and_the_forecast_is_what_is_measured():
    plain = autoaccum.probe(make(), data(), target_batch=8, memory="8MiB", **ASKED)
    report = autoaccum.probe(make(), data(), target_batch=8, memory="8MiB", **NAMED)
    for trial in report.trials:
        assert report.forecast(trial.batch) == trial.peak_bytes
    weights = sum(parameter.nbytes for parameter in make().parameters())
    assert report.parts["gradients"] == 0
    assert plain.forecast(8) - report.forecast(8) > weights / 2


def test_a_target_that_does_not_fit_in_one_micro_batch_is_refused():
    with pytest.raises(PlanError, match="6 micro-batches, since 4 fit at once: give target_batch=4 or less"):
        autoaccum.prepare(make(), data(), target_batch=24, micro_batch=4, **NAMED)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"clip_norm": 1.0}, "clip_norm=1.0 takes the norm of all gradients"),
        ({"log_grad_norm": True}, "log_grad_norm=True takes the norm of all gradients"),
        ({"precision": "fp16"}, "a loss scale is undone at the window's end"),
        ({"reduction": "coupled"}, "a loss that compares samples has two passes"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(given, text):
    with pytest.raises(SetupError, match=text):
        autoaccum.prepare(make(), data(), target_batch=8, micro_batch=8, check=False, **NAMED, **given)


class Fails(nn.Module):
    """Runs out of memory in its third training step, in the forward or the backward pass; takes no single sample."""

    def __init__(self, where):
        super().__init__()
        self.layers, self.where, self.calls = make(), where, 0

    def forward(self, x):
        out = self.layers[:3](x)
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            if self.calls == 3:
                if self.where == "forward":
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory")
                if self.where == "backward":
                    out.register_hook(self.fail)
        return self.layers[3:](out)

    def fail(self, gradient):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def test_out_of_memory_after_a_parameter_was_stepped_ends_the_training_with_its_checkpoint_named(tmp_path):
    loop = autoaccum.prepare(Fails("backward"), data(), target_batch=8, micro_batch=8, check=False, epochs=2,
                             checkpoint=tmp_path, checkpoint_every=1, **NAMED)  # fmt: skip
    with pytest.raises(OptimizerOutOfMemoryError, match="inside the optimizer's step 3: its state and the weights"):
        loop.run()
    with pytest.raises(autoaccum.errors.AutoaccumError, match=r"may be half updated.*step-00000002"):
        loop.run()


def test_out_of_memory_before_that_runs_the_window_again_in_pieces_to_the_same_weights():
    plain, model = Fails("nowhere"), Fails("forward")
    for each in (plain, model):
        result = autoaccum.fit(each, data(), target_batch=8, micro_batch=8, check=False, epochs=2, **NAMED)
    assert result.plan.accumulation_steps == 2
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_training_that_was_left_goes_on_to_the_same_weights(tmp_path):
    whole, half, rest = make(), make(), make()
    asked = {**NAMED, "target_batch": 8, "micro_batch": 8, "check": False, "epochs": 2}
    autoaccum.fit(whole, data(), **asked)
    autoaccum.fit(half, data(), **asked, max_steps=2, checkpoint=tmp_path, checkpoint_every=1)
    autoaccum.fit(rest, data(), **asked, checkpoint=tmp_path, resume=True)
    assert alike(whole, rest)


def test_a_loss_that_is_not_finite_steps_nothing():
    x, y = data(8)
    y[3] = float("nan")
    model = make()
    with pytest.raises(LossError, match="no step was taken"):
        autoaccum.fit(model, (x, y), target_batch=8, micro_batch=8, check=False, **NAMED)
    assert alike(model, make())
    result = autoaccum.fit(model, (x, y), target_batch=8, micro_batch=8, check=False, on_nonfinite="skip", **NAMED)
    assert result.history[0].skipped
    assert alike(model, make())


def test_a_gradient_that_comes_in_two_parts_is_an_error():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            x = x.requires_grad_()
            for _ in range(2):
                x = checkpoint(self.layer, x, use_reentrant=True)
            return x

    with pytest.raises(SetupError, match="came in two parts"):
        autoaccum.fit(Twice(), data(8), target_batch=8, micro_batch=8, check=False, **NAMED)


@pytest.mark.parametrize("saver", ["step_in_backward", "optimizer_on_host"])
def test_a_trainer_that_steps_by_itself_is_not_given_a_saver_of_the_step(saver):
    with pytest.raises(SetupError, match=f'ladder="{saver}" cannot be taken: the trainer it is attached to steps'):
        Session(make(), data(), {**NAMED, "target_batch": 8, "ladder": saver}, what="attach")

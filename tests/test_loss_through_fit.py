"""Losses of a user's own, undeclared, trained by `fit`: as on the whole batch by hand, or refused; never wrong."""

import warnings

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import LossError
from tests.test_loss_reading import COUPLED, LOSSES, Net, samples

TARGET, MICRO, SAMPLES = 50, 13, 150
NAMED = ("masked mean", "chosen samples", "nanmean", "an ignored class", "two terms")
OF_THE_MODEL = ("a penalty", "a learned weight", "a list of samples")  # they call more than the model on one batch


def marked(share):
    """Samples of which each window has a marked one at least."""
    data = samples(share, count=SAMPLES)
    data["k"].zero_()
    chance = torch.Generator().manual_seed(2)
    first = torch.arange(0, SAMPLES, TARGET) + torch.randint(0, TARGET, (SAMPLES // TARGET,), generator=chance)
    more = torch.randperm(SAMPLES, generator=chance)[: round(share * SAMPLES) - len(first)]
    data["k"][torch.cat([first, more])] = 1
    return data


def by_hand(loss, data):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in range(0, SAMPLES, TARGET):
        optimizer.zero_grad()
        loss(model, {name: leaf[start : start + TARGET] for name, leaf in data.items()}).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def by_fit(loss, data, form):
    torch.manual_seed(0)
    model = Net()
    if form == "step":
        given = {"step": loss}
    else:  # the loss is given what a model returned that was called already
        given = {"loss": lambda outputs, rest: loss(lambda x: outputs, {"x": outputs, **rest})}
        data = data["x"], {name: leaf for name, leaf in data.items() if name != "x"}
    autoaccum.fit(
        model, data, target_batch=TARGET, micro_batch=MICRO, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        lr_rule="none", shuffle=False, precision="fp32", progress=False, cache=False, device="cpu", **given,
    )  # fmt: skip
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def assert_exact_or_refused(loss, share, form):
    data = marked(share)
    whole = by_hand(loss, data)
    torch.manual_seed(0)
    start = nn.utils.parameters_to_vector(Net().parameters()).detach()
    try:
        found = by_fit(loss, data, form)
    except LossError:
        return "refused"
    assert float((found - whole).norm()) <= 1e-10 * float((whole - start).norm())
    return "exact"


@pytest.mark.parametrize("name", NAMED)
def test_a_loss_trains_as_on_the_whole_batch(name):
    assert assert_exact_or_refused(LOSSES[name], 0.3, "step") == "exact"


@pytest.mark.parametrize("name", ["a bound", "a ratio of means", "contrastive"])
def test_a_loss_that_is_no_mean_is_refused(name):
    with pytest.raises(LossError, match="batch-coupled"):
        by_fit(COUPLED[name], marked(0.3), "step")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_trains_as_on_the_whole_batch_or_is_refused(name, share):
    assert_exact_or_refused(LOSSES[name], share, "step")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OF_THE_MODEL])
def test_each_loss_of_outputs_and_targets_trains_as_on_the_whole_batch_or_is_refused(name):
    assert_exact_or_refused(LOSSES[name], 0.1, "loss")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("name", COUPLED)
def test_no_loss_that_compares_samples_is_trained_undeclared(name, share):
    how = assert_exact_or_refused(COUPLED[name], share, "loss")
    assert how == "refused" or share == 0.02, how  # where hardly a sample is marked, the parts may be the whole


class Opaque(torch.autograd.Function):
    """A token mean whose graph says nothing, as of a fused cross-entropy."""

    @staticmethod
    def forward(ctx, logits, labels):
        ctx.save_for_backward(logits, labels)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    @staticmethod
    def backward(ctx, gradient):
        logits, labels = ctx.saved_tensors
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return gradient * torch.autograd.grad(loss, logits)[0], None


@pytest.mark.parametrize("unequal", [False, True])
def test_an_opaque_loss_whose_samples_count_alike_is_said_to_be_untried_before_it_trains(unequal):
    torch.manual_seed(0)
    data = torch.randn(16, 3, 6).double(), torch.randint(0, 4, (16, 3))
    data[1][1::2, 1:] = -100 if unequal else 1
    settings = {"loss": Opaque.apply, "target_batch": 8, "micro_batch": 3, "optimizer": "sgd", "device": "cpu"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        autoaccum.fit(nn.Linear(6, 4).double(), data, max_steps=1, progress=False, cache=False, **settings)
    text = " ".join(str(each.message) for each in said)
    assert ("the targets other than -100 were as many in each sample tried" in text) is not unequal
    assert ('declare it: reduction="token_mean"' in text) is not unequal


def test_batches_with_sparse_tensors_train_as_the_whole_batch():
    x, y = torch.eye(6).repeat(5, 1), torch.arange(30) % 4

    def trained(micro_batch, data):
        torch.manual_seed(0)
        model = nn.Linear(6, 4).double()

        def step(model, batch):
            return nn.functional.cross_entropy(torch.sparse.mm(batch[0], model.weight.T), batch[1])

        autoaccum.fit(
            model, data, step=step, target_batch=15, micro_batch=micro_batch, optimizer="sgd", shuffle=False,
            cache=False, device="cpu",
        )  # fmt: skip
        return model.weight.detach()

    data = x.double().to_sparse(), y
    torch.testing.assert_close(trained(4, data), trained(15, data), rtol=1e-12, atol=0)

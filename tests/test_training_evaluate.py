"""Evaluation: means over all of the data, whatever it was cut into; memory that runs out costs the training nothing."""

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import DataError, NothingFitsError, SetupError

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3
Y[7] = -100


class Narrow(nn.Module):
    """Takes at most so many samples at once outside training, and counts how many it was given."""

    def __init__(self, limit=10**6):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.limit, self.given = limit, []

    def forward(self, x):
        if not self.training:
            if len(x) > self.limit:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            self.given.append(len(x))
        return self.body(x)


def accuracy(outputs, targets):
    return autoaccum.Mean((outputs.argmax(1) == targets).sum(), (targets >= 0).sum())


def prepared(model, **keywords):
    given = {"target_batch": 16, "micro_batch": 8, "seed": 3, "check": False, "device": "cpu",
             "val_data": (X, Y), **keywords}  # fmt: skip
    return autoaccum.prepare(model, (X, Y), **given)


@pytest.mark.parametrize("limit", [10**6, 5, 1])
def test_the_means_are_those_of_all_samples_at_once(limit):
    model = Narrow(limit)
    loop = prepared(model, loss=nn.CrossEntropyLoss(), metrics={"accuracy": accuracy})
    before = [tensor.clone() for tensor in model.state_dict().values()]
    found = loop.evaluate()
    with torch.no_grad():
        outputs = model.body.eval()(X)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, Y)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((outputs.argmax(1) == Y).sum() / 49))
    assert sum(model.given) == 50
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))


def test_a_loss_that_is_added_up_stays_a_sum_where_memory_halves_the_batches():
    model = Narrow(3)
    found = prepared(model, loss=nn.CrossEntropyLoss(reduction="sum")).evaluate()
    with torch.no_grad():
        outputs = model.body.eval()(X)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, Y, reduction="sum")), rel=1e-5)


def test_other_data_can_be_given_and_the_modes_come_back():
    model = Narrow()
    model.body[2].eval()  # one that the user switched off
    loop = prepared(model, loss=nn.CrossEntropyLoss(), val_data=None)
    with pytest.raises(DataError, match="no data to evaluate"):
        loop.evaluate()
    assert set(loop.evaluate((X[:9], Y[:9]))) == {"loss"}
    assert model.training
    assert model.body.training
    assert not model.body[2].training


def test_not_even_one_sample_is_an_error_that_leaves_the_plan_alone():
    loop = prepared(Narrow(0), loss=nn.CrossEntropyLoss())
    with pytest.raises(NothingFitsError, match="single sample; the training's plan is untouched"):
        loop.evaluate()
    assert loop.plan.micro_batches == (8, 8)


def test_a_smaller_validation_batch_is_kept_for_the_next_time_and_in_checkpoints(tmp_path):
    model = Narrow(3)
    loop = prepared(model, loss=nn.CrossEntropyLoss(), checkpoint=tmp_path)
    loop.run()
    model.given.clear()
    loop.evaluate()
    assert max(model.given) == 2
    again = Narrow(3)
    prepared(again, loss=nn.CrossEntropyLoss(), checkpoint=tmp_path).evaluate()
    assert max(again.given) == 2


def test_a_metric_that_is_no_mean_is_refused():
    loop = prepared(Narrow(), loss=nn.CrossEntropyLoss(), metrics={"wrong": lambda outputs, targets: 0.5})
    with pytest.raises(DataError, match="'wrong' returned float"):
        loop.evaluate()


@pytest.mark.parametrize(
    ("metrics", "match"),
    [
        ([accuracy], "give a dict of functions"),
        ({"loss": accuracy}, "the name 'loss': give it another"),
        ({"loss/main": accuracy}, "the name 'loss/main': give it another"),
        ({"accuracy": None}, r"metrics\['accuracy'\]=None: give a function"),
    ],
)
def test_what_can_be_no_metric_is_refused_before_anything_is_trained(metrics, match):
    with pytest.raises(SetupError, match=match):
        prepared(Narrow(), loss=nn.CrossEntropyLoss(), metrics=metrics)


def test_metrics_beside_a_step_are_refused_before_anything_is_trained():
    step = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    with pytest.raises(SetupError, match="step= keeps them to itself"):
        prepared(Narrow(), step=step, metrics={"accuracy": accuracy})


@pytest.mark.parametrize("which", ["data", "val_data"])
def test_data_that_can_be_read_once_is_refused_where_epochs_read_it_again(which):
    once = iter(list(zip(X, Y)))
    given = {"data": (X, Y), which: once}
    with pytest.raises(DataError, match=f"^{which} can be read only once, and epochs=2"):
        autoaccum.prepare(Narrow(), given.pop("data"), loss=nn.CrossEntropyLoss(), target_batch=16, micro_batch=8,
                          epochs=2, device="cpu", **given)  # fmt: skip

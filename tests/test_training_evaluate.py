"""Evaluation: means over all of the data, whatever it was cut into; memory that runs out costs the training nothing."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

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


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


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


@pytest.mark.parametrize("kind", ["tensors", "dataset", "stream"])
@pytest.mark.parametrize("micro", [2, 5, 16, 50])
def test_a_loader_that_drops_its_last_batch_drops_that_and_no_more(micro, kind):
    data = {"tensors": TensorDataset(X[:47], Y[:47]), "dataset": list(zip(X[:47], Y[:47].tolist()))}
    loader = DataLoader(data.get(kind) or Stream(data["dataset"]), batch_size=6, drop_last=True)
    model = Narrow()
    found = prepared(model, loss=nn.CrossEntropyLoss(), micro_batch=micro, target_batch=50, val_data=loader).evaluate()
    with torch.no_grad():
        outputs = model.body.eval()(X[:42])
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, Y[:42])), rel=1e-5)
    assert sum(model.given) == 42


@pytest.mark.parametrize("kind", ["tensors", "stream"])
def test_where_not_one_sample_is_left_there_is_no_loss_to_give(kind):
    data = TensorDataset(X[:5], Y[:5]) if kind == "tensors" else Stream(list(zip(X[:5], Y[:5])))
    loader = DataLoader(data, batch_size=6, drop_last=True)
    with pytest.raises(DataError, match="val_data gives no samples: .* fewer samples than a batch of 6; set"):
        prepared(Narrow(), loss=nn.CrossEntropyLoss(), val_data=loader).evaluate()
    with pytest.raises(DataError, match="^the data to evaluate gives no samples"):
        prepared(Narrow(), loss=nn.CrossEntropyLoss(), val_data=None).evaluate(loader)


def test_where_there_is_not_one_sample_there_is_no_loss_to_give():
    with pytest.raises(DataError, match="the data is empty"):
        prepared(Narrow(), loss=nn.CrossEntropyLoss(), val_data=Stream([])).evaluate()


def test_a_mean_over_nothing_is_nan_and_a_sum_over_nothing_is_zero():
    nothing = (X[:9], torch.full((9,), -100))
    loop = prepared(Narrow(), loss=nn.CrossEntropyLoss(), metrics={"accuracy": accuracy}, val_data=nothing)
    found = loop.evaluate()
    assert math.isnan(found["loss"])
    assert math.isnan(found["accuracy"])
    assert prepared(Narrow(), loss=nn.CrossEntropyLoss(reduction="sum"), val_data=nothing).evaluate()["loss"] == 0


def test_of_several_terms_those_over_something_are_the_loss():
    def step(model, batch):
        x, y = batch
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        return {"main": autoaccum.Mean(loss, len(x)), "rare": autoaccum.Mean(loss * 0, (y == 7).sum())}

    count = {"main": lambda batch: len(batch[0]), "rare": lambda batch: float((batch[1] == 7).sum())}
    found = prepared(Narrow(), step=step, reduction=count, val_data=(X[:6], Y[:6])).evaluate()
    assert math.isnan(found["loss/rare"])
    assert found["loss"] == found["loss/main"]


class Forces(nn.Module):
    """Gives the gradient of an energy, which is of use in training only with a graph of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
        self.differentiated = 0

    def forward(self, x):
        x = x.detach().requires_grad_()
        noise = torch.rand(1)
        energy = self.energy(x * (1 + 0 * noise)).sum()
        forces = torch.autograd.grad(energy, x, create_graph=self.training)[0]
        self.differentiated += 1
        return forces


@pytest.mark.parametrize("by_step", [False, True])
def test_a_model_that_differentiates_inside_its_forward_is_evaluated_and_leaves_no_graph(by_step):
    seen = []

    def error(outputs, targets):
        seen.append(outputs.requires_grad or not torch.isfinite(torch.from_numpy(outputs.numpy())).all())
        return autoaccum.Mean((outputs - targets).abs().sum(), len(targets))

    how = {"loss": nn.MSELoss(), "metrics": {"error": error}}
    if by_step:
        how = {"step": lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])}
    model, data = Forces(), (X, torch.zeros_like(X))
    loop = autoaccum.prepare(
        model, data, target_batch=16, micro_batch=8, seed=3, check=False, device="cpu", val_data=data, **how
    )
    torch.manual_seed(5)
    first = loop.evaluate()
    assert first["loss"] == pytest.approx(float(model.eval()(X).square().mean()), rel=1e-5)
    assert model.differentiated == 7 + 1
    assert loop.evaluate() == first
    assert not any(seen)
    assert all(parameter.grad is None for parameter in model.parameters())
    loop.run()
    assert len(loop.evaluations) == 1

    torch.manual_seed(5)
    loop.evaluate()
    after = torch.rand(1)
    fresh = autoaccum.prepare(
        Forces(), data, target_batch=16, micro_batch=8, check=False, device="cpu", val_data=data, **how
    )
    torch.manual_seed(5)
    fresh.evaluate()
    assert torch.equal(torch.rand(1), after), "the attempt that failed drew nothing"


def test_another_error_of_the_model_is_told_as_it_is():
    class Wrong(Narrow):
        def forward(self, x):
            if not self.training:
                raise RuntimeError("of its own")
            return super().forward(x)

    with pytest.raises(RuntimeError, match="of its own"):
        prepared(Wrong(), loss=nn.CrossEntropyLoss()).evaluate()


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


# --- a metric over all outputs


class MacroF1:
    """The F1 of each class, averaged: no mean over samples, and no ratio of two sums."""

    def reset(self):
        self.outputs, self.targets = [], []

    def update(self, outputs, targets):
        self.outputs.append(outputs.argmax(-1))
        self.targets.append(targets)

    def compute(self):
        outputs, targets = torch.cat(self.outputs), torch.cat(self.targets)
        return sum(self.of_class(outputs == c, targets == c) for c in range(3)) / 3

    def of_class(self, said, true):
        return 2 * (said & true).sum() / max(int(said.sum() + true.sum()), 1)


def f1_of_class_0(outputs, targets):
    said, true = outputs.argmax(-1) == 0, targets == 0
    return autoaccum.Mean(2 * (said & true).sum(), said.sum() + true.sum())


@pytest.mark.parametrize("micro_batch", [50, 7, 1])
def test_a_metric_over_all_outputs_does_not_depend_on_the_micro_batch(micro_batch):
    torch.manual_seed(0)
    model, labels, whole = nn.Linear(6, 3), torch.arange(50) % 3, MacroF1()
    loop = autoaccum.prepare(
        model, (X, labels), loss=nn.CrossEntropyLoss(), target_batch=50, micro_batch=micro_batch, device="cpu",
        val_data=(X, labels), metrics={"macro": whole, "f1": f1_of_class_0},
    )  # fmt: skip
    found = [loop.evaluate(), loop.evaluate()]
    whole.reset()
    with torch.no_grad():
        whole.update(model(X), labels)
        ratio = f1_of_class_0(model(X), labels)
    assert found[0] == found[1], "it begins anew each time"
    assert found[0]["macro"] == pytest.approx(float(whole.compute()))
    assert found[0]["f1"] == pytest.approx(float(ratio.numerator) / float(ratio.denominator))


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("compute", torch.ones(3), "which is not one number"),
        ("update", MemoryError("out of memory"), "raised MemoryError in update"),
    ],
)
def test_a_metric_over_all_outputs_that_cannot_be_is_refused_and_not_run_twice(method, value, message):
    updates = []

    class Odd(MacroF1):
        def update(self, outputs, targets):
            updates.append(len(targets))
            if method == "update":
                raise value
            super().update(outputs, targets)

        def compute(self):
            return value

    loop = autoaccum.prepare(
        nn.Linear(6, 3), (X, torch.arange(50) % 3), loss=nn.CrossEntropyLoss(), target_batch=50, micro_batch=50,
        device="cpu", val_data=(X, torch.arange(50) % 3), metrics={"odd": Odd()},
    )  # fmt: skip
    with pytest.raises(DataError, match=message):
        loop.evaluate()
    assert updates == [50]

"""What a loss is divided by follows from the settings; settings and steps that cannot be are refused by name."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional

from autoaccum.errors import DataError, LossError, SetupError
from autoaccum.loss.counts import as_number
from autoaccum.loss.mean import Mean
from autoaccum.loss.objective import Objective
from tests.test_loss_objective import WEIGHT, C, N, Net, T, X, classes, counted, error, tensor


def test_a_loss_that_is_not_torchs_is_read():
    def loss(outputs, targets):
        return (outputs - targets).abs().sum(1).sqrt().mean()

    model, y = Net(T), tensor(N, T)
    objective = Objective(model, loss=loss)
    assert counted(objective, (X, y)) == {"loss": float(N)}
    assert error(objective, (X, y), lambda: loss(model(X), y)) <= 1e-10
    assert "samples" in objective.reason


@pytest.mark.parametrize("shifted", [False, True])
def test_a_declared_token_mean_finds_out_whether_the_loss_shifts(shifted):
    def loss(outputs, targets):
        if shifted:
            outputs, targets = outputs[..., :-1], targets[:, 1:]
        return functional.cross_entropy(outputs, targets)

    model, y = Net(C, T), classes(N, T)
    objective = Objective(model, loss=loss, reduction="token_mean")
    assert error(objective, (X, y), lambda: loss(model(X), y)) <= 1e-10


def test_each_named_reduction_counts_what_it_says():
    y = torch.tensor([[0, 1, -100], [2, -100, -100]])
    batch = (X[:2], y)

    def count(reduction, loss=functional.cross_entropy):
        return Objective(Net(C, 3), loss=loss, reduction=reduction).denominators(batch)["loss"]

    assert count("sample_mean") == 2
    assert count("token_mean") == 3
    assert count("element_mean") == 6
    assert count("weighted_mean", nn.CrossEntropyLoss(weight=WEIGHT)) == pytest.approx(4.2)
    assert count(lambda b: len(b[0]) * 10) == 20
    assert count("auto", functools.partial(nn.CrossEntropyLoss(weight=WEIGHT))) == pytest.approx(4.2)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_sum_or_single_elements_with_a_declared_denominator_are_summed_over_it(reduction):
    model, y = Net(C, T), classes(N, T)
    objective = Objective(model, loss=nn.CrossEntropyLoss(reduction=reduction), reduction="token_mean")
    assert error(objective, (X, y), lambda: functional.cross_entropy(model(X), y)) <= 1e-10


@pytest.mark.parametrize("value", [0, 2, 2.5, torch.tensor(3), torch.tensor([3.0]), True])
def test_what_a_declared_denominator_may_be(value):
    objective = Objective(Net(C), loss=functional.mse_loss, reduction=lambda batch: value)
    if value is True:
        with pytest.raises(LossError, match="bool"):
            objective.denominators((X, X))
    else:
        assert objective.denominators((X, X)) == {"loss": float(value)}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (-1, "-1"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ("3", "str"),
        (None, "NoneType"),
        (torch.ones(2), r"\(2,\)"),
    ],
)
def test_a_declared_denominator_that_is_none_is_refused_with_its_value(value, word):
    objective = Objective(Net(C), loss=functional.mse_loss, reduction=lambda batch: value)
    with pytest.raises(LossError, match=f"(?s){word}.*denominator"):
        objective.denominators((X, X))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "cross_entropy"}, "loss='cross_entropy' is a str.*torch.nn.functional.cross_entropy"),
        ({"loss": nn.CrossEntropyLoss}, "is a class.*CrossEntropyLoss\\(\\)"),
        ({"step": 3}, "step=3 is a int.*f\\(model, batch\\)"),
        ({"loss": print, "step": print}, "both given"),
        ({"reduction": "mean"}, "'mean' is not known: choose 'auto', 'coupled', 'sample_mean', 'token_mean'"),
        ({"reduction": 3}, "reduction=3 is not known"),
        ({"reduction": {"a": "sum"}}, "only a step returns several"),
        ({"step": print, "reduction": {}}, "names no term"),
        ({"step": print, "reduction": {"a": "auto"}}, "'a'.*declares nothing"),
        ({"step": print, "reduction": {"a": 3}}, "'a'.*=3 declares nothing"),
        ({"loss": nn.MSELoss(), "reduction": "sum"}, "contradict"),
        ({"loss": nn.MSELoss(), "reduction": "weighted_mean"}, "needs|sums class weights"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_to_pass(settings, words):
    with pytest.raises(SetupError, match=words):
        Objective(Net(C), **settings)


def test_targets_that_cannot_be_counted_are_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"class indices.*long"):
        Objective(Net(C), loss=functional.cross_entropy).denominators((X, torch.zeros(N)))
    with pytest.raises(DataError, match=r"are a list.*reduction=f"):
        Objective(Net(C), loss=functional.mse_loss).denominators((X, [1.0] * N))
    with pytest.raises(DataError, match=r"torch.float64.*element_mean"):
        Objective(Net(C), loss=lambda o, y: 0, reduction="token_mean").denominators((X, X))
    with pytest.raises(DataError, match=r"'token_mean'.*does not say"):
        Objective(Net(C), step=lambda m, b: 0, reduction="token_mean").denominators(X)


# Steps.


def masked(model, batch):
    losses = functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
    return Mean(losses.sum(), (batch["labels"] != -100).sum())


def test_a_steps_own_mean_is_corrected_once_its_denominator_is_known():
    model, y = Net(C, T), classes(N, T)
    objective = Objective(model, step=masked)
    batch = {"x": X, "labels": y}
    assert objective.denominators(batch) is None
    assert objective.prepare([]) is None
    assert error(objective, batch, lambda: functional.cross_entropy(model(X), y)) <= 1e-10


def test_a_steps_tensor_is_a_mean_over_samples():
    model, y = Net(T), tensor(N, T)
    objective = Objective(model, step=lambda model, batch: functional.mse_loss(model(batch[0]), batch[1]))
    assert error(objective, (X, y), lambda: functional.mse_loss(model(X), y)) <= 1e-10


@pytest.mark.parametrize("reduction", ["token_mean", lambda batch: (batch["labels"] != -100).sum()])
@pytest.mark.parametrize("as_mean", [False, True])
def test_a_steps_denominator_can_be_declared(reduction, as_mean):
    def step(model, batch):
        return masked(model, batch) if as_mean else functional.cross_entropy(model(batch["x"]), batch["labels"])

    model, y = Net(C, T), classes(N, T)
    objective = Objective(model, step=step, reduction=reduction)
    assert error(objective, {"x": X, "labels": y}, lambda: functional.cross_entropy(model(X), y)) <= 1e-10


def test_several_terms_each_have_their_own_declared_denominator():
    model, y = Net(C, T), classes(N, T)

    def step(model, batch):
        outputs = model(batch["x"])
        return {
            "main": masked(model, batch),
            "auxiliary": Mean(outputs.square().sum(), outputs.numel()),
            "added": outputs.abs().sum(),
        }

    declared = {
        "main": lambda b: (b["labels"] != -100).sum(),
        "auxiliary": lambda b: len(b["x"]) * C * T,
        "added": "sum",
    }
    objective = Objective(model, step=step, reduction=declared)
    assert objective.names == ("main", "auxiliary", "added")

    def reference():
        outputs = model(X)
        return functional.cross_entropy(outputs, y) + outputs.square().mean() + outputs.abs().sum()

    assert error(objective, {"x": X, "labels": y}, reference) <= 1e-10
    assert "adds up" in objective.reason


def test_a_loss_beside_terms_that_may_be_in_it_is_refused_with_the_dict_to_write():
    objective = Objective(Net(C), step=lambda m, b: {"loss": m(b).mean(), "aux_loss": m(b).sum()})
    with pytest.raises(
        LossError, match=r"'loss': Tensor, 'aux_loss': Tensor.*detach.*\{'loss': f\(batch\), 'aux_loss'"
    ):
        objective.terms(X)
    mixed = Objective(Net(C), step=lambda m, b: {"main": Mean(m(b).sum(), 3), "auxiliary": m(b).sum()})
    with pytest.raises(LossError, match=r"'main': Mean, 'auxiliary': Tensor"):
        mixed.terms(X)
    one = Objective(Net(C), step=lambda m, b: {"main": Mean(m(b).sum(), 3)})
    assert one.terms(X)["loss"].denominator == 3


def test_terms_other_than_declared_are_refused_with_both_lists():
    objective = Objective(Net(C), step=lambda m, b: {"a": m(b).sum()}, reduction={"a": "sum", "b": "sum"})
    with pytest.raises(LossError, match=r"the terms 'a', and 'a', 'b' are declared"):
        objective.terms(X)


def test_a_mean_that_contradicts_its_declared_denominator_is_refused_with_both_numbers():
    objective = Objective(Net(C), step=lambda m, b: Mean(m(b).sum(), 7), reduction="sample_mean")
    with pytest.raises(LossError, match="divided by 7, and its declared reduction gives 9"):
        objective.terms(X)
    objective = Objective(Net(C), step=lambda m, b: Mean(m(b).sum(), 9), reduction="sum")
    with pytest.raises(LossError, match="return the sum"):
        objective.terms(X)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda loss: loss.item(), "the number .*no graph"),
        (lambda loss: loss.detach(), "without a graph"),
        (lambda loss: loss.repeat(3), r"shape \(3,\)"),
        (lambda loss: None, "NoneType"),
        (lambda loss: Mean(loss.detach(), 3), "without a graph"),
        (lambda loss: Mean(3.0, 3), "without a graph"),
    ],
)
@pytest.mark.parametrize("reduction", ["auto", "sample_mean", lambda batch: 3])
def test_a_step_whose_result_cannot_be_learned_from_is_refused(returned, words, reduction):
    def step(model, batch):
        return returned(model(batch[:3]).mean())

    objective = Objective(Net(C), step=step, reduction=reduction)
    with pytest.raises(LossError, match=words):
        objective.terms(X[:3])


def test_a_loss_without_a_graph_is_all_right_where_nothing_counts_or_gradients_are_off():
    step = lambda m, b: Mean(torch.zeros(()), 0)  # noqa: E731
    (term,) = Objective(Net(C), step=step).terms(X).values()
    assert term.numerator == 0
    objective = Objective(Net(C), step=step, reduction=lambda batch: 0)
    assert objective.terms(X)["loss"].denominator == 0
    with torch.no_grad():
        assert Objective(Net(C), loss=functional.mse_loss).terms((X, tensor(N, C)))["loss"].value > 0


def test_an_error_of_the_device_that_a_count_lies_on_stays_what_it_is():
    with pytest.raises(RuntimeError, match="meta tensors"):  # as whatever ran there before may fail when it is read
        as_number(torch.zeros((), device="meta"), "reduction", "a count")
    for wrong in (torch.ones(2), "3", torch.tensor(1j), None):
        with pytest.raises(LossError, match="reduction gave .* not one number: a count"):
            as_number(wrong, "reduction", "a count")
    assert as_number(torch.tensor([3]), "reduction", "a count") == 3.0

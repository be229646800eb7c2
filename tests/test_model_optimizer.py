"""What cannot be trained by accumulation is refused before anything runs."""

import pytest
import torch
from torch import nn

from autoaccum.errors import SetupError
from autoaccum.model.optimizer import build_optimizer, check_model, check_optimizer


def test_a_name_a_class_a_factory_and_an_instance():
    model = nn.Linear(2, 2)
    assert type(build_optimizer("AdamW", model, lr=0.5)) is torch.optim.AdamW
    assert build_optimizer(torch.optim.SGD, model, lr=0.25).param_groups[0]["lr"] == 0.25
    made = build_optimizer(lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), model, lr=None)
    assert (made.param_groups[0]["lr"], made.param_groups[0]["momentum"]) == (1e-3, 0.9)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    assert build_optimizer(own, model, lr=None) is own


def test_frozen_parameters_are_left_out_and_a_losss_own_are_taken_in():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    loss = nn.Linear(2, 1)
    made = build_optimizer("sgd", model, lr=None, loss=loss)
    assert len(made.param_groups[0]["params"]) == 4


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("adamv", "name of one in torch.optim: .*adamw"),
        ("lbfgs", "needs a closure"),
        (torch.optim.LBFGS, "needs a closure"),
        (3, "give an Optimizer, a factory"),
        (lambda p, lr: "sgd", "returned str"),
        ([1, 2], "optimizer= is a list of 2"),
    ],
)
def test_unusable_optimizers_are_named(optimizer, message):
    with pytest.raises(SetupError, match=message):
        build_optimizer(optimizer, nn.Linear(2, 2), lr=None)


def test_instances_that_cannot_serve():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(SetupError, match="2 of the optimizer's 2 parameters are not the model's"):
        build_optimizer(torch.optim.SGD(other.parameters(), lr=0.1), model, lr=None)
    with pytest.raises(SetupError, match="needs a closure"):
        check_optimizer(torch.optim.LBFGS(model.parameters()), model)
    with pytest.raises(SetupError, match="whose own rates count"):
        build_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, lr=0.1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(SetupError, match="none of the optimizer's 2 parameters"):
        check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_models_that_cannot_be_trained():
    with pytest.raises(SetupError, match="is int, not a torch.nn.Module"):
        check_model(3)
    with pytest.raises(SetupError, match="nothing to train"):
        check_model(nn.ReLU())
    with pytest.raises(SetupError, match="on the meta device"):
        check_model(nn.Linear(2, 2, device="meta"))


def test_sparse_gradients_are_refused_where_their_norm_is_wanted():
    embedding = nn.Embedding(3, 2, sparse=True)
    check_model(embedding)
    with pytest.raises(
        SetupError, match=r"clip_norm=1.0 beside sparse gradients \(of 0\.weight\).* leave clip_norm out"
    ):
        check_model(nn.Sequential(embedding), clip_norm=1.0)
    with pytest.raises(SetupError, match=r"log_grad_norm=True beside .* \(of weight\).* leave log_grad_norm out"):
        check_model(embedding, log_grad_norm=True)


def test_a_model_may_call_something_else_sparse():
    model = nn.Linear(2, 2)
    model.sparse = True
    check_model(model, clip_norm=1.0, log_grad_norm=True)


@pytest.mark.parametrize("clip_norm", ["1", True, 0, -1.0, float("nan"), [1.0]])
def test_a_norm_that_is_none_is_refused_by_its_value(clip_norm):
    with pytest.raises(SetupError, match=r"clip_norm=.*: give a norm above 0"):
        check_model(nn.Linear(2, 2), clip_norm=clip_norm)


def test_a_model_that_is_sharded_the_older_way_is_refused():
    class FullyShardedDataParallel(nn.Linear):
        """Stands in by its name: the real one needs a process group."""

    with pytest.raises(SetupError, match="sharded .*FullyShardedDataParallel"):
        check_model(FullyShardedDataParallel(2, 2))

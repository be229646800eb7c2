"""A batch becomes the model's call and the loss's call; what does not fit is refused by name."""

import copy
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autoaccum.errors import DataError, LossError
from autoaccum.loss.call import arrange, returned_loss, scalar, targets_in


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("key", ["labels", "label", "targets", "target"])
def test_targets_are_taken_from_a_mapping_by_one_of_four_names_and_the_mapping_is_left_alone(kind, key):
    batch = kind({"x": torch.ones(2), "mask": torch.zeros(2), key: torch.arange(2)})
    before = copy.copy(dict(batch))
    call = arrange(batch, apart=True)
    assert call.args == ()
    assert list(call.kwargs) == ["x", "mask"]
    assert call.targets is batch[key]
    assert dict(batch) == before


def test_without_a_loss_the_model_gets_the_whole_mapping_labels_included():
    batch = UserDict(input_ids=torch.ones(2, 3), labels=torch.zeros(2, 3))
    call = arrange(batch, apart=False)
    assert list(call.kwargs) == ["input_ids", "labels"]
    assert call.targets is batch["labels"]


@pytest.mark.parametrize("kind", [tuple, list])
def test_the_last_of_a_tuple_or_list_is_the_target_and_the_rest_are_arguments(kind):
    call = arrange(kind([1, 2, 3]), apart=True)
    assert (call.args, call.kwargs, call.targets) == ((1, 2), {}, 3)
    assert arrange(kind([1, 2, 3]), apart=False).args == (1, 2, 3)


def test_a_lone_tensor_or_any_other_object_is_the_models_one_argument():
    for batch in (torch.ones(3), SimpleNamespace(x=1)):
        assert arrange(batch, apart=False).args == (batch,)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"x": torch.ones(2)}, ["'x'", "none of them", "step="]),
        ({"x": 1, "labels": 1, "target": 2}, ["both 'labels' and 'target'", "step="]),
        ({"labels": torch.ones(2)}, ["nothing but 'labels'"]),
        ({1: torch.ones(2), "labels": 1}, ["1", "int", "step="]),
        ((torch.ones(2),), ["tuple of 1", "step="]),
        (torch.ones(2), ["one Tensor", "step="]),
        (SimpleNamespace(x=1), ["one SimpleNamespace", "step="]),
    ],
)
def test_a_batch_without_one_clear_target_is_refused_with_the_remedy(batch, words):
    with pytest.raises(DataError) as error:
        arrange(batch, apart=True)
    for word in words:
        assert word in str(error.value)


def test_targets_in_a_batch_are_found_without_an_error_where_they_are_not_clear():
    assert targets_in({"labels": 1, "target": 2}, apart=False) == 1
    assert targets_in({"label": 1}, apart=False) == 1
    assert targets_in({"label": 1, "target": 2}, apart=False) is None
    assert targets_in((1, 2), apart=True) == 2
    assert targets_in((1, 2), apart=False) is None
    assert targets_in(torch.ones(2), apart=True) is None


def test_a_models_own_loss_is_found_in_all_its_places():
    loss = torch.ones(())
    for outputs in (loss, {"loss": loss}, SimpleNamespace(loss=loss, logits=1), (loss, 1), [loss]):
        assert returned_loss(outputs) is loss


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ({"logits": 1}, ["dict", "'logits'", "step="]),
        (SimpleNamespace(loss=None), ["loss is None", "labels"]),
        ((), ["tuple", "no loss"]),
        (object(), ["object", "no loss"]),
    ],
)
def test_a_model_that_returns_no_loss_is_refused_with_the_remedy(outputs, words):
    with pytest.raises(LossError) as error:
        returned_loss(outputs)
    for word in words:
        assert word in str(error.value)


def test_a_loss_must_be_a_scalar_tensor_with_a_graph():
    parameter = nn.Parameter(torch.ones(3))
    assert scalar(parameter.sum().reshape(1), "f").shape == ()
    with pytest.raises(LossError, match=r"f returned the number 0\.5 .*no graph.*item"):
        scalar(0.5, "f")
    with pytest.raises(LossError, match=r"f returned a str"):
        scalar("0.5", "f")
    with pytest.raises(LossError, match=r"f returned a loss of shape \(3,\).*mean"):
        scalar(parameter * 1, "f")
    with pytest.raises(LossError, match=r"f returned a loss of 3 without a graph.*detach"):
        scalar(parameter.sum().detach(), "f")
    with pytest.raises(LossError, match=r"f returned a complex loss.*real"):
        scalar(parameter.sum() * 1j, "f")


def test_a_graph_is_asked_for_only_where_gradients_are_enabled():
    with torch.no_grad():
        assert scalar(torch.ones(()), "f") == 1
    assert scalar(torch.ones(()), "f", graph=False) == 1

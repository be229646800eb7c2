"""Recalibration: population statistics from data, and nothing else touched."""

import pytest
import torch
from torch import nn

from autoaccum.errors import DataError
from autoaccum.window.recalibrate import recalibrate


def data(samples=23, seed=1):
    torch.manual_seed(seed)
    return torch.randn(samples, 3, dtype=torch.float64) * 5 + torch.linspace(-40, 40, samples).view(-1, 1)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3, momentum=None))
    return model.double()


@pytest.mark.parametrize("training", [True, False])
def test_statistics_become_those_of_all_the_data(training):
    model, whole = network().train(training), data()
    model[0].running_mean.fill_(1e6)
    assert recalibrate(model, whole.split([9, 2, 12])) == 3
    torch.testing.assert_close(model[0].running_mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model[0].running_var, whole.var(0), rtol=1e-12, atol=0)
    assert [module.training for module in model.modules()] == [training] * 5
    assert [model[0].momentum, model[3].momentum] == [0.1, None]
    assert model[0].num_batches_tracked == 0


def test_dropout_is_off_and_one_batch_is_exact_in_every_layer():
    model, whole = network(), data()
    recalibrate(model, [whole])
    behind = model[1](nn.functional.batch_norm(whole, None, None, training=True))
    torch.testing.assert_close(model[3].running_var, behind.var(0), rtol=1e-12, atol=0)


def test_in_a_training_model_a_frozen_layer_is_left_alone():
    model = network()
    model[0].eval()
    recalibrate(model, [data()])
    assert model[0].running_mean.tolist() == [0, 0, 0]
    assert not model[0].training
    assert model[3].running_mean.abs().sum() > 0


def test_batches_go_through_call():
    model, whole = network(), data()
    recalibrate(model, [{"images": whole}], call=lambda batch: model(batch["images"]))
    torch.testing.assert_close(model[0].running_mean, whole.mean(0), rtol=1e-12, atol=1e-12)


def fails():
    yield data()
    raise OSError("the disk is gone")


@pytest.mark.parametrize(("batches", "error"), [([], DataError), (fails(), OSError)])
def test_without_batches_or_after_an_error_the_model_is_as_before(batches, error):
    model = network()
    model(data())
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error):
        recalibrate(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [model[0].momentum, model[3].momentum] == [0.1, None]
    assert [module.training for module in model] == [True, True, False, True]

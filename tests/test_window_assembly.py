"""What cannot be trained with is refused before anything runs, on every way in."""

from functools import partial

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import SetupError
from autoaccum.ranks import Ranks
from autoaccum.settings import Settings
from autoaccum.window.assembly import assemble

DATA = torch.randn(32, 6), torch.randint(0, 4, (32,))
LOSS = nn.CrossEntropyLoss()
ASKED = {"loss": LOSS, "device": "cpu"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "a"}, "seed='a'"),
        ({"seed": 2**70}, "seed=1180591620717411303424: give a whole number"),
        ({"clip_norm": "1"}, "clip_norm='1': give a norm above 0"),
        ({"clip_norm": True}, "clip_norm=True"),
        ({"shuffle": "no"}, "shuffle='no': choose True, False"),
        ({"lr": "1"}, "lr='1' is not a learning rate"),
    ],
)
def test_a_setting_that_is_none_is_refused_by_its_value(settings, message):
    with pytest.raises(SetupError, match=message):
        assemble(nn.Linear(6, 4), DATA, Settings({**ASKED, **settings}), Ranks())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode, partial(torch.set_grad_enabled, False)])
@pytest.mark.parametrize("way", [partial(autoaccum.fit, target_batch=8), autoaccum.probe, autoaccum.verify])
def test_where_gradients_are_switched_off_it_says_so(way, off):
    with off(), pytest.raises(SetupError, match="gradients are switched off here"):
        way(nn.Linear(6, 4), DATA, loss=LOSS, device="cpu")


def test_a_norm_of_sparse_gradients_is_refused_early():
    data = torch.randint(0, 9, (32, 2)), torch.randint(0, 8, (32,))
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten())
    with pytest.raises(SetupError, match=r"log_grad_norm=True beside sparse gradients \(of 0\.weight\)"):
        assemble(model, data, Settings({**ASKED, "optimizer": "sgd", "log_grad_norm": True}), Ranks())


def test_a_model_without_numbers_is_refused_and_named():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(SetupError, match=r"1\.weight of Sequential is on the meta device"):
        assemble(model, DATA, Settings(ASKED), Ranks())

"""What stands in for an object's attributes, and leaves."""

import copy

import pytest
import torch
from torch import nn

from autoaccum.model.forward import StandIn, standing


class Owner:
    """Has one attribute by its class, and one of its own."""

    of_class = 1

    def __init__(self):
        self.own = 2


def test_attributes_stand_in_for_a_while_and_leave_as_they_were():
    owner = Owner()
    with pytest.raises(RuntimeError, match="inside"), standing(owner, of_class=3, own=4, new=5):
        assert (owner.of_class, owner.own, owner.new) == (3, 4, 5)
        raise RuntimeError("inside")
    assert vars(owner) == {"own": 2}
    assert owner.of_class == 1


def test_a_module_is_called_through_its_stand_in_and_a_copy_of_it_is_not():
    class Doubling(StandIn):
        def __call__(self, x):
            return 2 * self.forward(x)

    module, x = nn.Linear(2, 2), torch.ones(1, 2)
    plain, inside = module(x), Doubling(module)
    for _ in range(2):
        with inside:
            assert torch.equal(module(x), 2 * plain)
            assert torch.equal(copy.deepcopy(module)(x), plain)
        assert "forward" not in vars(module)

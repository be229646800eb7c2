"""Copies of micro-batches that are on their way while one runs: which, when, and who waits for whom."""

import torch
from torch import nn

import autoaccum
from autoaccum.window.ahead import Ahead
from tests.fakes import FakeStreams

CPU = torch.device("cpu")


def opened(batches, rehearses=False):
    streams = FakeStreams()
    ahead = Ahead(CPU, streams)
    ahead.open(batches, rehearses=rehearses)
    return ahead, streams.log


def test_the_next_batch_is_copied_beside_the_backward_pass_and_waited_for_where_it_is_used():
    batches = [{"x": torch.full((2,), float(number))} for number in range(3)]
    ahead, log = opened(batches)
    assert ahead.take(batches[0])["x"] is batches[0]["x"]
    assert log == []
    for number in (1, 2):
        ahead.send()
        assert log == ["side waits for usual", "on side"]  # what used the block before comes first
        log.clear()
        copy = ahead.take(batches[number])
        assert log == ["usual waits for side"]
        log.clear()
        assert copy["x"] is not batches[number]["x"]
        assert torch.equal(copy["x"], batches[number]["x"])
    ahead.send()  # nothing follows
    ahead.close()
    assert log == []


def test_a_rehearsal_takes_what_a_window_of_several_does():
    batch = torch.ones(2)
    ahead, log = opened([batch], rehearses=True)
    ahead.take(batch)
    ahead.send()
    ahead.close()
    assert log == ["side waits for usual", "on side", "usual waits for side"]


def test_a_window_that_was_left_is_waited_for_before_its_block_is_let_go():
    batches = [torch.ones(2), torch.ones(2), torch.ones(2)]
    ahead, log = opened(batches)
    ahead.take(batches[0])
    ahead.send()
    assert ahead.take(batches[2]) is batches[2]  # not what was on its way
    assert log[-1] == "usual waits for side"


def test_what_moves_in_a_way_of_its_own_is_not_copied_ahead():
    batches = [{"x": torch.ones(2), "names": ["a", "b"]}, torch.eye(2).to_sparse()]
    for batch in batches:
        ahead, log = opened([torch.ones(2), batch])
        ahead.take(batch)
        ahead.send()
        assert log == []


def test_gradients_are_the_whole_batchs():
    model, batch = nn.Linear(4, 1).double(), torch.randn(6, 4, dtype=torch.float64)
    taken = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: taken.append(model.weight.grad.clone()))
    model(batch).square().mean().backward()
    whole, model.weight.grad, model.bias.grad = model.weight.grad, None, None
    accumulator = autoaccum.Accumulator(model, optimizer, autoaccum.plan(limit=2, target_batch=6))
    streams = FakeStreams()
    accumulator._ahead = Ahead(CPU, streams)
    for part in accumulator.window(batch):
        accumulator.backward(model(part).square().mean())
    assert streams.log.count("on side") == 2
    torch.testing.assert_close(taken[0], whole, rtol=1e-12, atol=0)

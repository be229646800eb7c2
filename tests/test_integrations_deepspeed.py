"""Windows in a loop around a DeepSpeed engine: the whole batch's update under ZeRO 0 to 3, on two gloo ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import autoaccum
from autoaccum.errors import LossError, SetupError
from autoaccum.integrations.deepspeed import EngineAccumulator
from tests import deepspeed_ranks
from tests.versions import peer

ROOT = Path(__file__).parents[1]
SINGLE = 1e-6  # an engine keeps its weights in float32


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found, by ZeRO's stage."""
    peer("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.deepspeed_ranks", folder],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def by_hand():
    """Whole batches, one after another."""
    module, losses = deepspeed_ranks.net(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=deepspeed_ranks.LR)
    for _ in range(deepspeed_ranks.EPOCHS):
        for x, y in zip(deepspeed_ranks.X.split(deepspeed_ranks.TARGET), deepspeed_ranks.Y.split(8), strict=True):
            loss = deepspeed_ranks.loss(module(x), y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]), losses


@pytest.mark.slow
@pytest.mark.parametrize("stage", deepspeed_ranks.STAGES)
def test_update_and_losses_are_the_whole_batchs(stage, found):
    weights, losses = by_hand()
    before = torch.cat([parameter.detach().flatten() for parameter in deepspeed_ranks.net().parameters()])
    for rank in found:
        assert float((rank[stage]["weights"] - weights).norm() / (weights - before).norm()) <= SINGLE
        assert rank[stage]["losses"] == pytest.approx(losses, rel=1e-5)
        assert (rank[stage]["steps"], rank[stage]["samples"]) == (6, 5)


class Engine:
    """An engine of one rank, as far as windows go."""

    device = torch.device("cpu")

    def __init__(self, managed=False):
        self.managed_gradient_accumulation = lambda: managed
        self.weight, self.steps = torch.zeros(3, requires_grad=True), 0

    def __call__(self, x):
        return (x @ self.weight).mean()

    def backward(self, loss, scale_wrt_gas):
        assert not scale_wrt_gas
        loss.backward()

    def step(self):
        self.steps += 1

    def get_lr(self):
        return [0.1]

    def get_global_grad_norm(self):
        return None


def test_an_engine_that_accumulates_by_itself_or_bad_values_are_refused():
    with pytest.raises(SetupError, match='"managed_gradient_accumulation": false'):
        EngineAccumulator(Engine(managed=True), autoaccum.plan(2, 8))
    with pytest.raises(SetupError, match="reduction='token_mean'"):
        EngineAccumulator(Engine(), autoaccum.plan(2, 8), reduction="token_mean")


def test_a_window_takes_one_backward_for_each_micro_batch_and_is_not_left_early():
    x = torch.arange(15.0).reshape(5, 3)
    engine = Engine()
    accumulator = EngineAccumulator(engine, autoaccum.plan(2, 5))
    for micro in accumulator.window((x,)):
        accumulator.backward(engine(*micro))
    assert torch.allclose(engine.weight.grad, x.mean(0))
    assert (engine.steps, accumulator.last.micro_batches, accumulator.last.samples) == (1, 3, 5)
    with pytest.raises(LossError, match="twice for a micro-batch, or outside"):
        accumulator.backward(engine(x))
    with pytest.raises(LossError, match="exactly once"):
        list(accumulator.window((x,)))
    with pytest.raises(SetupError, match="left early"):
        next(accumulator.window((x,)))
    assert engine.steps == 1


@pytest.mark.parametrize("told", [False, True])
def test_a_loss_that_divides_by_something_else_than_what_counts_is_refused(told):
    x, y = torch.arange(15.0).reshape(5, 3), torch.tensor([1, -100, 2, 0, 1])
    engine = Engine()
    engine.weight = torch.zeros(3, 3, requires_grad=True)
    reduction = {"reduction": lambda micro: (micro[1] != -100).sum()} if told else {}
    accumulator = EngineAccumulator(engine, autoaccum.plan(2, 5), **reduction)

    def train():
        for inputs, targets in accumulator.window((x, y)):
            accumulator.backward(torch.nn.functional.cross_entropy(inputs @ engine.weight, targets))

    if not told:
        with pytest.raises(LossError, match=r"divides by 2 where 2 count, and by 1 where 2 do.*give reduction="):
            train()
        return
    train()
    whole = torch.zeros(3, 3, requires_grad=True)
    torch.nn.functional.cross_entropy(x @ whole, y).backward()
    assert torch.allclose(engine.weight.grad, whole.grad, atol=1e-6)


def test_a_window_in_which_nothing_counts_is_an_error():
    accumulator = EngineAccumulator(Engine(), autoaccum.plan(2, 5), reduction=lambda batch: 0)
    with pytest.raises(LossError, match="denominator of 0"):
        next(accumulator.window((torch.ones(5, 3),)))

"""Losses that compare samples, on two ranks: the loss is one over the samples of both."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist

import autoaccum
from tests.ranks_started import started
from tests.test_loss_coupled import KINDS, Projected, X, Y, clip, encode, error, moved, sup_con, towers

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")

# (loss, the largest micro-batch of each rank, samples, failures): 23 samples a window, and a tail of 1 for one rank.
CASES = {
    "two towers and a temperature, unequal shares": (clip, (9, 4), 46, ()),
    "labels from the batch": (sup_con, (5, 5), 46, ()),
    "parameters of the loss": (Projected, (6, 6), 23, ()),
    "a rank that idles in the tail": (clip, (6, 6), 24, ()),
    "out of memory in the first pass of one rank": (clip, (9, 4), 46, ("first",)),
    "out of memory in the second pass of one rank": (clip, (9, 4), 46, ("second",)),
}


def train(name, rank, size):
    loss, limits, samples, failures = CASES[name]
    loss = loss() if isinstance(loss, type) else loss
    model = towers()

    def encoded(model, batch):
        if rank == 0 and failures and len(batch[0]) > 5 and torch.is_grad_enabled() is (failures[0] == "second"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return encode(model, batch)

    made = autoaccum.plan(limits, 23, world_size=size, rank=rank, samples=samples)
    before = copy.deepcopy(list(model.parameters()))
    result = autoaccum.fit(
        model, (X[:samples], Y[:samples], KINDS[:samples]), plan=made, step=autoaccum.Coupled(encoded, loss),
        optimizer=torch.optim.SGD, lr=0.1, shuffle=False, device="cpu", check=False,
    )  # fmt: skip
    own = [p.detach() for p in loss.parameters()] if isinstance(loss, Projected) else []
    taken = moved(before, model.parameters())
    return {"moved": taken, "own": own, "losses": [record.loss for record in result.history]}


def with_dropout(rank):
    """One window with dropout, and what each first forward got: the generator's state and the batch."""
    model, seen = towers(drop=0.3), []

    def encoded(model, batch):
        if not torch.is_grad_enabled():
            seen.append((torch.get_rng_state(), *batch))
        return encode(model, batch)

    before = copy.deepcopy(list(model.parameters()))
    torch.manual_seed(rank)
    autoaccum.fit(
        model, (X, Y, KINDS), plan=autoaccum.plan((9, 4), 23, world_size=2, rank=rank, samples=46), max_steps=1,
        step=autoaccum.Coupled(encoded, clip), optimizer=torch.optim.SGD, lr=0.1, shuffle=False, device="cpu",
        check=False,
    )  # fmt: skip
    return {"moved": moved(before, model.parameters()), "seen": seen}


def work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    trained = {name: train(name, rank, 2) for name in CASES}
    torch.save({**trained, "dropout": with_dropout(rank)}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coupled")
    started(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_train_as_one_process_with_the_whole_batch(found, name):
    loss, _, samples, _ = CASES[name]
    loss = loss() if isinstance(loss, type) else loss
    model = towers()
    before = copy.deepcopy(list(model.parameters()))
    modules = [model, loss] if isinstance(loss, Projected) else [model]
    optimizer = torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1)
    losses = []
    for start in range(0, samples, 23):
        optimizer.zero_grad()
        batch = (X[start : min(start + 23, samples)], Y[start : min(start + 23, samples)], KINDS[start:samples][:23])
        value = autoaccum.Coupled(encode, loss)(model, batch)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    for rank in range(2):
        assert found[rank][name]["losses"] == pytest.approx(losses, rel=1e-12)
        assert error(found[rank][name]["moved"], moved(before, model.parameters())) < 1e-11
        for own, reference in zip(found[rank][name]["own"], getattr(loss, "parameters", list)()):
            assert float((own - reference.detach()).norm() / reference.detach().norm()) < 1e-12


def test_dropout_repeats_its_masks_on_two_ranks_with_unequal_shares(found):
    model, pieces = towers(drop=0.3), []
    model.train()
    for rank in range(2):
        for state, *batch in found[rank]["dropout"]["seen"]:
            torch.set_rng_state(state)
            pieces.append(encode(model, batch))
    sizes = [len(piece["left"]) for piece in pieces]
    assert sum(sizes) == 23
    assert len(set(sizes)) > 1
    whole = {name: torch.cat([piece[name] for piece in pieces]) for name in ("left", "right")}
    clip({**whole, "temperature": model.temperature.exp()}).backward()
    reference = [0.1 * parameter.grad for parameter in model.parameters()]
    for rank in range(2):
        assert error(found[rank]["dropout"]["moved"], reference) < 1e-11

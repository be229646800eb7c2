"""A loss that is read off its graph on two ranks, of which one sees what the other does not."""

import pytest
import torch
import torch.distributed as dist

from autoaccum.data import tree
from autoaccum.errors import LossError
from autoaccum.loss.objective import Objective
from autoaccum.planning.plan import plan
from autoaccum.window.accumulate import Accumulator
from tests.ranks_started import started
from tests.test_loss_reading import Kept, Net, marked, samples

MARKS = (0, 1, 3, 2, 3, 5, 4, 3)  # of which rank 0 has the first four: there alone a floor of 2 shows


def floored(model, batch):
    return marked(model, batch) / batch["k"].sum().clamp(min=2)


def marks():
    data = samples(0.3, count=len(MARKS))
    data["k"] = torch.tensor(MARKS, dtype=torch.float64)
    return tree.split(data, [4, 4])


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    made = plan((2, 2), len(MARKS), world_size=2, rank=rank)
    optimizer = Kept(model.parameters(), lr=0.0)
    accumulator = Accumulator(model, optimizer, made, objective=Objective(model, step=floored), precision="fp32")
    found = []
    few = {name: leaf[1:2] for name, leaf in marks()[0].items()}  # one mark, less than the floor
    for pieces in (tree.split(marks()[rank], [2, 2]), [] if rank else [few]):
        accumulator.open(pieces)
        accumulator.run(pieces)
        accumulator.finish()
        found.append(optimizer.gradient)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")
def test_a_rank_that_never_saw_a_floor_divides_by_it_all_the_same(tmp_path):
    started(work, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    model = Net()
    whole = tree.join(marks())
    for own, other, batch in zip(first, second, (whole, {name: leaf[1:2] for name, leaf in whole.items()})):
        found = torch.autograd.grad(floored(model, batch), list(model.parameters()), allow_unused=True)
        pairs = zip(found, model.parameters())
        expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
        assert torch.equal(own, other)
        assert float((own - expected).norm()) <= 1e-10 * float(expected.norm())


def test_floors_that_differ_between_ranks_are_refused():
    objectives = [
        Objective(Net(), step=lambda m, b, f=floor: marked(m, b) / b["k"].sum().clamp(min=f)) for floor in (1, 2)
    ]
    for objective in objectives:
        objective.settle([marks()[0]])
    sums = [one + other for one, other in zip(*(objective.reading.floors for objective in objectives))]
    for objective in objectives:
        with pytest.raises(LossError, match="another floor on some of them"):
            objective.reading.agree_on_floors(sums)

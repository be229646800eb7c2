"""Windows of models that `fully_shard` has sharded, on real gloo ranks, against the whole batch in one process."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autoaccum
from autoaccum.errors import SetupError
from autoaccum.model.shards import Shards, check_shards
from autoaccum.planning.plan import plan
from tests.ranks_started import started
from tests.shards_work import CASES, Case, Net, by_hand, grouped, off, sgd, sharded, tokens, trained, windows

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"), reason="this torch's FSDP cannot be replayed"
)

EXACT = 1e-10


def ended(attempt):
    try:
        attempt()
    except SetupError as error:
        return str(error)
    return "ended well"


def own_loop(case, rank, size):
    """The loop that a person writes, with the loss and denominators of their own."""
    model = sharded(case.model())
    made = case.plan(rank, size)
    accumulator = autoaccum.Accumulator(model, case.optimizer(model.parameters()), made, log_grad_norm=True)
    for pieces in windows(case, made):
        for ids, labels in accumulator.window(pieces):
            loss = nn.functional.cross_entropy(model(ids), labels, reduction="sum")
            accumulator.backward(autoaccum.Mean(loss, int((labels >= 0).sum())))
    accumulator.close()
    return model


def refused(rank, size):
    """What each is told that cannot be trained."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (size,))
    models = {}
    models["offload"] = fully_shard(nn.Linear(4, 4), offload_policy=CPUOffloadPolicy(pin_memory=False))
    models["roots"] = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in models["roots"]:
        fully_shard(layer)
    models["tensor"] = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh, {"0": ColwiseParallel()})
    models["sparse"] = fully_shard(nn.Embedding(4, 4, sparse=True))
    models["own"] = fully_shard(nn.Linear(4, 4))
    models["own"].set_custom_all_gather(type("Mine", (), {"allocate": None})())
    return {name: ended(lambda model=model: check_shards(model, model.parameters())) for name, model in models.items()}


def settings(model):
    return [(group.gradient_divide_factor, group.force_sum_reduction_for_comms, group.reduce_scatter_unused_params,
             type(group._all_gather_comm).__name__) for group in Shards(model).groups]  # fmt: skip


def left_alone(case, rank, size):
    """How FSDP would reduce, before and after; and whether fit, probe and verify say that they cannot yet."""
    model = sharded(case.model())
    before = settings(model)
    made = plan(case.limits, case.target, world_size=size, rank=rank, optimizer="sgd")
    accumulator = autoaccum.Accumulator(model, sgd(model.parameters()), made)
    pieces = next(windows(case, made))
    opened = accumulator.window(pieces)
    next(opened)
    inside = settings(model)
    opened.close()
    return before, inside, settings(model)


def float32():
    return Net().float()


def in_halves(rank, size):
    """How far a training with parameters in bf16 is from the whole batch in float32; and one process's is, in bf16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    case = Case(count=10, model=float32)  # one window: the rounding of one gradient
    exact, start = by_hand(case), case.model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    got = off(trained(case, rank, size, policy), exact, start)
    model, low = case.model(), case.model().bfloat16()
    ids, labels = tokens(case.count)
    (nn.functional.cross_entropy(low(ids), labels, reduction="sum") / (labels >= 0).sum()).backward()
    for parameter, rounded in zip(model.parameters(), low.parameters()):
        parameter.grad = None if rounded.grad is None else rounded.grad.float()
    case.optimizer(model.parameters()).step()
    return got, off(model, exact, start)


def work(rank, folder):
    size = 2
    with grouped(rank, size, folder):
        found = {}
        for name, case in CASES.items():
            found[name] = off(trained(case, rank, size), by_hand(case), case.model())
        case = CASES["unequal limits, a tail smaller than the ranks"]
        found["own loop"] = off(own_loop(case, rank, size), by_hand(case), case.model())
        late = dataclasses.replace(case, late=True)
        found["own loop, summed late"] = off(own_loop(late, rank, size), by_hand(late), late.model())
        found["halves"] = in_halves(rank, size)
        found["refused"] = refused(rank, size)
        found["left alone"] = left_alone(Case(), rank, size)
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    started(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [*CASES, "own loop", "own loop, summed late"])
def test_two_ranks_with_shards_end_where_one_process_with_the_whole_batch_does(found, name):
    assert [each[name] <= EXACT for each in found] == [True, True], found


def test_with_parameters_in_bf16_it_is_off_by_that_policys_rounding_alone(found):
    """Gradients are summed in float32, as the policy says, so that micro-batches and ranks add nothing to it."""
    for each in found:
        got, policys_own = each["halves"]
        assert 2**-16 < got <= 1.5 * policys_own < 2**-4  # bf16 rounds to 2**-9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("offload", "CPUOffloadPolicy.*wait on the host"),
        ("roots", r"several sharded roots \(1 is not inside the first"),
        ("tensor", "tensor, pipeline or context parallelism"),
        ("sparse", "sparse gradients, which cannot be sharded"),
        ("own", "communicates through Mine"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(found, name, said):
    with pytest.raises(SetupError, match=said):
        raise SetupError(found[0]["refused"][name])


def test_fsdp_reduces_as_before_once_a_window_is_over(found):
    before, inside, after = found[1]["left alone"]
    assert before == after
    assert all(each[:3] == (1.0, True, True) and each != was for each, was in zip(inside, before))


def work_of_four(rank, folder):
    with grouped(rank, 4, folder):
        mixed = Case(limits=(4, 1, 2, 3), count=31, clip=0.05, replicas=2)
        cases = [mixed, Case(limits=(4, 1, 2, 3), count=31)]
        cases += [dataclasses.replace(case, late=True) for case in cases]
        found = [off(trained(case, rank, 4), by_hand(case), case.model()) for case in cases]
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_four_ranks_in_one_dimension_and_in_two(tmp_path):
    started(work_of_four, 4, tmp_path)
    for rank in range(4):
        assert max(torch.load(tmp_path / f"{rank}.pt", weights_only=True)) <= EXACT


def test_a_torch_whose_fsdp_cannot_be_replayed_is_refused_by_name(monkeypatch, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = sharded(Net(blocks=1))
        monkeypatch.delattr(fsdp.FSDPModule, "reset_iter_state")
        with pytest.raises(SetupError, match="torch 2.13 or newer.*reset_iter_state"):
            autoaccum.Accumulator(model, sgd(model.parameters()), plan(2, 4, optimizer="sgd"))
    finally:
        dist.destroy_process_group()


def test_one_rank_with_shards_ends_where_the_whole_batch_does(tmp_path):
    case = Case(limits=(3,), clip=0.05)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        assert off(trained(case, 0, 1), by_hand(case), case.model()) <= EXACT
    finally:
        dist.destroy_process_group()

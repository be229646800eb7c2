"""Checkpoints of sharded models on real gloo ranks: the same end bit for bit, whatever ended the training before."""

import contextlib
import functools
import hashlib
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import CheckpointError
from autoaccum.training.checkpoint import ABOUT
from tests.ranks_started import started
from tests.shards_saved import Interruption, came_to, prepared
from tests.shards_work import Net, grouped, sharded, tokens
from tests.torture import shard_kills
from tests.warm import WARM

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"), reason="this torch's FSDP cannot be replayed"
)


ROUNDING = 1e-12


def broken_off(folder, until):
    with pytest.raises(Interruption):
        prepared(folder, until=until).run()


def work(rank, folder):
    with grouped(rank, 2, folder), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        found = {}
        loop = prepared(None)
        loop.run()
        found["undisturbed"] = came_to(loop)
        broken_off(f"{folder}/run", 4)
        found["damaged"] = damaged(rank, folder)
        loop = prepared(f"{folder}/run")
        found["from"] = loop.step
        loop.run()
        found["resumed"] = came_to(loop)
        found["by hand"] = by_hand(loop)
        found["code"] = code(rank, folder)
        found["own state"] = own_state()
        found["failed"] = failed(rank, f"{folder}/failed")
        found["heard"] = [str(each.message) for each in heard]
        torch.save(found, f"{folder}/{rank}.pt")


def by_hand(loop):
    """The state of a loop, given to another one."""
    state = loop.state_dict()
    other = prepared(None)
    other.load_state_dict(state)
    return came_to(other)


def newest(folder):
    return max(Path(folder).glob("step-*"))


def damaged(rank, folder):
    """Where it goes on where a byte of the newest checkpoint's shards has changed."""
    torch.distributed.barrier()
    if rank == 0:
        shutil.copytree(f"{folder}/run", f"{folder}/damaged")
        path = next(newest(f"{folder}/damaged").glob("__1_*"))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    torch.distributed.barrier()
    return prepared(f"{folder}/damaged").step


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def code(rank, folder):
    """What is said where the shards' index has code in it, and the about.json vouches for it."""
    place = f"{folder}/code"
    torch.distributed.barrier()
    if rank == 0:
        shutil.copytree(f"{folder}/run", place)
        index, about = newest(place) / ".metadata", newest(place) / ABOUT
        index.write_bytes(pickle.dumps(Evil(f"{folder}/evil")))
        values = json.loads(about.read_text())
        values["files"][".metadata"] = [len(index.read_bytes()), hashlib.sha256(index.read_bytes()).hexdigest()]
        about.write_text(json.dumps(values))
    torch.distributed.barrier()
    with pytest.raises(CheckpointError) as caught:
        prepared(place)
    return str(caught.value), Path(folder, "evil").exists()


class Own(torch.optim.SGD):
    """Keeps a plain tensor of what lies on its rank."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["mine"] = parameter.to_local().detach().clone()
        return super().step(closure)


def own_state():
    model = sharded(Net())
    loop = autoaccum.prepare(model, tokens(20), target_batch=10, micro_batch=3, loss=nn.CrossEntropyLoss(), check=False,
                             optimizer=Own(model.parameters(), lr=0.1), progress=False)  # fmt: skip
    loop.run()
    with pytest.raises(CheckpointError) as caught:
        loop.state_dict()
    return str(caught.value)


def failed(rank, folder):
    """The second save fails on rank 1: (how the training ends, what could not be saved, the checkpoints, the rest)."""
    real, saves = torch.distributed.checkpoint.FileSystemWriter.write_data, []

    def full(writer, *given):
        saves.append(None)
        if rank == 1 and len(saves) == 2:
            raise OSError(28, "No space left on device")
        return real(writer, *given)

    torch.distributed.checkpoint.FileSystemWriter.write_data = full
    try:
        result = prepared(folder, epochs=1).run()
    finally:
        torch.distributed.checkpoint.FileSystemWriter.write_data = real
    torch.distributed.barrier()
    names = sorted(path.name for path in Path(folder).iterdir())
    return len(result.history), result.unsaved, [name for name in names if "step" in name or "tmp" in name]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    started(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same(got, want):
    assert got["records"] == want["records"]
    assert len(got["tensors"]) == len(want["tensors"])
    assert all(torch.equal(a, b) for a, b in zip(got["tensors"], want["tensors"]))


def test_a_sharded_training_that_was_broken_off_goes_on_to_the_same_end_bit_for_bit(found):
    for each in found:
        assert each["from"] == 3
        assert_same(each["resumed"], each["undisturbed"])
        assert_same(each["by hand"], each["undisturbed"])


def test_the_checkpoint_before_one_with_a_damaged_shard_is_used_loudly(found):
    assert [each["damaged"] for each in found] == [2, 2]
    assert any("its __1_0.distcp has another checksum" in text for text in found[0]["heard"])


def test_code_in_the_shards_index_is_refused_on_all_ranks_and_not_run(found):
    for each in found:
        said, ran = each["code"]
        assert "has posix.mkdir in it" in said
        assert not ran


def test_what_an_optimizer_keeps_of_a_shard_in_a_plain_tensor_is_refused(found):
    for each in found:
        assert "Own keeps plain tensors of a sharded model that differ on the ranks" in each["own state"]


def test_a_save_that_fails_on_one_rank_costs_a_checkpoint_on_all_and_not_the_training(found):
    for each in found:
        steps, unsaved, names = each["failed"]
        assert steps == 3
        assert "1 of 4 saves" in unsaved
        assert "rank 1: OSError: [Errno 28] No space left on device" in unsaved
        assert {name.split("-epoch")[0] for name in names} == {"step-00000001", "step-00000003"}


def moved(stage, rank, folder):
    """Two ranks, then three, then two again: each goes on from where the others were broken off."""
    found = {}
    with grouped(rank, (2, 3, 2)[stage], folder):
        for name, shard in (("sharded", True), ("replicated", False)):
            place = f"{folder}/{name}"
            if stage == 0:
                loop = prepared(None, drop=0.0, shard=shard)
                loop.run()
                found[name] = came_to(loop)
            loop = prepared(place, drop=0.0, shard=shard, until=(2, 4, None)[stage])
            ended(loop)
            if stage == 1:
                found[name] = [loop.plan.world_size, loop.plan.reasons["ranks"], torch.rand(3).tolist()]
            if stage == 2:
                found[name] = came_to(loop)
    torch.save(found, f"{folder}/{rank}.pt")


def ended(loop):
    with contextlib.suppress(Interruption):
        loop.run()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sharded", "replicated"])
def test_other_numbers_of_ranks_go_on_with_the_same_windows(moves, kind):
    undisturbed, between, end = ([each[kind] for each in stage] for stage in moves)
    for size, reason, _ in between:
        assert size == 3
        assert reason.startswith("3, and 2 when it was saved")
    assert len({tuple(drawn) for _, _, drawn in between}) == 3  # no two ranks drop out alike
    for want, got in zip(undisturbed, end):
        for was, now in zip(want["records"], got["records"], strict=True):
            assert was["samples"] == now["samples"]
            assert now["loss"] == pytest.approx(was["loss"], rel=ROUNDING)
        for was, now in zip(want["tensors"], got["tensors"], strict=True):
            torch.testing.assert_close(now, was, rtol=ROUNDING, atol=ROUNDING)


@pytest.fixture(scope="module")
def moves(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("moved"), []
    for stage, size in enumerate((2, 3, 2)):
        (folder / "meeting").unlink(missing_ok=True)
        started(functools.partial(moved, stage), size, folder)
        found.append([torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(size)])
    return found


@pytest.mark.slow
def test_ranks_that_are_killed_at_random_moments_come_to_the_same_end():
    child = WARM.Process(target=_killed)  # a young process, to fork from
    child.start()
    child.join(500)
    assert child.exitcode == 0


def _killed():
    result = shard_kills.run(2, seed=int.from_bytes(os.urandom(4), "little"))
    assert result.same == result.trials == 2, result.to_dict()
    assert not result.failures, result.failures

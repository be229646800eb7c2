"""probe, verify and fit of models that `fully_shard` has sharded, on real gloo ranks; and ranks that fail in a pass."""

import os
import time

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import AutoaccumError, SetupError
from tests.ranks_started import started
from tests.shards_work import Case, Inject, Net, by_hand, grouped, off, sharded, tokens
from tests.torture import sharded as torture

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "reset_iter_state"), reason="this torch's FSDP cannot be replayed"
)

EXACT = 1e-10
CASE = Case(limits=(4, 2), count=31)


def prepared(case, rank, mesh=None, shard=True, **more):
    model = sharded(case.model(), mesh=mesh) if shard else case.model()
    loop = autoaccum.prepare(
        model, tokens(case.count), target_batch=case.target, loss=nn.CrossEntropyLoss(), shuffle=False, lr_rule="none",
        optimizer=case.optimizer(model.parameters()), clip_norm=case.clip, progress=False,
        **{"micro_batch": case.limits[rank], "check": False, **more},
    )  # fmt: skip
    return model, loop


def ended(attempt):
    try:
        attempt()
    except (AutoaccumError, KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "ended well"


def injected(case, rank, bad, kind, at, error, **more):
    """How a training ends in which rank `bad` fails at a place: (what was said, how far off, seconds, limits)."""
    model, loop = prepared(case, rank, **more)
    Inject.arm(kind if rank == bad else None, at, error)
    began = time.monotonic()
    said = ended(loop.run)
    seconds = time.monotonic() - began
    Inject.arm(None)
    far = off(model, by_hand(case), case.model()) if said == "ended well" else 0.0
    return said, far, seconds, loop.plan.limits


def probed(rank):
    """A probe by budgets that differ on the ranks: sizes, and by how many bytes the forecasts are off where it ran."""
    model = sharded(Net().float())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = [parameter.to_local().clone() for parameter in model.parameters()]
    report = autoaccum.probe(
        model, tokens(64), loss=nn.CrossEntropyLoss(), optimizer=optimizer, target_batch=40, progress=False,
        memory=f"{160 + 100 * rank}KiB",
    )  # fmt: skip
    errors = [report.forecast(trial.batch) - trial.peak_bytes for trial in report.trials]
    same = all(torch.equal(was, now.to_local()) for was, now in zip(before, model.parameters()))
    over = report.forecast(report.limit + 1) > report.budget_bytes
    within = max(trial.peak_bytes for trial in report.trials) <= report.budget_bytes
    return {"errors": errors, "kinds": [trial.kind for trial in report.trials], "left": same and not optimizer.state,
            "over": over, "within": within, "limit": report.limit, "sizes": list(report.plan.micro_batches),
            "limits": list(report.plan.limits)}  # fmt: skip


def over_meshes(rank):
    """How trainings end that are given a mesh: of two dimensions of data, and such as are refused."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    model, loop = prepared(CASE, rank, device_mesh=mesh)
    found = {"trained": ended(loop.run), "off": off(model, by_hand(CASE), CASE.model())}
    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    alone = {"device_mesh": both, "shard": False, "seed": 3}
    model, loop = prepared(CASE, 0, **alone)
    found["copies"] = [ended(loop.run), off(model, by_hand(CASE), CASE.model())]
    found["over both"] = ended(lambda: prepared(CASE, 0, **{**alone, "shard": True}, mesh=mesh))
    found["apart"] = ended(lambda: prepared(Case(target=8 + rank), 0, **alone))
    found["folder"] = ended(lambda: prepared(CASE, 0, **alone, checkpoint="run"))
    found["no seed"] = ended(lambda: prepared(CASE, 0, **{**alone, "seed": None}))
    none = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    found["no data"] = ended(lambda: prepared(CASE, rank, device_mesh=none))
    found["both"] = ended(lambda: prepared(CASE, rank, device_mesh=mesh, group=torch.distributed.group.WORLD))
    found["none"] = ended(lambda: prepared(CASE, rank, device_mesh="dp"))
    return found


def work(rank, folder):
    with grouped(rank, 2, folder):
        found = {"probe": probed(rank)}
        report = autoaccum.verify(sharded(Net()), tokens(), loss=nn.CrossEntropyLoss())
        wrong = autoaccum.verify(sharded(Net()), tokens(), loss=nn.CrossEntropyLoss(), reduction="sample_mean")
        found["verify"] = [report.ok, report.relative_error, wrong.ok, wrong.relative_error, wrong.cause]
        model, loop = prepared(CASE, rank, val_data=tokens(7))
        said = ended(loop.run)
        found["fit"] = [said, off(model, by_hand(CASE), CASE.model()), loop.evaluations[0]["loss"]]
        ids, labels = tokens(7)
        found["validation"] = nn.functional.cross_entropy(by_hand(CASE).eval()(ids), labels).item()
        found["memory in forward"] = injected(CASE, rank, 1, "forward", 6, torch.OutOfMemoryError)
        found["memory in backward"] = injected(CASE, rank, 0, "backward", 6, torch.OutOfMemoryError)
        found["an error"] = injected(CASE, rank, 1, "backward", 7, KeyError)
        found["mesh"] = over_meshes(rank)
        found["compile"] = ended(lambda: prepared(CASE, rank, compile=True))
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session")
    started(work, 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_each_rank_forecasts_its_own_peaks_to_the_byte_and_the_limit_is_the_true_one(found):
    for each in (rank["probe"] for rank in found):
        assert each["errors"] == [0] * len(each["errors"])
        assert each["kinds"][-1] == "verify"
        assert each["over"]
        assert each["within"]
        assert each["left"]


def test_ranks_with_unequal_memory_take_unequal_shares_of_one_plan(found):
    first, second = (rank["probe"] for rank in found)
    assert first["limit"] < second["limit"]
    assert first["limits"] == second["limits"]
    assert max(first["sizes"]) < max(second["sizes"])


def test_the_check_passes_what_is_right_and_refuses_what_is_not_on_all_ranks_alike(found):
    ok, error, wrong_ok, wrong_error, cause = found[0]["verify"]
    assert ok
    assert error <= EXACT
    assert not wrong_ok
    assert wrong_error > 1e-3
    assert cause is not None
    assert found[1]["verify"] == found[0]["verify"]


def test_a_fit_ends_where_the_whole_batch_does_and_validates_all_samples_once(found):
    for each in found:
        said, far, loss = each["fit"]
        assert said == "ended well"
        assert far <= EXACT
        assert loss == pytest.approx(each["validation"], rel=1e-9)


@pytest.mark.parametrize(("where", "limits"), [("memory in forward", (4, 1)), ("memory in backward", (2, 2))])
def test_a_rank_that_runs_out_of_memory_in_a_pass_finishes_it_and_all_replay(found, where, limits):
    for each in found:
        said, far, _, left = each[where]
        assert said == "ended well"
        assert far <= EXACT
        assert tuple(left) == limits


def test_any_other_error_in_a_pass_ends_all_ranks_at_the_vote(found):
    assert found[1]["an error"][0].startswith("KeyError")
    assert "rank 1 of 2 failed" in found[0]["an error"][0]


def test_a_mesh_says_which_ranks_train_together(found):
    for each in (rank["mesh"] for rank in found):
        assert each["trained"] == "ended well"
        assert each["off"] <= EXACT
        assert each["copies"][0] == "ended well"
        assert each["copies"][1] <= EXACT
        assert "shard it along the dimension of data alone" in each["over both"]
        assert "target_batch: rank 0 has 8, rank 1 has 9" in each["apart"]
        assert "all of them would write to it" in each["folder"]
        assert "seed= is not given" in each["no seed"]
        assert "the dimensions tp, of which 0 are of data" in each["no data"]
        assert "give one of them" in each["both"]
        assert "'dp' is no DeviceMesh" in each["none"]


def test_what_is_not_there_for_sharded_models_is_refused_by_name(found):
    assert found[0]["compile"].startswith(f"{SetupError.__name__}: compile is not supported")


def work_of_copies(rank, folder):
    """Two copies, each over two ranks of unequal limits: sharded along the dimension of data, and replicated."""
    from torch.distributed.device_mesh import init_device_mesh

    with grouped(rank, 4, folder):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        found = []
        for shard in (True, False):
            case = Case(limits=(4, 2), count=31, clip=0.05)
            model, loop = prepared(case, rank // 2, mesh=mesh["dp"], shard=shard, device_mesh=mesh, seed=3)
            found.append([ended(loop.run), off(model, by_hand(case), case.model()),
                          [record.noise_scale for record in loop.history], list(loop.plan.micro_batches)])  # fmt: skip
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_along_a_dimension_that_is_not_datas_have_the_same_samples(tmp_path):
    started(work_of_copies, 4, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    for said, far, *_ in (each for rank in found for each in rank):
        assert said == "ended well"
        assert far <= EXACT
    assert found[0] == found[1]  # of one row of the mesh: the same samples
    assert found[2] == found[3]
    assert [each[-1] for each in found[0]] != [each[-1] for each in found[2]]  # their limits differ


@pytest.mark.slow
def test_errors_at_every_block_and_collective_on_every_rank_end_all_ranks_soon():
    """A fifth of them; AUTOACCUM_TEST_EVERY=1 is all of them, and AUTOACCUM_TEST_RANKS=4 more ranks."""
    every, ranks = (
        int(os.environ.get(f"AUTOACCUM_TEST_{name}", usual)) for name, usual in (("EVERY", 5), ("RANKS", 2))
    )
    figures = torture.run(0, size=ranks, every=every)
    assert figures["failures"] == []
    assert figures["injections"] > 100 / every
    assert figures["ended well"] > 0


@pytest.mark.slow
def test_errors_at_random_places_of_a_pass_are_survived_and_leave_nothing_behind():
    figures = torture.run(30)
    assert figures["failures"] == []
    assert figures["injections"] == 30
    assert figures["ended well"] > 0


@pytest.mark.slow
def test_errors_on_a_mesh_of_two_dimensions_end_all_four_ranks_as_well():
    figures = torture.run(16, size=4, replicas=2)
    assert not figures["failures"], figures

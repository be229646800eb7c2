"""Ranks: two real processes over gloo, started once; each test looks at what they found. And a single process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoaccum import ranks
from autoaccum.errors import AutoaccumError, SetupError
from autoaccum.model.precision import SideBuffers
from autoaccum.ranks import joining, together
from autoaccum.window.rank_sum import RankSum
from tests.ranks_started import started

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


def gradients_of(rank: int) -> list[Tensor]:
    """Gradients that try what sum_gradients must manage; each is a known function of the rank."""
    generator = torch.Generator().manual_seed(rank)
    random = lambda *shape, dtype=torch.float64: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    dense = [
        random(3, 4),
        random(5),
        random(2, 2, dtype=torch.float32),
        random(10, 2).T if rank else random(2, 10),
        random(0),
        random(()),
    ]
    dense.append(random(300))  # larger than the bucket that the test sets, and reduced where it lies
    dense.append(random(20, 15).T)  # as large, and with gaps
    return [*dense, *(random(4).bfloat16() for _ in range(2))]


# Gradients of one parameter of shape (6, 2) on each rank: None, "dense", or the rows of a sparse one.
KINDS: list[tuple[Any, Any]] = [
    ([1, 1, 3], [1, 4, 5]),  # a row twice, one in common, unequally many
    ("dense", [2]),
    ([1, 3], None),
    ([], []),
    ("dense", None),
    (None, None),
    (None, "dense"),
]


def parameters_of(rank: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(10 + rank)
    found = []
    for kinds in KINDS:
        parameter, kind = nn.Parameter(torch.zeros(6, 2, dtype=torch.float64)), kinds[rank]
        if kind == "dense":
            parameter.grad = torch.randn(6, 2, generator=generator, dtype=torch.float64)
        elif kind is not None:
            values = torch.randn(len(kind), 2, generator=generator, dtype=torch.float64)
            at = torch.tensor([kind], dtype=torch.int64)
            parameter.grad = torch.sparse_coo_tensor(at, values, (6, 2), check_invariants=True)
        found.append(parameter)
    return found


def failure(ask) -> str:
    try:
        ask()
    except AutoaccumError as error:
        return str(error)
    return ""


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    here = ranks.here()
    found: dict[str, object] = {"place": (here.rank, here.size)}

    messages = []
    real = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (messages.append(1), real(*args, **kwargs))[1]
    found["tally"] = here.tally("a test", [1 + rank, 0.1, 2.0**60])
    found["messages"] = len(messages)
    dist.all_reduce = real
    found["tally of nothing"] = here.tally("a test")
    found["any"] = [
        here.any("a test", rank == 1),
        here.any("a test", rank == 0),
        here.any("a test", False),
        here.any("a test", True),
    ]
    found["gather"] = here.gather("a test", 10**15 + rank)

    found["broadcast"] = [
        here.broadcast("a test", torch.arange(6, dtype=torch.int64).view(2, 3).T + rank),
        here.broadcast("a test", torch.tensor([rank == 0, rank == 1])),
        here.broadcast("a test", torch.full((2,), float(rank), requires_grad=True)).detach(),
    ]

    together.BUCKET_BYTES, together.LARGE_BYTES = 128, 2000
    gradients = gradients_of(rank)
    before = [id(gradient) for gradient in gradients]
    here.sum("a test", gradients)
    found["gradients"] = gradients
    found["in place"] = before == [id(gradient) for gradient in gradients]
    here.sum("a test", [])

    parameters = parameters_of(rank)
    summed = RankSum(here, parameters, SideBuffers([]))
    summed.ready()
    found["layouts"] = here.gather("a test", summed.layout)
    summed.level("a test")
    here.tally("a test")
    summed.run()
    found["levelled"] = [parameter.grad for parameter in parameters]

    # Each rank fails once, while the other one asks something else; the group goes on afterwards.
    first = lambda: here.meet("a test", failed=True) if rank == 1 else here.any("a test", True)  # noqa: E731
    second = lambda: here.meet("another", [1.0, 2.0], failed=True) if rank == 0 else here.gather("a test", 3)  # noqa: E731
    found["failures"] = [failure(first), failure(second), failure(lambda: here.meet("a test", failed=True))]
    found["afterwards"] = here.tally("a test", [1.0])
    found["too many"] = failure(lambda: here.tally("a test", [0.0] * 257))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = Path(tmp_path_factory.mktemp("ranks"))
    started(work, 2, folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_rank_knows_its_place(found):
    assert [each["place"] for each in found] == [(0, 2), (1, 2)]


def test_a_tally_sums_over_ranks_in_double_precision(found):
    assert found[0]["tally"] == found[1]["tally"] == [3.0, 0.2, 2.0**61]
    assert found[0]["tally of nothing"] == []


def test_a_tally_is_one_message(found):
    assert found[0]["messages"] == found[1]["messages"] == 1


def test_any_is_true_where_one_rank_says_so(found):
    assert found[0]["any"] == found[1]["any"] == [True, True, False, True]


def test_gather_keeps_every_digit_of_a_byte_count(found):
    assert found[0]["gather"] == found[1]["gather"] == [10**15, 10**15 + 1]


def test_broadcast_gives_every_rank_what_rank_0_has(found):
    expected = [torch.arange(6).view(2, 3).T, torch.tensor([True, False]), torch.zeros(2)]
    for each in found:
        for got, want in zip(each["broadcast"], expected, strict=True):
            assert torch.equal(got, want)


def test_gradients_are_summed_in_place_over_ranks_whatever_their_layout(found):
    ours = [gradients_of(rank) for rank in range(2)]
    for rank, each in enumerate(found):
        assert each["in place"]
        for got, mine, *parts in zip(each["gradients"], ours[rank], *ours, strict=True):
            total = sum(part.to_dense().double() for part in parts)
            tolerance = 0.02 if got.dtype == torch.bfloat16 else 1e-6
            assert got.dtype == mine.dtype
            assert torch.allclose(got.to_dense().double(), total, rtol=tolerance, atol=tolerance)


def test_ranks_with_other_kinds_of_gradients_are_brought_to_one(found):
    """What one rank lacks is zero there; sparse where all are; what a rank has dense is dense on all."""
    assert len(set(found[0]["layouts"])) == 2
    parts = [[p.grad for p in parameters_of(rank)] for rank in range(2)]
    sparse = [True, False, True, True, False, None, False]
    for each in found:
        for got, is_sparse, *ours in zip(each["levelled"], sparse, *parts, strict=True):
            there = [part.to_dense() for part in ours if part is not None]
            assert (None if got is None else got.is_sparse) is is_sparse
            assert got is None if not there else torch.allclose(got.to_dense(), sum(there), rtol=1e-12)


def test_a_sparse_sum_has_the_rows_of_all_ranks_and_no_others(found):
    for each in found:
        rows = [each["levelled"][at].coalesce().indices()[0].tolist() for at in (0, 2, 3)]
        assert rows == [[1, 3, 4, 5], [1, 3], []]


def test_the_others_raise_and_name_the_rank_that_failed_whatever_they_asked(found):
    assert "rank 1 of 2 failed, so rank 0 stops" in found[0]["failures"][0]
    assert found[1]["failures"][0] == ""
    assert "rank 0 of 2 failed, so rank 1 stops" in found[1]["failures"][1]
    assert found[0]["failures"][1] == ""


def test_no_rank_raises_for_another_where_all_failed(found):
    assert found[0]["failures"][2] == found[1]["failures"][2] == ""


def test_a_failure_leaves_the_group_in_step(found):
    assert found[0]["afterwards"] == found[1]["afterwards"] == [2.0]


def test_more_numbers_than_a_message_holds_are_refused(found):
    assert "257 numbers" in found[0]["too many"]
    assert issubclass(SetupError, AutoaccumError)


def test_a_single_process_answers_for_itself():
    alone = ranks.here()
    tensor = torch.ones(2)
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.tally("a test", [1, 2.5]) == [1.0, 2.5]
    assert alone.meet("a test", [1], 3, failed=True) == ([1.0], [3.0])
    assert (alone.any("a test", True), alone.any("a test", False)) == (True, False)
    assert alone.gather("a test", 7) == [7]
    assert alone.broadcast("a test", tensor) is tensor
    alone.sum("a test", [tensor])
    assert torch.equal(tensor, torch.ones(2))


def test_small_messages_go_where_the_backend_takes_them():
    assert joining._meeting_place("cpu:gloo,cuda:gloo", None) == torch.device("cpu")
    assert joining._meeting_place("cpu:gloo,cuda:nccl", torch.device("cuda", 1)) == torch.device("cpu")
    assert joining._meeting_place("cuda:nccl", torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_without_a_word_nccl_meets_on_the_current_gpu_or_the_local_ranks(monkeypatch):
    gpus = SimpleNamespace(current_device=lambda: 0, device_count=lambda: 4)
    monkeypatch.setattr(torch, "cuda", gpus)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert joining._meeting_place("cuda:nccl", None) == torch.device("cuda", 3)
    gpus.current_device = lambda: 2
    assert joining._meeting_place("cuda:nccl", None) == torch.device("cuda", 2)
    gpus.current_device, gpus.device_count = lambda: 0, lambda: 1  # each process is shown its own GPU only
    assert joining._meeting_place("cuda:nccl", None) == torch.device("cuda", 0)


def test_buckets_hold_up_to_their_size_and_at_least_one_gradient():
    sizes = [10, 20, 4, 0, 200, 1, 31]
    gradients = [torch.zeros(size, dtype=torch.float32) for size in sizes]
    buckets = together._buckets([torch.zeros(0), *gradients])
    assert [[g.numel() for g in bucket] for bucket in buckets] == [[0, *sizes]]
    large = [torch.zeros(together.BUCKET_BYTES // 4, dtype=torch.float32), torch.zeros(1), torch.zeros(1)]
    assert [len(bucket) for bucket in together._buckets(large)] == [1, 2]


def test_ranks_meet_by_gloo_where_the_driver_is_too_old_for_the_gpus_it_counts(monkeypatch):
    began = []
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", began.append)
    monkeypatch.setattr(joining, "_init", began.append)
    monkeypatch.setattr(joining.atexit, "register", lambda function: None)
    joining.join()
    assert began == ["gloo"]

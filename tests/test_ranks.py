"""Ranks: two real processes over gloo, started once; each test looks at what they found. And a single process."""

import multiprocessing as mp
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from autoaccum import ranks
from autoaccum.errors import AutoaccumError, SetupError

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
    dense.append(random(300))  # larger than the bucket that the test sets
    halves = [random(4).bfloat16() for _ in range(2)]

    def sparse(rows: list[int]) -> Tensor:
        indices = torch.tensor([rows], dtype=torch.int64)
        return torch.sparse_coo_tensor(indices, random(len(rows), 2), (6, 2), check_invariants=True)

    both_sparse = sparse([1, 1, 3] if rank == 0 else [1, 4, 5])  # a row twice, one in common, unequally many
    one_sparse = sparse([2]) if rank else random(6, 2)
    missing = torch.zeros(6, 2, dtype=torch.float64) if rank else sparse([1, 3])
    none_at_all = sparse([])
    return [*dense, *halves, both_sparse, one_sparse, missing, none_at_all]


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
    found["tally"] = here.tally([1 + rank, 0.1, 2.0**60])
    found["messages"] = len(messages)
    dist.all_reduce = real
    found["tally of nothing"] = here.tally()
    found["any"] = [here.any(rank == 1), here.any(rank == 0), here.any(False), here.any(True)]
    found["gather"] = here.gather(10**15 + rank)

    found["broadcast"] = [
        here.broadcast(torch.arange(6, dtype=torch.int64).view(2, 3).T + rank),
        here.broadcast(torch.tensor([rank == 0, rank == 1])),
        here.broadcast(torch.full((2,), float(rank), requires_grad=True)).detach(),
    ]

    ranks.BUCKET_BYTES = 128
    gradients = gradients_of(rank)
    before = [id(gradient) for gradient in gradients]
    here.sum_gradients(gradients)
    found["gradients"] = gradients
    found["in place"] = before == [id(gradient) for gradient in gradients]
    found["rows stepped"] = [gradients[i].coalesce().indices()[0].tolist() for i in (9, 12)]
    here.sum_gradients([])

    # Each rank fails once, while the other one asks something else; the group goes on afterwards.
    first = lambda: here.tally(failed=True) if rank == 1 else here.any(True)  # noqa: E731
    second = lambda: here.tally([1.0, 2.0], failed=True) if rank == 0 else here.gather(3)  # noqa: E731
    found["failures"] = [failure(first), failure(second), failure(lambda: here.tally(failed=True))]
    found["afterwards"] = here.tally([1.0])
    found["too many"] = failure(lambda: here.tally([0.0] * 65))
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = Path(tmp_path_factory.mktemp("ranks"))
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
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
            assert got.layout == mine.layout
            assert got.dtype == mine.dtype
            assert torch.allclose(got.to_dense().double(), total, rtol=tolerance, atol=tolerance)


def test_a_sparse_sum_has_the_rows_of_all_ranks_and_no_others(found):
    assert found[0]["rows stepped"] == found[1]["rows stepped"] == [[1, 3, 4, 5], []]


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
    assert "65 numbers" in found[0]["too many"]
    assert issubclass(SetupError, AutoaccumError)


def test_a_single_process_answers_for_itself():
    alone = ranks.here()
    tensor = torch.ones(2)
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.tally([1, 2.5]) == [1.0, 2.5]
    assert alone.tally([1], failed=True) == [1.0]
    assert (alone.any(True), alone.any(False)) == (True, False)
    assert alone.gather(7) == [7]
    assert alone.broadcast(tensor) is tensor
    alone.sum_gradients([tensor])
    assert torch.equal(tensor, torch.ones(2))


def test_small_messages_go_where_the_backend_takes_them():
    assert ranks._meeting_place("cpu:gloo,cuda:gloo", None) == torch.device("cpu")
    assert ranks._meeting_place("cpu:gloo,cuda:nccl", torch.device("cuda", 1)) == torch.device("cpu")
    assert ranks._meeting_place("cuda:nccl", torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_without_a_word_nccl_meets_on_the_current_gpu_or_the_local_ranks(monkeypatch):
    gpus = SimpleNamespace(current_device=lambda: 0, device_count=lambda: 4)
    monkeypatch.setattr(torch, "cuda", gpus)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert ranks._meeting_place("cuda:nccl", None) == torch.device("cuda", 3)
    gpus.current_device = lambda: 2
    assert ranks._meeting_place("cuda:nccl", None) == torch.device("cuda", 2)
    gpus.current_device, gpus.device_count = lambda: 0, lambda: 1  # each process is shown its own GPU only
    assert ranks._meeting_place("cuda:nccl", None) == torch.device("cuda", 0)


def test_buckets_hold_up_to_their_size_and_at_least_one_gradient():
    sizes = [10, 20, 4, 0, 200, 1, 31]
    gradients = [torch.zeros(size, dtype=torch.float32) for size in sizes]
    buckets = ranks._buckets([torch.zeros(0), *gradients])
    assert [[g.numel() for g in bucket] for bucket in buckets] == [[0, *sizes]]
    large = [torch.zeros(ranks.BUCKET_BYTES // 4, dtype=torch.float32), torch.zeros(1), torch.zeros(1)]
    assert [len(bucket) for bucket in ranks._buckets(large)] == [1, 2]

"""Pooled statistics on a GPU: SyncBatchNorm over two ranks that share one GPU, CUDA graphs, autocast.

SyncBatchNorm refuses CPU tensors, and NCCL refuses two ranks on one GPU: gloo carries CUDA tensors, so it serves here.
"""

import multiprocessing as mp

import pytest
import torch
import torch.distributed as dist
from torch import nn

from autoaccum.ranks import here
from tests.norms import pooled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = ((5, 2, 3), (1, 4, 2))


def data(rank, sizes=(6, 5)):
    torch.manual_seed(rank)
    return [torch.randn(size, 3, 4, 4, device="cuda") * (1 + rank) + 10 * rank + at for at, size in enumerate(sizes)]


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3, momentum=0.4), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).cuda()


def assert_first_layer(model, whole):
    torch.testing.assert_close(model[0].running_mean, whole[0].running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].running_var, whole[0].running_var, rtol=1e-5, atol=1e-5)
    assert model[0].num_batches_tracked == whole[0].num_batches_tracked


def work(rank, folder):
    torch.cuda.set_device(0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(layers())
    with pooled(model) as statistics:
        assert statistics.synchronised
        statistics.begin(1)
        for micro in data(rank, SIZES[rank]):
            model(micro.requires_grad_()).sum().backward()
        statistics.commit(here())
    torch.save({name: value.cpu() for name, value in model.state_dict().items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_sync_batch_norm_over_two_ranks_is_one_update_with_the_whole_batch(tmp_path):
    context = mp.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    whole = layers()
    whole(torch.cat([micro for rank in range(2) for micro in data(rank, SIZES[rank])]))
    for rank in range(2):
        model = layers()
        model.load_state_dict(torch.load(tmp_path / f"{rank}.pt"))
        assert_first_layer(model, whole)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("autocast", [False, True])
def test_cudnn_and_native_kernels_leave_the_statistics_that_are_pooled(autocast, memory_format):
    whole, model = layers().to(memory_format=memory_format), layers().to(memory_format=memory_format)
    micros = [micro.to(memory_format=memory_format) for micro in data(1)]
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast), pooled(model) as statistics:
        whole(torch.cat(micros))
        statistics.begin(1)
        for micro in micros:
            model(micro).sum().backward()
        statistics.commit(here())
    assert_first_layer(model, whole)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_model_is_pooled_with_and_without_cuda_graphs(mode):
    torch.compiler.reset()
    whole, model = layers(), layers()
    compiled = torch.compile(model, mode=mode)
    with pooled(model) as statistics:
        for seed in range(4):  # the later windows replay what the first ones recorded
            micros = data(seed, (6, 6))
            whole(torch.cat(micros))
            statistics.begin(1)
            for micro in micros:
                torch.compiler.cudagraph_mark_step_begin()
                compiled(micro).sum().backward()
            statistics.commit(here())
            assert_first_layer(model, whole)


def test_a_window_waits_for_the_device_not_once():
    model = layers()
    micros = data(0)
    with pooled(model) as statistics:
        for warm in (False, True):  # the first makes the factors
            statistics.begin(1)
            for micro in micros:
                model(micro)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if warm else "default")
            try:
                statistics.commit(here())
                statistics.begin(1)
                model(micros[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            statistics.discard()

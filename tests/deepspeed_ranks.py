"""What torchrun starts: `-m tests.deepspeed_ranks FOLDER`: each rank trains under ZeRO 0 to 3, figures go to FOLDER.

Windows of 8 of 21 samples in micro-batches of at most 2: 4 + 4, 4 + 4, and a tail of 3 + 2, in which the second rank
has a micro-batch less. Of the targets a fifth is ignored, and all those of one micro-batch.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

__all__ = ["EPOCHS", "LR", "STAGES", "TARGET", "X", "Y", "loss", "net"]

TARGET, EPOCHS, LR, STAGES = 8, 2, 0.1, (0, 1, 2, 3)
torch.manual_seed(0)
X, Y = torch.randn(21, 6), torch.randint(0, 5, (21,))
Y[::5] = -100
Y[2:4] = -100


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def loss(outputs, targets):
    return cross_entropy(outputs, targets)


def train(stage):
    import deepspeed

    import autoaccum

    # Sends small tensors through shared memory, and would be compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_ccl_comm"] = False
    module = net()
    config = {
        "train_micro_batch_size_per_gpu": 2, "managed_gradient_accumulation": False, "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, "overlap_comm": False}, "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }  # fmt: skip
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    plan = autoaccum.plan(2, TARGET, world_size=ranks, rank=rank)
    accumulator = autoaccum.integrations.deepspeed.EngineAccumulator(
        engine, plan, reduction=lambda batch: (batch[1] != -100).sum()
    )
    losses = []
    for _ in range(EPOCHS):
        for start in range(0, len(X), TARGET):
            x, y = X[start : start + TARGET], Y[start : start + TARGET]
            first, last = plan.share(len(x))
            for inputs, targets in accumulator.window((x[first:last], y[first:last])):
                accumulator.backward(loss(engine(inputs), targets))
            losses.append(accumulator.last.loss)
    with deepspeed.zero.GatheredParameters(list(module.parameters()), enabled=stage == 3):
        weights = torch.cat([parameter.detach().flatten().clone() for parameter in module.parameters()])
    return {"weights": weights, "losses": losses, "steps": accumulator.last.step, "samples": accumulator.last.samples}


def main():
    torch.set_num_threads(1)
    found = {stage: train(stage) for stage in STAGES}
    torch.save(found, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

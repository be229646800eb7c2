"""What each of two ranks does for test_ranks_training.py: trainings one after another, whose ends are written down.

Every training is float64, with SGD and momentum, so that its end can be compared with the whole batch's on one process.
"""

import atexit
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset

import autoaccum
from autoaccum.errors import AutoaccumError

__all__ = ["CASES", "Case", "by_hand", "data", "errors", "train", "work"]

INPUTS, CLASSES, IGNORED = 6, 5, -100


def data(count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, a label a place (3 places, unequally many ignored), and a flag that few samples have."""
    chance = torch.Generator().manual_seed(1)
    x = torch.randn(40, INPUTS, dtype=torch.float64, generator=chance)
    y = torch.randint(0, CLASSES, (40, 3), generator=chance)
    y[::2, 1:] = IGNORED
    y[4:8] = IGNORED
    flag = torch.zeros(40, dtype=torch.float64)
    flag[[1, 14]] = 1.0
    return x[:count], y[:count], flag[:count]


class Net(nn.Module):
    """Logits of shape (samples, classes, 3); a branch for flagged samples; a layer that is never used."""

    def __init__(self, seed: int = 0, *, norm: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm: nn.Module = nn.BatchNorm1d(INPUTS) if norm else nn.Identity()
        self.first, self.last = nn.Linear(INPUTS, 12), nn.Linear(12, CLASSES * 3)
        self.branch, self.never = nn.Linear(INPUTS, CLASSES * 3), nn.Linear(2, 2)
        self.drop = nn.Dropout(drop)
        self.double()

    def forward(self, x: Tensor, flag: Tensor | None = None) -> Tensor:
        self.norm(x)  # its output would differ with the micro-batches, its statistics must not
        y = self.last(self.drop(torch.tanh(self.first(x))))
        if flag is not None and bool(flag.any()):
            y = y + self.branch(x) * flag[:, None]
        return y.unflatten(1, (CLASSES, 3))


class Words(nn.Module):
    """A sparse embedding, of which each sample uses one row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, CLASSES * 3, sparse=True).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.embed((x[:, 0].abs() * 5).long().clamp(max=10)).unflatten(1, (CLASSES, 3))


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)


def plain_sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr)  # weight decay would make a sparse gradient dense


def sparse_adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SparseAdam(parameters, lr=lr)


@dataclasses.dataclass(frozen=True)
class Case:
    """One training, and how the ranks' limits differ."""

    target: int = 8
    limits: tuple[int, int] = (3, 3)
    count: int = 40
    model: Callable[[], nn.Module] = Net
    optimizer: Callable[..., torch.optim.Optimizer] = sgd
    loss: Any = dataclasses.field(default_factory=nn.CrossEntropyLoss)
    flagged: bool = False
    clip: float | None = None
    stream: bool = False
    wrapped: bool = False
    own_mean: bool = False
    """The step says its denominator only once it has run."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Inputs, flags where they are used, and labels last."""
        x, y, flag = data(self.count)
        if self.optimizer is sparse_adam:
            # It steps the rows that a gradient names, also by 0: those of ignored samples would differ.
            y = y.clamp(min=0)
        return (x, flag, y) if self.flagged else (x, y)


CASES = {
    "equal": Case(),
    "unequal limits": Case(target=10, limits=(5, 2)),
    "unequal limits, more micro-batches on one": Case(target=11, limits=(8, 1)),
    "a branch in one micro-batch": Case(flagged=True),
    "short tail": Case(count=19),
    "an idle rank in the tail": Case(count=17),
    "a window of one sample": Case(target=1, limits=(1, 1), count=5),
    "BatchNorm": Case(model=functools.partial(Net, norm=True), limits=(5, 2)),
    "BatchNorm and an idle rank": Case(model=functools.partial(Net, norm=True), count=18, limits=(2, 2)),
    "BatchNorm and one sample left over": Case(model=functools.partial(Net, norm=True), count=17, limits=(3, 3)),
    "class weights": Case(loss=nn.CrossEntropyLoss(weight=torch.linspace(0.1, 4, CLASSES, dtype=torch.float64))),
    "clipped": Case(clip=0.05),
    "a stream": Case(count=19, stream=True),
    "already wrapped": Case(wrapped=True),
    "a denominator known late": Case(own_mean=True, count=19),
    "sparse embedding": Case(model=Words, count=17, optimizer=plain_sgd),
    "sparse embedding, SparseAdam": Case(model=Words, count=17, optimizer=sparse_adam),
}


class Stream(IterableDataset):
    """Samples without a length."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter(zip(*self.tensors))


def own_mean(model: nn.Module, batch: Any) -> autoaccum.Mean:
    """Cross-entropy with the denominator that it has counted itself."""
    *inputs, y = batch
    total = nn.functional.cross_entropy(model(*inputs), y, reduction="sum")
    return autoaccum.Mean(total, (y != IGNORED).sum())


def train(case: Case, rank: int = 0, size: int = 1, **more: Any) -> tuple[nn.Module, autoaccum.FitResult]:
    """The case through `fit`."""
    model = case.model()
    settings: dict[str, Any] = {
        "loss": None if case.own_mean else case.loss, "step": own_mean if case.own_mean else None,
        "target_batch": case.target, "micro_batch": case.limits[rank] if size > 1 else case.target,
        "optimizer": case.optimizer, "lr": 0.1, "clip_norm": case.clip, "epochs": 2, "shuffle": False,
        "device": "cpu", "progress": False, **more,
    }  # fmt: skip
    wrapped = DistributedDataParallel(model) if case.wrapped and size > 1 else model
    source = settings.pop("data", None) or (Stream(case.tensors) if case.stream else case.tensors)
    result = autoaccum.fit(wrapped, source, **settings)
    return model, result


def by_hand(case: Case) -> nn.Module:
    """The whole batch at once, in a loop without autoaccum; windows in which nothing counts are passed over."""
    model = case.model()
    optimizer = case.optimizer(model.parameters(), lr=0.1)
    tensors = case.tensors
    starts = list(range(0, case.count, case.target))
    if case.count % case.target == 1 and isinstance(getattr(model, "norm", None), nn.BatchNorm1d):
        starts.pop()  # one sample cannot be normalised: it goes with the window before it
    for start in starts * 2:
        stop = case.count if start == starts[-1] else start + case.target
        *inputs, y = (tensor[start:stop] for tensor in tensors)
        outputs = model(*inputs)
        if bool((y == IGNORED).all()):
            continue
        case.loss(outputs, y).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


# --- what goes wrong on one rank --------------------------------------------------------------------------------------


class Broken(Exception):
    """What a person's own code raises."""


class Failing(Net):
    """Raises in its n-th training forward, or while it is normalised, on one rank."""

    def __init__(self, at: int, **more: Any) -> None:
        super().__init__(**more)
        self.left = at

    def forward(self, x: Tensor, flag: Tensor | None = None) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise Broken("the model's own error")
        return super().forward(x, flag)


class FailingOptimizer(torch.optim.SGD):
    """Raises in its second step, on a rank that is bad."""

    steps = 0
    bad = False

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        if self.steps == 2 and self.bad:
            raise Broken("the optimizer's own error")
        return super().step(closure)


class FailingData(Dataset):
    """Raises at one sample."""

    def __init__(self, bad: int | None) -> None:
        self.tensors, self.bad = data(), bad

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            raise Broken("the data's own error")
        return self.tensors[0][index], self.tensors[1][index]


def _raise_at(name: str, step: int) -> Callable[[Any], None]:
    def listen(event: Any) -> None:
        if event.name == name and getattr(getattr(event, "record", None), "step", step) == step:
            raise Broken(f"the callback's own error at {name}")

    return listen


def errors(rank: int) -> dict[str, Callable[[], Any]]:
    """What fails on rank 1 alone (the last one on rank 0): each must end on both."""
    bad = rank == 1
    run = functools.partial(train, Case(), rank, 2)
    norm = functools.partial(Net, norm=True)
    failing = Case(model=(lambda: Failing(7)) if bad else Net)
    FailingOptimizer.bad = bad
    broken_step = Case(model=norm, optimizer=FailingOptimizer)
    return {
        "forward": lambda: train(failing, rank, 2, check=False),
        "optimizer": lambda: train(broken_step, rank, 2),
        "data": lambda: run(data=FailingData(30 if bad else None)),
        "callback": lambda: run(callbacks=[_raise_at("step", 3)] if bad else []),
        "callback at the end of an epoch": lambda: run(callbacks=[_raise_at("epoch", 0)] if bad else []),
        "argument": lambda: run(lr=-1.0 if bad else 0.1),
        "argument that is looked at late": lambda: run(clip_norm=-1.0 if bad else None),
        "model": lambda: train(Case(model=Net if not bad else Words), rank, 2),
        "probe": lambda: autoaccum.probe(
            Net(),
            Case().tensors,
            loss=Case().loss,
            target_batch=8,
            memory=1 if bad else None,
            device="cpu",
            cache=False,
        ),
        # Nothing is accumulated on a rank here, but over the ranks.
        "loss in one micro-batch": lambda: train(Case(limits=(4, 4)), rank, 2, loss=Spread(bad)),
        "loss": lambda: run(loss=Spread(bad)),
        "callback at the start, rank 0": lambda: run(callbacks=[_raise_at("start", 0)] if not bad else []),
    }


class Spread(nn.CrossEntropyLoss):
    """On a rank that is bad a root of a mean, and no mean itself: it is refused."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.square().mean().sqrt() if self.bad else super().forward(outputs, targets)


def failed(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except (AutoaccumError, Broken) as error:
        return f"{type(error).__name__}: {error}"
    return "ended well"


# --- the process ------------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _probed(rank: int) -> list[Any]:
    """A model with SyncBatchNorm, probed and verified with other memory on each rank: nobody may wait for the other."""
    x, y, _ = data()
    model = nn.Sequential(nn.Linear(INPUTS, 8), nn.SyncBatchNorm(8), nn.Linear(8, CLASSES)).double()
    settings = {"loss": nn.CrossEntropyLoss(), "device": "cpu"}
    report = autoaccum.probe(model, (x, y[:, 0].clamp(min=0)), memory=(rank + 1) * 12_000, cache=False, **settings)
    verdict = autoaccum.verify(model, (x, y[:, 0].clamp(min=0)), **settings)
    return [report.limit, verdict.ok, "forward" in vars(model[1])]


def work(rank: int, folder: str) -> None:
    """One of two ranks; writes what it found to a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, Any] = {"cases": {}, "errors": {}}
    for name, case in CASES.items():
        model, result = train(case, rank, 2)
        found["cases"][name] = {
            "state": state(model),
            "records": [(record.samples, record.micro_batches, record.loss) for record in result.history],
        }
    found["another start"] = state(train(Case(model=functools.partial(Net, 5 + rank)), rank, 2)[0])
    found["dropout"] = [_dropped(rank, seed) for seed in (3, 3)]
    found["shuffled"] = _shuffled(rank)
    found["evaluations"] = train(Case(), rank, 2, val_data=data(13)[:2])[1].evaluations
    for name, attempt in errors(rank).items():
        found["errors"][name] = failed(attempt)
    found["probed alone"] = _probed(rank)
    found["afterwards"] = state(train(Case(), rank, 2)[0])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _dropped(rank: int, seed: int) -> tuple[dict[str, Tensor], list[float]]:
    """A run with dropout: its end, and which of its own masks this rank drew (as sums of what was left)."""
    masks: list[float] = []
    case = Case(model=functools.partial(Net, drop=0.5), limits=(4, 4))

    class Watched(Net):
        def __init__(self) -> None:
            super().__init__(drop=0.5)
            self.drop.register_forward_hook(lambda _, __, output: masks.append(float((output == 0).double().sum())))
            self.first.register_forward_hook(lambda *_: None)

    model, _ = train(dataclasses.replace(case, model=Watched), rank, 2, seed=seed, check=False)
    return state(model), masks


def _shuffled(rank: int) -> list[int]:
    """Which samples this rank's model saw in an epoch of a shuffling loader; each rank's generator stands elsewhere."""
    seen: list[int] = []

    class Seeing(Net):
        def forward(self, x: Tensor, flag: Tensor | None = None) -> Tensor:
            if self.training:
                seen.extend(int(value) for value in x[:, -1])
            return super().forward(x)

    x, y, _ = data(30)
    x[:, -1] = torch.arange(30)
    torch.manual_seed(100 + rank)
    loader = DataLoader(list(zip(x, y)), batch_size=4, shuffle=True)
    train(Case(model=Seeing, count=30), rank, 2, data=loader, epochs=1, check=False, lr_rule="none")
    return seen


def threads_of_gloo() -> list[str]:
    """The names of this process's threads that belong to a group."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def under_torchrun(path: str) -> None:
    """A script as people write it: nothing is said of ranks, neither at its start nor at its end."""
    torch.set_num_threads(1)
    # What is registered first is called last.
    atexit.register(lambda: Path(path, f"{os.environ['RANK']}.threads").write_text(f"{threads_of_gloo()}"))
    case = CASES["short tail"]
    model = case.model()
    autoaccum.fit(
        model, case.tensors, loss=case.loss, target_batch=8, max_batch=3, optimizer=sgd, lr=0.1, epochs=2,
        shuffle=False, device="cpu", cache=False, progress=True,
    )  # fmt: skip
    torch.save(state(model), f"{path}/{dist.get_rank()}.pt")


if __name__ == "__main__":
    under_torchrun(sys.argv[1])

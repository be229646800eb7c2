"""Sharded trainings for test_window_sharded.py and others: what each rank does, in float64."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import autoaccum
from autoaccum.loss.objective import Objective
from autoaccum.planning.plan import plan

__all__ = [
    "CASES",
    "Case",
    "Inject",
    "Net",
    "by_hand",
    "grouped",
    "mesh_of",
    "off",
    "sgd",
    "sharded",
    "tokens",
    "trained",
]

WORDS, WIDTH = 23, 12  # 23 rows: shards differ in size


class Inject:
    """Raises an error at the n-th of the places of a kind that the model passes."""

    kind: str | None = None
    count = 0
    error: Callable[[str], Exception] = torch.OutOfMemoryError
    seen: ClassVar[dict[str, int]] = {}

    @classmethod
    def arm(cls, kind: str | None, count: int = 1, error: Callable[[str], Exception] = torch.OutOfMemoryError) -> None:
        cls.kind, cls.count, cls.error, cls.seen = kind, count, error, {}

    @classmethod
    def hit(cls, kind: str) -> None:
        cls.seen[kind] = cls.seen.get(kind, 0) + 1
        if cls.kind == kind:
            cls.count -= 1
            if cls.count == 0:
                cls.kind = None
                raise cls.error(f"injected in {kind}")


class _Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        Inject.hit("backward")
        return gradient


class Block(nn.Module):
    """Some of a transformer, and a branch that only flagged samples take."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)
        self.branch, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(drop)

    def forward(self, x: Tensor, flags: Tensor | None = None) -> Tensor:
        Inject.hit("forward")
        x = _Passing.apply(x)
        x = x + self.drop(self.down(functional.gelu(self.up(self.norm(x)))))
        if flags is not None and bool(flags.any()):
            x = x + self.branch(x) * flags[:, None, None]
        return x


class Net(nn.Module):
    """Logits (samples, words, places) of token ids; the head may be the embedding's weight."""

    def __init__(self, *, tied: bool = False, norm: bool = False, checkpointed: bool = False, flagged: bool = False,
                 drop: float = 0.0, blocks: int = 2) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block(drop) for _ in range(blocks))
        self.norm: nn.Module = nn.BatchNorm1d(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.never = nn.Linear(3, 3)
        if tied:
            self.head.weight = self.words.weight
        self.checkpointed, self.flagged = checkpointed, flagged
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        flags = (ids[:, 0] == 3).double() if self.flagged else None
        for block in self.blocks:
            if self.checkpointed:
                x = torch.utils.checkpoint.checkpoint(block, x, flags, use_reentrant=False)
            else:
                x = block(x, flags)
        self.norm(x.transpose(1, 2))  # statistics are pooled; its output would differ with the micro-batches
        return self.head(x).transpose(1, 2)


def tokens(count: int = 30, places: int = 6) -> tuple[Tensor, Tensor]:
    """Ids and labels, of which unequally many are ignored."""
    chance = torch.Generator().manual_seed(3)
    ids = torch.randint(0, WORDS, (64, places), generator=chance)
    labels = torch.randint(0, WORDS, (64, places), generator=chance)
    for row in range(64):
        labels[row, int(torch.randint(1, places + 1, (1,), generator=chance)) :] = -100
    labels[5:7] = -100
    return ids[:count], labels[:count]


def sgd(parameters: Any, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)


def sharded(model: Net, *, mesh: Any = None, reshard: bool = True, policy: Any = None) -> Net:
    """`fully_shard` on each block and on the whole."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    how = {"mesh": mesh, "reshard_after_forward": reshard, "mp_policy": policy or MixedPrecisionPolicy()}
    for block in model.blocks:
        fully_shard(block, **how)
    fully_shard(model, **how)
    return model


@dataclasses.dataclass(frozen=True)
class Case:
    """One training by the Accumulator, and how the ranks' limits differ."""

    target: int = 10
    limits: tuple[int, ...] = (3, 3)
    count: int = 30
    model: Callable[[], Net] = Net
    clip: float | None = None
    reshard: bool = True
    replicas: int = 1
    adam: bool = False
    late: bool = False

    def plan(self, rank: int, size: int) -> autoaccum.Plan:
        """Of one rank."""
        made = plan(self.limits[:size], self.target, world_size=size, rank=rank, optimizer="sgd")
        return dataclasses.replace(made, gradient_sync="window" if self.late else "micro-batch")

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3) if self.adam else sgd(parameters)


CASES = {
    "equal limits": Case(),
    "unequal limits, a tail smaller than the ranks": Case(limits=(4, 1), count=31),
    "clipped": Case(clip=0.05, limits=(4, 1)),
    "tied": Case(model=functools.partial(Net, tied=True), adam=True),
    "checkpointed": Case(model=functools.partial(Net, checkpointed=True), limits=(1, 3)),
    "kept gathered": Case(reshard=False, limits=(1, 3)),
    "a branch in some samples": Case(model=functools.partial(Net, flagged=True), target=2, limits=(1, 1), count=14),
    "BatchNorm": Case(model=functools.partial(Net, norm=True), limits=(4, 2), count=31),
}
CASES |= {
    f"{name}, summed late": dataclasses.replace(CASES[name], late=True)
    for name in ("unequal limits, a tail smaller than the ranks", "clipped", "checkpointed", "kept gathered",
                 "a branch in some samples")
}  # fmt: skip


def by_hand(case: Case) -> nn.Module:
    """The whole batch at once, in one process."""
    model = case.model()
    optimizer = case.optimizer(model.parameters())
    ids, labels = tokens(case.count)
    for start in range(0, case.count, case.target):
        x, y = ids[start : start + case.target], labels[start : start + case.target]
        (functional.cross_entropy(model(x), y, reduction="sum") / (y >= 0).sum()).backward()
        if case.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def windows(case: Case, made: autoaccum.Plan) -> Iterator[list[Any]]:
    """This rank's micro-batches of each window."""
    ids, labels = tokens(case.count)
    for start in range(0, case.count, case.target):
        size = min(case.target, case.count - start)
        low, _ = made.share(size)
        sizes = made.split(size)
        begin = start + low
        pieces = []
        for own in sizes:
            pieces.append((ids[begin : begin + own], labels[begin : begin + own]))
            begin += own
        yield pieces


@functools.cache  # each one makes process groups, which stay
def mesh_of(replicas: int, size: int) -> Any:
    """The ranks in two dimensions, where several hold the same shard; else None."""
    if replicas == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


def trained(case: Case, rank: int, size: int, policy: Any = None) -> nn.Module:
    """The same training, sharded over the ranks."""
    model = sharded(case.model(), reshard=case.reshard, mesh=mesh_of(case.replicas, size), policy=policy)
    optimizer = case.optimizer(model.parameters())
    made = case.plan(rank, size)
    accumulator = autoaccum.Accumulator(
        model, optimizer, made, objective=Objective(model, loss=nn.CrossEntropyLoss(), reduction="token_mean"),
        clip_norm=case.clip,
    )  # fmt: skip
    for pieces in windows(case, made):
        accumulator.open(pieces)
        accumulator.run(pieces)
        accumulator.finish()
    accumulator.close()
    return model


def off(model: nn.Module, reference: nn.Module, start: nn.Module) -> float:
    """‖update − reference's‖ / ‖reference's‖ over all parameters and buffers; all ranks call this."""
    others, firsts = dict(_tensors(reference)), dict(_tensors(start))
    top = bottom = 0.0
    for name, tensor in _tensors(model):
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        whole = whole.detach()
        top += float((whole.double() - others[name].double()).square().sum())
        bottom += float((others[name].double() - firsts[name].double()).square().sum())
    return (top / bottom) ** 0.5


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    with torch.no_grad():
        return [*model.named_parameters(), *model.named_buffers()]


@contextmanager
def grouped(rank: int, size: int, folder: str) -> Iterator[None]:
    """A gloo group of `size` ranks that meet in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()

"""One training situation, the same for every trainer, and what the whole batch at once would have done in it.

A trainer is given the samples in order, in micro-batches of `micro_batch`, of which `k` make a window; the optimizer
keeps the gradient of each step. The reference is the gradient of the window's samples in one batch, in float64. The
learning rate is 0 unless a problem says otherwise, so that every window sees the same parameters.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

__all__ = ["Gradient", "Problem", "Recorder", "Run", "difference", "positional", "returned"]

Gradient = list[Tensor | None]
"""One entry a parameter, in the model's order; None where it has none."""


class Recorder(torch.optim.SGD):
    """SGD that keeps the gradient which each step was given.

    A closure is run first, as Lightning runs the whole backward pass in it.
    """

    def __init__(self, parameters: Any, lr: float = 0.0, momentum: float = 0.0) -> None:
        super().__init__(parameters, lr=lr, momentum=momentum)
        self.gradients: list[Gradient] = []
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        self.gradients.append([None if p.grad is None else p.grad.detach().to_dense().clone() for p in held])
        self.rates.append(float(self.param_groups[0]["lr"]))
        super().step()
        return loss


@dataclass
class Run:
    """What a trainer did: the gradient of each optimizer step, the trained model, and what else it says."""

    gradients: list[Gradient]
    model: nn.Module
    rates: list[float] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Samples(Dataset):
    """A list of samples, as a map dataset."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Stream(IterableDataset):
    """The same samples, without a length."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return iter(self.samples)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is trained, on what, and how it is cut."""

    model: Callable[[], nn.Module]
    """Builds the model, the same at each call."""
    samples: Sequence[dict[str, Any]]
    """An epoch: mappings with "labels" beside the model's arguments."""
    micro_batch: int = 2
    k: int = 4
    loss: Any = None
    """f(outputs, labels); None: the model returns its loss."""
    denominator: Callable[[Any], float] | None = None
    """What the loss divides by, for people who keep their own loop; None: the samples."""
    summed: Any = None
    """The same loss before the division, where a documented recipe asks for it."""
    step: Any = None
    reduction: Any = "auto"
    """How autoaccum is told what it cannot find out: `fit`'s own keywords."""
    epochs: int = 1
    stream: bool = False
    clip_norm: float | None = None
    collate: Callable[[Any], Any] = default_collate
    lr: float = 0.0
    momentum: float = 0.0
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None
    frequency: int = 1
    """Updates between two steps of the schedule, for a trainer that is told so apart from the schedule."""
    precision: str = "fp32"
    shuffle: bool = False
    seed: int | None = None
    """Given to the trainer as its documentation says, for what is random in training."""
    find_unused: bool = False
    """Whether DistributedDataParallel is told to look for parameters that a forward did not use."""
    save_to: str | None = None
    """A folder for checkpoints, one each update."""
    stop_after: int | None = None
    """Updates after which the training is left, as if the process had ended."""
    resume: bool = False
    """Whether to go on from the folder."""
    recover: bool = False
    """Whether the trainer's own means against out-of-memory errors are switched on, where there are such."""
    options: dict[str, Any] = field(default_factory=dict)
    """More keywords of `fit`."""

    @property
    def target_batch(self) -> int:
        """Samples of a full window on one rank."""
        return self.micro_batch * self.k

    def dataset(self) -> Dataset:
        """The samples as a Dataset."""
        return Stream(self.samples) if self.stream else Samples(self.samples)

    def loader(self) -> DataLoader:
        """The samples in micro-batches, in order unless shuffled."""
        return DataLoader(self.dataset(), batch_size=self.micro_batch, shuffle=self.shuffle, collate_fn=self.collate)

    def optimizer(self, model: nn.Module) -> Recorder:
        """The optimizer that keeps gradients."""
        return Recorder(list(model.parameters()), lr=self.lr, momentum=self.momentum)

    def compute(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of one batch, whole or part, as a person's own loop would compute it."""
        if self.loss is None:
            return returned(model(**batch))
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return positional(self.loss, model(**inputs), batch["labels"])

    def windows(self, world_size: int = 1) -> list[list[dict[str, Any]]]:
        """The samples of each optimizer step there should be, over all ranks."""
        size = self.target_batch * world_size
        epoch = [list(self.samples[start : start + size]) for start in range(0, len(self.samples), size)]
        return epoch * self.epochs

    def whole(self, samples: Sequence[dict[str, Any]]) -> Gradient:
        """The gradient of these samples in one batch."""
        model = self.model()
        self.compute(model, default_collate(list(samples))).backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip_norm)
        return [None if p.grad is None else p.grad.to_dense() for p in model.parameters()]


def returned(outputs: Any) -> Tensor:
    """The loss in what a model returned."""
    return outputs["loss"] if isinstance(outputs, dict) or hasattr(outputs, "loss") else outputs


def positional(loss: Any, outputs: Any, labels: Any) -> Tensor:
    """The loss of outputs and labels; labels that are several tensors are several arguments, as CTC has them."""
    return loss(outputs, *labels) if isinstance(labels, (list, tuple)) else loss(outputs, labels)


def difference(gradient: Gradient, reference: Gradient) -> tuple[float, float]:
    """(‖g − ref‖ / ‖ref‖, ⟨g, ref⟩ / ⟨ref, ref⟩) over all parameters; a gradient that is missing counts as 0."""
    squares = products = norms = 0.0
    for got, want in zip(gradient, reference, strict=True):
        if got is None and want is None:
            continue
        known = want if want is not None else got
        assert known is not None
        a = torch.zeros_like(known) if got is None else got
        b = torch.zeros_like(known) if want is None else want
        a, b = a.double(), b.double()
        squares += float((a - b).square().sum())
        products += float((a * b).sum())
        norms += float(b.square().sum())
    if norms == 0:
        return (0.0, 1.0) if squares == 0 else (math.inf, math.inf)
    return math.sqrt(squares / norms), products / norms

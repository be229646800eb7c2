"""Out-of-memory errors at every place of a window: each update must equal the one of a training left in peace.

A run of three windows has one window in which memory runs out one to three times: in the forward or the backward of
some layer, in some micro-batch, with one of the errors that PyTorch raises for it. In float64 all parameters, pooled
statistics and losses must then agree with the undisturbed run after each window, to 1e-10. The samples of every
window must be those of the undisturbed run, each once.
"""

import gc
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import autoaccum
from autoaccum.training.events import TrainingWarning

__all__ = ["Result", "run"]

SAMPLES, TARGET, WINDOWS = 36, 12, 3
ERRORS: tuple[Callable[[], BaseException], ...] = (
    lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    MemoryError,
    lambda: RuntimeError("std::bad_alloc"),
)


class Watched(nn.Module):
    """Has statistics that see every sample, counts its calls, and remembers which samples it was shown."""

    def __init__(self, body: nn.Module, seen: int) -> None:
        super().__init__()
        self.body = body
        self.statistics = nn.BatchNorm1d(seen)  # of the input: pooled over the window, whatever it was cut into
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.shown: list[int] = []

    def forward(self, number: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        self.shown += number.tolist()
        self.statistics(x.detach().reshape(len(x), -1).double())
        return self.body(x)


def mlp() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    x = torch.randn(SAMPLES, 6, dtype=torch.float64)
    body = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4))
    return body, x, torch.randint(0, 4, (SAMPLES,)), nn.CrossEntropyLoss(weight=torch.rand(4).double() + 0.1)


def convolution() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    x = torch.randn(SAMPLES, 2, 5, 5, dtype=torch.float64)
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    return body, x, torch.randn(SAMPLES, 3, dtype=torch.float64), nn.MSELoss()


class Tagger(nn.Module):
    """A label for each token; its classes stand where cross-entropy wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.GRU(8, 8, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(tokens))[0]).transpose(1, 2)


def tokens() -> tuple[nn.Module, Tensor, Tensor, nn.Module]:
    labels = torch.randint(0, 5, (SAMPLES, 7))
    labels[torch.rand(labels.shape) < 0.5] = -100  # uneven denominators: some samples have no label at all
    labels[3] = -100
    return Tagger(), torch.randint(0, 11, (SAMPLES, 7)), labels, nn.CrossEntropyLoss()


PROBLEMS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor, nn.Module]]] = {
    "mlp": mlp, "convolution": convolution, "tokens": tokens,
}  # fmt: skip


@dataclass(frozen=True)
class Injection:
    """Where memory runs out: in the `call`-th call of the layer in that window, `times` times in a row."""

    window: int
    layer: str
    call: int
    backward: bool
    error: int
    times: int


@dataclass
class Trace:
    """What a run did, window by window."""

    parameters: list[Tensor] = field(default_factory=list)
    statistics: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    samples: list[list[int]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    raised: int = 0


def _trace(problem: str, micro_batch: int, injection: Injection | None) -> Trace:
    torch.manual_seed(7)
    body, x, y, loss = PROBLEMS[problem]()
    model = Watched(body, x[0].numel()).double()
    trace = Trace()
    loop = autoaccum.prepare(
        model, (torch.arange(SAMPLES), x, y), loss=loss, target_batch=TARGET, micro_batch=micro_batch, seed=1,
        device="cpu", check=False, optimizer="adamw", lr=1e-2, clip_norm=0.5,
    )  # fmt: skip
    if injection is not None:
        _inject(model, injection, trace, lambda: len(trace.losses))
    for record in loop:
        trace.parameters.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
        trace.statistics.append(torch.cat([model.statistics.running_mean, model.statistics.running_var]))
        trace.losses.append(record.loss)
        trace.samples.append(sorted(model.shown[-record.samples :]))
        trace.calls.append(int(model.calls))
        trace.micro_batches.append(record.micro_batches)
        model.shown.clear()
    return trace


def _inject(model: Watched, injection: Injection, trace: Trace, window: Callable[[], int]) -> None:
    layer = model.get_submodule(injection.layer)
    calls = [0]

    def due() -> bool:
        if window() != injection.window or trace.raised >= injection.times:
            return False
        calls[0] += 1
        return calls[0] > injection.call

    def fail(*_: Any) -> None:
        calls[0] = 0
        trace.raised += 1
        raise ERRORS[injection.error]()

    def before(module: nn.Module, args: Any) -> None:
        if not injection.backward and due():
            fail()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if injection.backward and tensor.requires_grad and due():
            tensor.register_hook(fail)

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


@dataclass
class Result:
    """How many injections were survived; `failures` says what went wrong with the others."""

    injections: int = 0
    raised: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        survived = self.injections - len(self.failures)
        return {"injections": self.injections, "errors raised": self.raised, "survived": survived,
                "worst relative difference": self.worst, "failures": self.failures[:10]}  # fmt: skip


def run(count: int, seed: int = 0) -> Result:
    """Runs `count` injections at random places, each in a training of its own."""
    gc.freeze()  # every replay collects garbage, and need not look at all of torch each time
    chance = random.Random(seed)
    undisturbed: dict[tuple[str, int], Trace] = {}
    result = Result()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TrainingWarning)
        while result.injections < count:
            problem = chance.choice(list(PROBLEMS))
            micro_batch = chance.choice([5, 6, 7, 12])
            key = problem, micro_batch
            if key not in undisturbed:
                undisturbed[key] = _trace(problem, micro_batch, None)
            torch.manual_seed(0)
            layers = [name for name, module in Watched(PROBLEMS[problem]()[0], 1).named_modules()
                      if name.startswith("body.") and not list(module.children())]  # fmt: skip
            injection = Injection(
                chance.randrange(WINDOWS), chance.choice(layers), chance.randrange(-(-TARGET // micro_batch)),
                # BatchNorm takes no single sample: 4 (of at most 5) can be halved once, 6 twice, and 12 three times.
                chance.random() < 0.5, chance.randrange(len(ERRORS)),
                min(chance.choice([1, 1, 2, 2 + micro_batch // 12]), 1 if micro_batch == 5 else 3),
            )  # fmt: skip
            _compare(undisturbed[key], _trace(problem, micro_batch, injection), f"{key} {injection}", result)
    return result


def _compare(want: Trace, got: Trace, what: str, result: Result) -> None:
    result.injections += 1
    result.raised += got.raised
    pairs = [*zip(want.parameters, got.parameters, strict=True), *zip(want.statistics, got.statistics, strict=True)]
    pairs.append((torch.tensor(want.losses, dtype=torch.float64), torch.tensor(got.losses, dtype=torch.float64)))
    worst = max(_difference(a, b) for a, b in pairs)
    result.worst = max(result.worst, worst)
    # The calls that a buffer counts are those of the attempts that came to their end: none of a failed one.
    counted = [sum(got.micro_batches[: n + 1]) for n in range(WINDOWS)]
    if not got.raised:
        result.failures.append(f"{what}: nothing was raised")
    elif not worst <= 1e-10:
        result.failures.append(f"{what}: off by {worst:.1e}")
    elif want.samples != got.samples:
        result.failures.append(f"{what}: other samples")
    elif got.calls != counted:
        result.failures.append(f"{what}: a buffer kept {got.calls} calls instead of {counted}")


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())

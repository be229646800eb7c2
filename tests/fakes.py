"""Fakes: a device with a capacity and a cost, for the pure search; streams of a device, which note who waits for whom.

A step's memory is a list of levels, one for each moment; its peak is their maximum. A forecast fits each level as
a + b·batch through the two largest traces, as the real one fits what each operator allocates. Levels that are not
affine make the forecast wrong, as a kernel does that changes its algorithm with the size.
"""

import random
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

from autoaccum.probing.outcome import FITS, OUT_OF_MEMORY, OVER_BUDGET, Trial

Level = Callable[[int], float]


@dataclass
class FakeForecast:
    """Lines through the levels at two traced sizes."""

    sizes: tuple[int, int]
    levels: tuple[list[float], list[float]]
    residual: float | None = None

    def reserved(self, batch: int) -> int:
        (a, b), (at_a, at_b) = self.sizes, self.levels
        return round(max(x + (y - x) * (batch - a) / (b - a) for x, y in zip(at_a, at_b, strict=True)))

    def peak(self, batch: int) -> int:
        return self.reserved(batch)


@dataclass
class FakeMachine:
    """Runs steps of `levels`. `hard` devices raise out of memory, soft ones count; `aligned` traces can be fitted."""

    budget: int
    levels: list[Level]
    hard: bool = True
    aligned: bool = True
    traces_all: bool = False
    floor: int = 1
    ranks: None = None
    elsewhere: bool = False
    trials: list[Trial] = field(default_factory=list)
    traces: dict[int, list[float]] = field(default_factory=dict)

    @property
    def allowance(self) -> "FakeMachine":
        return self

    @property
    def bytes(self) -> int:
        return self.budget

    @property
    def room(self) -> float:
        return self.budget

    @property
    def suffers(self) -> bool:
        return self.hard

    @property
    def fixed(self) -> int:
        return round(min(level(0) for level in self.levels))

    def peak(self, size: int) -> int:
        return round(max(level(size) for level in self.levels))

    def run(self, size: int, kind: str) -> Trial:
        peak = self.peak(size)
        fits = peak <= self.budget
        if (fits or not self.hard) and (kind == "trace" or self.traces_all):
            self.traces[size] = [level(size) for level in self.levels]
        outcome = FITS if fits else OUT_OF_MEMORY if self.hard else OVER_BUDGET
        trial = Trial(size, kind, peak if fits or not self.hard else None, None, 1e-3 * size, outcome)
        self.trials.append(trial)
        return trial

    def forecast(self) -> FakeForecast | None:
        sizes = sorted(self.traces)
        if len(sizes) < 2 or not self.aligned:
            return None
        (a, b) = sizes[-2:]
        made = FakeForecast((a, b), (self.traces[a], self.traces[b]))
        if len(sizes) > 2:
            c = sizes[-3]
            held_out = FakeForecast((c, a), (self.traces[c], self.traces[a]))
            made.residual = abs(held_out.reserved(b) / max(self.traces[b]) - 1)
        return made

    def limit(self, ceiling: int) -> int:
        """The largest size up to `ceiling` that really fits, by bisection over a monotone cost."""
        low, high = 0, ceiling + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle) <= self.budget else (low, middle)
        return low


def card(seed: int, *, bend: float = 0.0, **kind: bool) -> tuple[FakeMachine, int]:
    """A synthetic card and its true limit, log-uniform on 1..4096; `bend` > 0: levels jump by up to that share."""
    chance = random.Random(seed)
    true = round(2 ** chance.uniform(0, 12))
    fixed = chance.uniform(1e8, 4e9)
    levels: list[Level] = []
    for _ in range(chance.randint(2, 6)):
        a, b = fixed * chance.uniform(0.7, 1.3), chance.uniform(1e5, 2e8)
        jump, at = chance.uniform(0, bend), 2 ** chance.uniform(1, 12)
        levels.append(lambda n, a=a, b=b, jump=jump, at=at: a + b * n * (1 + jump * (n >= at)))
    machine = FakeMachine(0, levels, **kind)
    # A budget between the peaks of the limit and of the next size makes the true limit what was drawn.
    here, above = machine.peak(true), machine.peak(true + 1)
    machine.budget = here + int((above - here) * chance.random() * 0.999)
    return machine, true


class FakeStream:
    """Notes what it waits for."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class FakeStreams:
    """Makes streams as torch.cuda does."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.usual = FakeStream("usual", self.log)

    def Stream(self, device: object) -> FakeStream:
        return FakeStream("side", self.log)

    def current_stream(self, device: object) -> FakeStream:
        return self.usual

    @contextmanager
    def stream(self, stream: FakeStream):
        self.log.append(f"on {stream.name}")
        yield

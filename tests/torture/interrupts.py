"""SIGINT at random moments of a probe, a check and a training: everything is as it was, and the next one works.

Another process sends it, as a terminal does. The model holds what is easily left behind: hooks of its own from its
first forward, BatchNorm, dropout, a held generator, an optimizer that was used. A training that was broken off holds
the weights of one of its steps, and goes on to the end that it would have come to.
"""

import hashlib
import pickle
import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._C._autograd import _profiler_enabled
from torch.utils.data import Dataset

import autoaccum
from tests.first_forward import Hooked, picture
from tests.interrupting import Sender, python_handles_it

__all__ = ["KINDS", "Result", "run"]


class Augmented(Dataset[Any]):
    """Samples that every look draws anew, from two generators."""

    def __len__(self) -> int:
        return 36

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randn(6) + random.random(), index % 3


class Owner:
    """A model, its optimizer and its data, and what is asked of them."""

    def __init__(self, *, fresh: bool) -> None:
        """A `fresh` model has not run yet; its optimizer was stepped all the same."""
        torch.manual_seed(1)
        random.seed(1)
        self.model = nn.Sequential(Hooked(), nn.Dropout(0.2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        if not fresh:
            self.model(torch.randn(8, 6))
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loop: autoaccum.TrainingLoop | None = None

    def probe(self) -> None:
        autoaccum.probe(self.model, Augmented(), optimizer=self.optimizer, target_batch=24, memory="64MiB", cache=False,
                        loss=nn.CrossEntropyLoss(), device="cpu")  # fmt: skip

    def verify(self) -> None:
        autoaccum.verify(self.model, Augmented(), loss=nn.CrossEntropyLoss(), device="cpu")

    def fit(self) -> None:
        """Trains on, from where it was broken off."""
        if self.loop is None:
            self.loop = autoaccum.prepare(
                self.model, Augmented(), optimizer=self.optimizer, target_batch=12, micro_batch=4, epochs=2, seed=5,
                loss=nn.CrossEntropyLoss(), device="cpu", val_data=(torch.ones(6, 6), torch.zeros(6).long()),
            )  # fmt: skip
        self.loop.run()

    def state(self) -> Any:
        """All that a probe or a check might change."""
        optimizer = pickle.dumps([
            [(key, value.tolist() if isinstance(value, torch.Tensor) else value) for key, value in each.items()]
            for each in self.optimizer.state.values()
        ])  # fmt: skip
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        flags = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), _profiler_enabled()
        return picture(self.model), optimizer, groups, torch.get_rng_state().tolist(), random.getstate(), flags

    def weights(self) -> str:
        """A digest of parameters, buffers and moments."""
        moments = [value.tolist() for each in self.optimizer.state.values() for value in each.values()]
        return hashlib.sha256(pickle.dumps([
            [tensor.tolist() for tensor in self.model.state_dict().values()], moments
        ])).hexdigest()  # fmt: skip

    def hooks(self) -> list[int]:
        """How many hooks there are, of modules and of parameters."""
        held = [
            value for module in self.model.modules() for name, value in vars(module).items() if name.endswith("_hooks")
        ]
        held += [parameter._backward_hooks for parameter in self.model.parameters()]
        return [len(each or ()) for each in held]


KINDS = ("probe", "verify", "fit")


@dataclass
class Result:
    """How many interrupts left everything as it should be."""

    interrupts: int = 0
    after_the_end: int = 0
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"interrupts": self.interrupts, "after the end": self.after_the_end, "seconds": round(self.seconds, 1),
                "failures": self.failures[:10]}  # fmt: skip


def run(count: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> Result:
    """`count` interrupts that broke something off, spread over the kinds."""
    chance, result, began = random.Random(seed), Result(), time.perf_counter()
    torch.set_num_threads(1)
    with python_handles_it():
        sender = Sender()
        try:
            ends = _ends()
            for number in range(count):
                _one(kinds[number % len(kinds)], chance, sender, ends, result)
        finally:
            sender.close()
    result.seconds = time.perf_counter() - began
    return result


def _ends() -> list[str]:
    """The weights of a training that nobody disturbs, before it and after each step."""
    owner = Owner(fresh=False)
    ends = [owner.weights()]

    def note(event: Any) -> None:
        if event.name == "step":
            ends.append(owner.weights())

    loop = autoaccum.prepare(
        owner.model, Augmented(), optimizer=owner.optimizer, target_batch=12, micro_batch=4, epochs=2, seed=5,
        loss=nn.CrossEntropyLoss(), device="cpu", val_data=(torch.ones(6, 6), torch.zeros(6).long()), callbacks=[note],
    )  # fmt: skip
    loop.run()
    return ends


def _one(kind: str, chance: random.Random, sender: Sender, ends: list[str], result: Result) -> None:
    """One object of a kind, broken off until an interrupt has come in time."""
    took = _seconds(kind)
    while True:
        owner = Owner(fresh=kind != "fit")
        before, hooks = owner.state(), owner.hooks()
        broken_off = sender.interrupts(chance.uniform(0, took), getattr(owner, kind))
        if broken_off:
            break
        result.after_the_end += 1
        took *= 0.8
    result.interrupts += 1
    wrong = []
    if kind == "fit":
        if owner.weights() not in ends:
            wrong.append("the weights are those of no step")
        if owner.hooks() != hooks or _profiler_enabled():
            wrong.append("hooks or a profiler are left")
        owner.fit()
        if owner.weights() != ends[-1]:
            wrong.append("it goes on to another end")
    else:
        after = owner.state()
        wrong += [f"part {place} of the state" for place, (a, b) in enumerate(zip(before, after)) if a != b]
        getattr(owner, kind)()
        wrong += [] if owner.state() == before else ["the state after the next one"]
    result.failures += [f"{kind}: {each}" for each in wrong]


_TOOK: dict[str, float] = {}


def _seconds(kind: str) -> float:
    """How long it takes undisturbed, the second time."""
    if kind not in _TOOK:
        for _ in range(2):
            owner, began = Owner(fresh=kind != "fit"), time.perf_counter()
            getattr(owner, kind)()
            _TOOK[kind] = time.perf_counter() - began
    return _TOOK[kind]

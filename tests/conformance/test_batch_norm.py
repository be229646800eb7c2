"""BatchNorm's running statistics over a window, against one update with the whole batch; its floor of two values."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

import autoaccum
from tests.conformance.models import Named, images, seeded, vectors
from tests.conformance.problems import Problem


def net(momentum=0.1):
    return seeded(lambda: Named(nn.BatchNorm2d(3, momentum=momentum), nn.Flatten(), nn.Linear(48, 5)))


class Checkpointed(nn.Module):
    """The normalisation is run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.first.weight)
        self.norm, self.last, self.reentrant = nn.BatchNorm2d(3), nn.Linear(48, 5), reentrant

    def forward(self, x):
        return self.last(checkpoint(lambda y: self.norm(y).flatten(1), self.first(x), use_reentrant=self.reentrant))


VARIANTS = {
    "even micro-batches": (net, 16),
    "ragged micro-batches": (net, 13),
    "momentum=None, two windows": (lambda: net(None), 29),
    "activation checkpointing": (lambda: seeded(Checkpointed, False), 13),
    "activation checkpointing, reentrant": (lambda: seeded(Checkpointed, True), 13),
}


def statistics(model):
    found = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return found[0].running_mean, found[0].running_var, int(found[0].num_batches_tracked)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.case(19, "BatchNorm's running mean and variance, first layer, against one whole-batch update")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_window_updates_running_statistics_as_its_batch_would(trainer, figures, name):
    """At stake: k updates from parts of the batch instead of one: statistics that forget k times as fast, and whose
    variance misses what lies between the micro-batches."""
    make, count = VARIANTS[name]
    problem = Problem(model=make, samples=images(count), micro_batch=4, loss=nn.CrossEntropyLoss())
    run = figures.attempt(name, lambda: trainer.train(problem))
    if run is None:
        return
    reference = copy.deepcopy(make())
    with torch.no_grad():
        for samples in problem.windows():
            reference(default_collate([sample["x"] for sample in samples]))
    (mean, variance, batches), (true_mean, true_variance, true_batches) = statistics(run.model), statistics(reference)
    off = [float((a - b).norm() / b.norm()) for a, b in ((mean, true_mean), (variance, true_variance))]
    figures.error(name, max(off), within=1e-10, text="" if batches == true_batches else f"{batches} updates")


@pytest.mark.case(20, "BatchNorm with one value per channel in a micro-batch", trainers=("autoaccum",))
def test_a_given_micro_batch_has_the_same_floor(trainer, figures):
    """At stake: the same without a probe to find the floor: a window of one sample goes with the one before it."""
    model = lambda: seeded(lambda: Named(nn.BatchNorm1d(6), nn.Linear(6, 5)))  # noqa: E731
    run = trainer.train(Problem(model=model, samples=vectors(17), micro_batch=4, k=2, loss=nn.CrossEntropyLoss()))
    windows = [record.samples for record in run.extra["result"].history]
    figures.verdict("an epoch of 17 samples, micro-batch given", windows == [8, 9], f"windows of {windows}")


@pytest.mark.case(20, "BatchNorm with one value per channel in a micro-batch")
def test_no_micro_batch_has_a_single_value_per_channel(trainer, figures):
    """At stake: torch refuses to normalise one value, so an epoch with one sample left over ends in a ValueError."""
    label = "an epoch of 15 samples"
    model = lambda: seeded(lambda: Named(nn.BatchNorm1d(6), nn.Linear(6, 5)))  # noqa: E731
    problem = Problem(
        model=model,
        samples=vectors(15),
        loss=nn.CrossEntropyLoss(),
        options={"micro_batch": None, "max_batch": 3, "cache": False},
    )
    if trainer.name == "Accumulator":
        plan = autoaccum.plan(3, 7, minimum=2)
        sizes = list(itertools.chain(*(plan.split(size) for size in plan.windows.sizes(15))))
        figures.verdict(label, min(sizes) == 2, f"micro-batches of {min(sizes)} and more")
        return
    run = figures.attempt(label, lambda: trainer.train(problem))
    if run is None:
        return
    if trainer.ours:
        result = run.extra["result"]
        assert result.probe.floor == 2
        assert sum(record.samples for record in result.history) == 15
        sizes = [size for window in (8, 7) for size in result.plan.split(window)]
        figures.verdict(label, min(sizes) >= 2, f"the probe's floor is 2: micro-batches {sizes}")
    else:
        figures.verdict(label, True, "trained")

"""Lists in batches are read alike for a whole source: as one item a sample, or as parts, whatever one looks like."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import autoaccum
from autoaccum.data import tree
from autoaccum.data.per_sample import ListReader
from autoaccum.data.source import open_source
from autoaccum.data.structure import plain
from autoaccum.data.windows import windows
from autoaccum.errors import DataError
from autoaccum.planning.plan import plan
from autoaccum.training.events import TrainingWarning

IMAGES = torch.randn(30, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 5
SAMPLES = list(zip(IMAGES, LABELS.tolist()))


def listed(samples):
    """As of images of different sizes: a list of them."""
    return [image for image, _ in samples], torch.tensor([label for _, label in samples])


def two_views(samples):
    images, labels = torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])
    return [images, images.flip(-1)], labels


def two_records(samples):
    (one, other), labels = two_views(samples)
    return ({"pixels": one}, {"pixels": other}), labels


class Ready:
    """Batches as they are, some of them looked at only when they come."""

    batch_size = None

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Classifier(nn.Module):
    """Takes a list of images, as detectors do, and runs out of memory beyond some."""

    def __init__(self, most=10**6):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.most, self.seen = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), most, []

    def forward(self, images):
        assert type(images) is list, "the model sees what the collate function made"
        self.seen.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.body(torch.stack(images))


def trained(model, collate, **asked):
    autoaccum.fit(
        model, DataLoader(SAMPLES, 6, collate_fn=collate), loss=nn.CrossEntropyLoss(), optimizer="sgd", lr=0.1,
        lr_rule="none", epochs=1, device="cpu", **asked,
    )  # fmt: skip
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize(("target", "micro_batch"), [(3, 3), (3, 2), (6, 3), (9, 4)])
def test_three_images_in_a_list_are_three_samples_and_no_channels(target, micro_batch):
    stacked = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    stacked.load_state_dict(Classifier().body.state_dict())
    images = trained(Classifier(), listed, target_batch=target, micro_batch=micro_batch)
    tensors = trained(stacked, torch.utils.data.default_collate, target_batch=target, micro_batch=micro_batch)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(images, tensors, strict=True))


def test_a_replay_passes_through_three_images():
    model = Classifier(most=2)
    with pytest.warns(TrainingWarning, match="out of memory in step 1"):
        trained(model, listed, target_batch=6, micro_batch=6, check=False)
    assert {6, 3, 2} <= set(model.seen)
    assert max(model.seen[-6:]) <= 2


@pytest.mark.parametrize("collate", [two_views, two_records])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_two_views_of_two_samples_stay_two_views(collate, micro_batch):
    source = open_source(DataLoader(SAMPLES, 4, collate_fn=collate))
    for window in windows(source, lambda: plan(micro_batch, 4), 0):
        for batch in window.batches:
            (one, other), labels = plain(batch)
            assert [len(part["pixels"] if isinstance(part, dict) else part) for part in (one, other)] == [
                len(labels)
            ] * 2
            assert len(tree.split(batch, [1] * len(labels))) == len(labels)


def test_what_a_collate_function_drops_misleads_nobody():
    def dropping(samples):
        return listed([sample for sample in samples if sample[1] != 1])

    source = open_source(DataLoader(SAMPLES, 4, collate_fn=dropping), shuffle=False)
    sizes = [tree.batch_size(b) for window in windows(source, lambda: plan(4, 4), 0) for b in window.batches]
    assert sum(sizes) == int((LABELS != 1).sum())
    assert 3 in sizes


@pytest.mark.parametrize("first", [3, 8])
def test_ready_batches_are_read_by_what_grows_from_one_to_another(first):
    batches = [listed(SAMPLES[start : start + size]) for start, size in ((0, first), (8, 5), (16, 3))]
    source = open_source(DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch), shuffle=False)
    assert tree.batch_size(source.trial(3)) == 3
    found = [tree.batch_size(b) for window in windows(source, lambda: plan(2, 4), 0) for b in window.batches]
    assert sum(found) == first + 5 + 3
    assert max(found) <= 2


def test_ready_batches_that_never_differ_are_asked_about():
    batches = [listed(SAMPLES[start : start + 3]) for start in (0, 3, 6)]
    source = open_source(DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch))
    with pytest.raises(DataError, match=r"\[0\] of the batch is a list of 3 items.*3 samples or as 3 parts"):
        next(windows(source, lambda: plan(3, 3), 0))


def test_a_loop_of_ones_own_is_read_alike_from_its_first_batch_on():
    model = Classifier().body
    accumulator = autoaccum.Accumulator(model, torch.optim.SGD(model.parameters(), 0.1), plan(2, 8))
    for size in (8, 3):
        micro_batches = []
        for images, labels in accumulator.window(listed(SAMPLES[:size])):
            assert type(images) is list
            micro_batches.append(len(images))
            loss = nn.functional.cross_entropy(model(torch.stack(images)), labels, reduction="sum")
            accumulator.backward(loss, denominator=len(labels))
        assert sum(micro_batches) == size


def test_lists_inside_a_sample_tell_nothing_of_the_samples():
    """Boxes of a sample come in lists of their own, of any length."""
    reader = ListReader()

    def batch(*boxes):
        return [(torch.zeros(3, 4, 4), [torch.zeros(4)] * count) for count in boxes]

    for made in (batch(1, 4), batch(2, 2), batch(5, 1)):
        assert tree.batch_size(reader.read(made)) == 2
    assert [len(boxes) for _, boxes in reader.read(batch(2, 3, 2))] == [2, 3, 2]
    assert tree.batch_size(reader.read(batch(2, 3, 2))) == 3

"""Detectors: images of any size in a list, targets in a list of dicts, losses over boxes, as torchvision's models take.

The two here are small, and divide as those do: one by each image's own boxes, one by those of the whole batch.
"""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import autoaccum


def sample(index):
    torch.manual_seed(index)
    boxes = torch.rand(index % 4 + 1, 4)
    return torch.rand(3, 6 + index % 3, 8).double(), {
        "boxes": boxes.double(),
        "labels": torch.arange(len(boxes)) % 3 + 1,
    }


SAMPLES = [sample(index) for index in range(24)]


def unzipped(samples):
    """As in torchvision's references."""
    return tuple(zip(*samples))


class Detector(nn.Module):
    """(images, targets) -> {"boxes": loss, "classes": loss}, as a torchvision detector in training mode."""

    def __init__(self, by_image):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.classes, self.by_image = nn.Linear(3, 4), nn.Linear(3, 4), by_image

    def forward(self, images, targets):
        assert type(images) is tuple
        assert len(images) == len(targets)
        assert all(type(target) is dict for target in targets)
        means = torch.stack([image.mean(dim=(1, 2)) for image in images])
        boxes = [(self.body(mean) - t["boxes"]).abs().sum() for mean, t in zip(means, targets)]
        scores = self.classes(means)
        classes = [
            nn.functional.cross_entropy(row.expand(len(t["labels"]), -1), t["labels"], reduction="sum")
            for row, t in zip(scores, targets)
        ]
        rows = [len(t["boxes"]) for t in targets]
        if self.by_image:  # as RetinaNet: a mean over images of means over their boxes
            return {name: sum(v / n for v, n in zip(values, rows)) / len(rows)
                    for name, values in {"boxes": boxes, "classes": classes}.items()}  # fmt: skip
        return {"boxes": sum(boxes) / sum(rows), "classes": sum(classes) / sum(rows)}  # as FCOS


def summed(model, batch):
    return sum(model(*batch).values())


def rows(batch):
    return sum(len(target["boxes"]) for target in batch[1])


def verified(by_image, **declared):
    return autoaccum.verify(
        Detector(by_image).double(), DataLoader(SAMPLES, 3, collate_fn=unzipped), step=summed, device="cpu", **declared
    )


def test_a_mean_over_images_is_verified():
    assert verified(by_image=True).ok


def test_a_mean_over_all_boxes_is_seen_undeclared_and_can_be_declared():
    report = verified(by_image=False)
    assert report.ok
    assert report.relative_error < 1e-10
    assert "the rows of sample['boxes']" in report.text
    assert verified(by_image=False, reduction=rows).ok
    assert not verified(by_image=False, reduction="sample_mean").ok


def test_samples_of_which_some_hold_more_tensors_than_others_are_tried_all_the_same():
    some = [(image, target | {"corners": list(target["boxes"] - 0.5)}) for image, target in SAMPLES]
    data = DataLoader(some, 3, collate_fn=unzipped)
    assert autoaccum.verify(Detector(False).double(), data, step=summed, device="cpu").relative_error < 1e-10


@pytest.mark.parametrize("micro_batch", [2, 3, 4])
@pytest.mark.parametrize(("by_image", "reduction"), [(True, "sample_mean"), (False, rows)])
def test_a_detector_trains_as_on_the_whole_batch(by_image, reduction, micro_batch):
    def trained(size):
        model = Detector(by_image).double()
        autoaccum.fit(
            model, DataLoader(SAMPLES, 3, collate_fn=unzipped), step=summed, reduction=reduction, target_batch=8,
            micro_batch=size, optimizer="sgd", lr=0.1, lr_rule="none", epochs=1, seed=0, device="cpu", check=False,
        )  # fmt: skip
        return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])

    assert torch.allclose(trained(micro_batch), trained(8), rtol=1e-10, atol=0)

"""What is there before a trace: each storage once, in full."""

import dataclasses
from collections import UserDict, namedtuple

import torch
from torch import nn

from autoaccum.memory.resident import resident_bytes, resident_parts

Pair = namedtuple("Pair", "image label")


@dataclasses.dataclass
class _Sample:
    image: torch.Tensor
    label: torch.Tensor


def test_tied_weights_and_views_count_once_and_in_full():
    embedding = nn.Embedding(50, 8)
    head = nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    assert resident_bytes(embedding, head) == 4 * 50 * 8
    values = torch.zeros(1000)
    assert resident_bytes(values[:10], values[500:].view(50, 10)) == 4000


def test_modules_count_buffers_and_gradients():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    parameters = 4 * (12 + 3 + 3 + 3)
    buffers = 4 * (3 + 3) + 8
    assert resident_bytes(model) == parameters + buffers
    model(torch.randn(5, 4)).sum().backward()
    assert resident_bytes(model) == 2 * parameters + buffers


def test_batches_are_walked_through_any_container():
    image, label = torch.zeros(10), torch.zeros(3, dtype=torch.long)
    each = 40 + 24
    containers = [
        {"image": image, "labels": [label]},
        UserDict(image=image, label=label),
        Pair(image, label),
        _Sample(image, label),
        [(image,), {"a": {"b": label}}, "text", 3, None],
    ]
    for container in containers:
        assert resident_bytes(container) == each
    assert resident_bytes(*containers) == each


def test_a_container_that_holds_itself_is_walked_once():
    batch: list = [torch.zeros(10)]
    batch.append(batch)
    assert resident_bytes(batch) == 40


def test_sparse_gradients_count_by_their_values_and_indices():
    embedding = nn.Embedding(1000, 4, sparse=True)
    embedding(torch.tensor([3, 5])).sum().backward()
    assert resident_bytes(embedding) == 4 * 4000 + 2 * 8 + 2 * 4 * 4


def test_only_the_asked_device_counts():
    held = [torch.zeros(5), torch.zeros(7, device="meta")]
    assert resident_bytes(held) == 20
    model = nn.Linear(4, 3)
    assert [sum(resident_parts(model, device=torch.device(kind)).values()) for kind in ("cpu", "cuda")] == [60, 0]


def test_parts_add_up_and_share_nothing():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = (torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    model(batch[0]).sum().backward()
    optimizer.step()
    parts = resident_parts(model, optimizer, batch)
    parameters = 4 * (12 + 3 + 3 + 3)
    assert parts == {
        "parameters": parameters,
        "buffers": 4 * 6 + 8,
        "gradients": parameters,
        "optimizer_state": 2 * parameters + 4 * 4,
        "batch": 4 * 20 + 8 * 5,
    }
    assert sum(parts.values()) == resident_bytes(model, optimizer, batch)
    assert resident_parts(model)["gradients"] == parameters
    model.zero_grad()
    assert resident_parts(model)["gradients"] == 0

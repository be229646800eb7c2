"""A model that changes itself at its first forward is put back whole: flag, hooks, layers, caches."""

import collections
import copy
import enum
import random

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import autoaccum
from autoaccum.model.contents import Contents
from autoaccum.model.snapshot import Snapshot
from tests.first_forward import Changing, Hooked, picture

CPU = torch.device("cpu")
X, Y = torch.randn(24, 6), torch.arange(24) % 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))


def step(model):
    nn.functional.cross_entropy(model(X), Y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.parametrize("kind", [Hooked, Changing])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_everything_that_a_step_changes_comes_back(kind, used):
    model = kind()
    if used:
        step(model)
    before = picture(model)
    with Snapshot(model, torch.optim.AdamW(model.parameters()), device=CPU) as snapshot:
        snapshot.set_gradients_aside()
        step(model)
        step(model)
        assert picture(model) != before
    assert picture(model) == before
    step(model)  # and it runs


@pytest.mark.parametrize("kind", [Hooked, Changing])
def test_a_forward_leaves_no_trace(kind):
    model = kind()
    model.hidden = []  # parameters, whose numbers are no forward's to change
    for _ in range(12):
        model = nn.Sequential(model)  # however deep it lies
    before = picture(model)
    with Snapshot(model, device=CPU, parameters=False):
        model(X)
        model.eval()
        model(X)
    assert picture(model) == before


@pytest.mark.parametrize("kind", [Hooked, Changing])
@pytest.mark.parametrize("stands", [False, True], ids=["no gradients", "gradients stand"])
def test_probe_and_verify_leave_it_as_it_was_and_it_trains(kind, stands):
    model = kind()
    if stands:
        model.norm.weight.grad = torch.full_like(model.norm.weight, 2.0)
    before, generators = picture(model), torch.get_rng_state()
    arguments = {"loss": nn.CrossEntropyLoss(), "device": "cpu"}
    autoaccum.probe(model, (X, Y), target_batch=12, memory="64MiB", **arguments)
    assert picture(model) == before
    autoaccum.verify(model, (X, Y), **arguments)
    assert picture(model) == before
    assert torch.equal(torch.get_rng_state(), generators)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_training_goes_as_it_would_have_without_the_probe_and_the_check(micro_batch):
    ends = []
    for before_it in (True, False):
        model = Hooked()
        plan = None if before_it else autoaccum.plan(4, 12, samples=24)
        settings = {"micro_batch": micro_batch, "memory": None if micro_batch else "64MiB"} if before_it else {}
        autoaccum.fit(
            model, (X, Y), loss=nn.CrossEntropyLoss(), target_batch=12, plan=plan, max_batch=4, check=before_it,
            seed=1, optimizer="sgd", lr=0.1, device="cpu", **settings,
        )  # fmt: skip
        assert len(model.inner._forward_hooks) == 1
        ends.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))


def test_segformer_is_left_as_it_was():
    """Transformers installs hooks when a model first runs, and keeps a flag of it."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "SegformerForSemanticSegmentation"):
        pytest.skip("this version of Transformers has no Segformer")
    config = transformers.SegformerConfig(
        num_labels=10, depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 16, 16], decoder_hidden_size=16
    )
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(config)
    data = {"pixel_values": torch.randn(8, 3, 64, 64), "labels": torch.randint(0, 10, (8, 64, 64))}
    before = picture(model)
    autoaccum.probe(model, data, target_batch=4, memory="1GiB", device="cpu")
    assert autoaccum.verify(model, data, device="cpu").ok
    assert picture(model) == before
    assert len(autoaccum.fit(model, data, target_batch=4, memory="1GiB", device="cpu").history) == 2
    assert torch.isfinite(model(**data).loss)


# --- the walk


class Kind(enum.Enum):
    ONE = 1


class Slotted:
    __slots__ = ("count", "unset")


class Ordered(collections.OrderedDict):
    """Whose own methods do more than to hold items."""

    def __setitem__(self, key, value):
        raise AssertionError("called")


class Foreign:
    """Stands for an object of another package."""


Foreign.__module__ = "logger.run"


def holding(value):
    model = nn.Linear(1, 1)
    model.__class__ = type("Own", (nn.Linear,), {"__module__": __name__})
    model.value = value
    return model


def change_slotted(value):
    value.count, value.unset = 5, 6


def change_ordered(value):
    collections.OrderedDict.__setitem__(value, "b", 2)


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1, [2]], lambda value: value[1].append(3)),
        ({"a": {"b": {1}}}, lambda value: value["a"]["b"].add(2)),
        (([1],), lambda value: value[0].clear()),
        (collections.Counter("aab"), lambda value: value.update("c")),
        (collections.OrderedDict(a=1, b=2), lambda value: value.move_to_end("a")),
        (collections.deque([1, 2], maxlen=2), lambda value: value.append(3)),
        (collections.UserDict(a=1), lambda value: value.update(a=2)),
        (Slotted(), change_slotted),
        (Ordered(), change_ordered),
        (random.Random(1), lambda value: value.random()),
        (torch.Generator().manual_seed(1), lambda value: torch.rand(1, generator=value)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_an_attribute_holds_comes_back(value, change):
    if isinstance(value, Slotted):
        value.count = 4
    model, saved = holding(value), copy.deepcopy(value)
    contents = Contents(model)
    change(value)
    contents.restore()
    assert model.value is value
    if isinstance(value, Slotted):
        assert value.count == 4
        assert not hasattr(value, "unset")
    elif isinstance(value, torch.Generator):
        assert torch.equal(value.get_state(), saved.get_state())
    elif isinstance(value, random.Random):
        assert value.getstate() == saved.getstate()
    else:
        assert value == saved
        assert list(value) == list(saved)


@pytest.mark.parametrize(
    "value",
    [Foreign(), TensorDataset(X), Kind.ONE, Hooked, Hooked.forward],
    ids=["foreign", "dataset", "enum", "class", "function"],
)
def test_what_has_a_life_of_its_own_is_left_alone(value):
    contents = Contents(holding(value))
    if isinstance(value, Foreign):
        value.lines = 3
    if isinstance(value, TensorDataset):
        value.tensors = ()
    contents.restore()
    assert getattr(value, "lines", 3) == 3
    assert getattr(value, "tensors", ()) == ()
    assert len(contents.tensors) == 2


def test_a_circle_and_a_long_list_end():
    circle = []
    circle.append(circle)
    model = holding([circle, list(range(100_000))])
    Contents(model).restore()
    assert model.value[0] is circle


def test_hooks_that_were_there_keep_their_handles():
    model = nn.Linear(2, 2)
    handle = model.register_forward_hook(lambda *args: None)
    contents = Contents(model)
    model.register_forward_hook(lambda *args: None)
    contents.restore()
    assert len(model._forward_hooks) == 1
    handle.remove()
    assert not model._forward_hooks


def test_hooks_on_all_modules_come_back():
    contents = Contents(nn.Linear(2, 2))
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    contents.restore()
    assert not nn.modules.module._global_forward_hooks
    handle.remove()


def test_a_lazy_layer_keeps_the_shape_that_its_first_forward_gave_it():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with Snapshot(model, device=CPU, parameters=False):
        model(torch.randn(3, 6))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.shape == (4, 6)
    assert model(torch.randn(3, 6)).shape == (3, 2)


def test_the_state_of_a_step_function_s_owner_comes_back():
    class Steps:
        def __init__(self):
            self.taken = [0]

        def step(self, model, batch):
            self.taken[0] += 1
            return nn.functional.cross_entropy(model(batch[0]), batch[1])

    steps = Steps()
    arguments = {"step": steps.step, "device": "cpu"}
    autoaccum.probe(Hooked(), (X, Y), target_batch=12, memory="64MiB", **arguments)
    autoaccum.verify(Hooked(), (X, Y), **arguments)
    assert steps.taken == [0]

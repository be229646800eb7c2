"""Answers kept between runs: the envelope of lines, the key, files that cannot be used."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autoaccum.probing.cache import SCHEMA, Lines, envelope, keep_lines, read_lines, training_key

numbers = st.integers(0, 10**9)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))
    return tmp_path


@given(st.lists(st.tuples(numbers, st.integers(0, 10**6)), min_size=1, max_size=30), st.integers(1, 10**5))
def test_the_envelope_is_the_maximum_everywhere(lines, n):
    kept = envelope(lines)
    assert max(a + b * n for a, b in kept) == max(a + b * n for a, b in lines)
    assert set(kept) <= set(lines)
    assert [b for _, b in kept] == sorted({b for _, b in kept})


six = st.tuples(*[st.integers(-1000, 10**6)] * 6)


@given(st.lists(six, min_size=1, max_size=30), st.integers(1, 1000), st.integers(1, 1000))
def test_over_lengths_the_maximum_stays_the_same_everywhere(functions, batch, length):
    kept = envelope(functions)
    assert set(kept) <= set(functions)
    want, got = (Lines(tuple(lines), None, longest=8).peak(batch, length) for lines in (functions, kept))
    assert got == want
    if len(functions) > 1:
        topped = tuple(number - 1 for number in functions[0])
        assert topped not in envelope([*functions, topped])


@pytest.mark.parametrize(
    "lines",
    [
        Lines(((1.5, 0.0), (0.25, 3.0)), 0.001, 1.02),
        Lines(((1.0,) * 6,), None, 1.0, 40),
    ],
)
def test_what_is_written_is_read_back(folder, lines):
    assert read_lines("key") is None
    keep_lines("key", lines)
    assert read_lines("key") == lines
    assert [path.name for path in folder.iterdir()] == ["key.json"]


def test_what_is_kept_tells_peaks():
    lines = Lines(((1.5, 0.0), (0.25, 3.0)), 0.001, 1.02)
    assert (lines.peak(10), lines.reserved(10)) == (30, 31)


NAN, INFINITY = float("nan"), float("inf")
SOUND = {"schema": SCHEMA, "lines": [[1, 2]], "residual": None, "reserve": 1.0, "longest": None}


def test_a_sound_file_is_read(folder):
    (folder / "key.json").write_text(json.dumps(SOUND))
    assert read_lines("key") == Lines(((1.0, 2.0),), None)


def test_a_file_that_is_no_text_is_not_printed(folder):
    (folder / "key.json").write_bytes(b"\xff\x00" * 10_000)
    with pytest.warns(UserWarning, match=r"key\.json cannot be used") as warned:
        assert read_lines("key") is None
    assert len(str(warned[0].message)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        json.dumps({"schema": 99}),
        "[" * 100_000,
        json.dumps({"schema": SCHEMA, "lines": [["a", 2]], "residual": None}),
        *(
            json.dumps({**SOUND, **wrong})
            for wrong in (
                {"lines": []},
                {"lines": [[1]]},
                {"longest": 40},
                {"lines": [[NAN, NAN]]},
                {"lines": [[1, INFINITY]]},
                {"lines": [[1e308, 1e308]]},
                {"lines": [[1, True]]},
                {"residual": NAN},
                {"residual": -1},
                {"reserve": 0},
                {"reserve": "1.0"},
                {"reserve": INFINITY},
                {"longest": 1.5},
                {"longest": -3},
            )
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_a_warning_with_its_path(folder, text):
    (folder / "key.json").write_text(text)
    with pytest.warns(UserWarning, match=r"key\.json cannot be used"):
        assert read_lines("key") is None


def test_a_folder_that_cannot_be_written_is_a_warning(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setenv("AUTOACCUM_CACHE", str(folder / "file"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        keep_lines("key", Lines(((1.0, 1.0),), None))


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.layer = nn.Linear(4, width)

    def forward(self, x):
        return self.layer(x).relu()


def key(model=None, optimizer=None, batch=None, loss=None, settings=None, device="cpu"):
    torch.manual_seed(0)
    model = model or Net()
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.1)))(model.parameters())
    batch = (torch.randn(2, 4), torch.zeros(2)) if batch is None else batch
    return training_key(
        parts(model, optimizer, batch, loss or nn.MSELoss(), device), settings or {"accumulate": "fp32"}
    )


def parts(model, optimizer, batch, loss, device="cpu"):
    """As much of an Assembly as a key looks at."""
    return SimpleNamespace(
        model=model, optimizer=optimizer, source=SimpleNamespace(trial=lambda n: batch),
        objective=SimpleNamespace(loss=loss, step=None), precision=SimpleNamespace(name="fp32"),
        device=SimpleNamespace(type=device, name=device, total=lambda: 2**30),
    )  # fmt: skip


def test_the_key_ignores_numbers_and_the_batch_size():
    assert key() == key()
    assert key() == key(optimizer=lambda p: torch.optim.SGD(p, lr=0.7))
    assert key() == key(batch=(torch.randn(9, 4), torch.zeros(9)))
    trained = Net()
    with torch.no_grad():
        trained.layer.weight.add_(1)
    assert key() == key(model=trained)


def test_the_key_changes_with_all_that_decides_the_memory():
    class Other(Net):
        def forward(self, x):
            return self.layer(x).relu().exp()

    frozen = Net()
    frozen.layer.weight.requires_grad_(False)
    others = [
        key(model=Net(5)),
        key(model=Other()),
        key(model=frozen),
        key(model=Net().double()),
        key(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        key(optimizer=lambda p: torch.optim.AdamW(p, lr=0.1)),
        key(batch=(torch.randn(2, 5), torch.zeros(2))),
        key(loss=nn.L1Loss()),
        key(loss=lambda a, b: (a - b).sum()),
        key(settings={"accumulate": "native"}),
        key(device="cuda"),
    ]
    assert len({key(), *others}) == len(others) + 1


class Weighted:
    """A loss that is an object of the user's, and no module."""

    def __init__(self, weight):
        self.weight, self.held = weight, object()

    def __call__(self, outputs, targets):
        return self.weight * (outputs.sum(1) - targets).square().mean()


def plain_loss(outputs, targets, weight):
    return weight * (outputs.sum(1) - targets).square().mean()


def test_the_key_knows_losses_that_are_no_functions_by_what_they_are_and_not_where():
    for one, same, other in (
        (Weighted(1.0), Weighted(1.0), Weighted(2.0)),
        *([tuple(partial(plain_loss, weight=weight) for weight in (1.0, 1.0, 2.0))]),
        (torch.dist, torch.dist, torch.cdist),
    ):
        assert key(loss=one) == key(loss=same)
        assert key(loss=one) != key(loss=other)


def test_the_key_does_without_a_loss_where_the_model_returns_it():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert training_key(parts(model, optimizer, torch.randn(2, 4), None), {}) != key(model=model)


class Doubled:
    def __call__(self, outputs, targets):
        return 2 * (outputs.sum(1) - targets).square().mean()


def test_the_key_knows_callables_of_every_kind():
    callables = (Doubled(), Doubled().__call__, "".join, [].__len__, torch.nn.functional.mse_loss, Doubled, len)
    keys = [key(loss=loss) for loss in callables]
    assert keys[0] != keys[4]
    assert keys == [key(loss=loss) for loss in callables]


def test_the_key_reads_torchscript():
    """Whose class has no forward, and whose containers have no code."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rows = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            for row in self.rows:
                x = row(x)
            return x

    scripted = [torch.jit.script(module) for module in (Net(), Net(), Rows(), nn.Sequential(Net()), Net(5))]
    keys = [key(model=model) for model in scripted]
    assert keys[0] == keys[1]
    assert len({*keys, key()}) == 5

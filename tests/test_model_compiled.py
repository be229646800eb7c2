"""A compiled model in a training: one graph for every size, the same gradients, and a word wherever that is not so.

Most run on a backend that traces as the default one does, and generates no code; the default one where a compiler is.
"""

import copy
import os
import pickle
import shutil
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import SetupError
from autoaccum.model import compiled as compiled_module
from autoaccum.model.compiled import Compiled
from autoaccum.model.memory_savers import installed
from autoaccum.ranks import Ranks
from tests.norms import pooled
from tests.versions import since

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torch.compile is tried on Linux and macOS")


@pytest.fixture(autouse=True)
def own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiled_module, "BACKEND", "aot_eager")
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self, width=16, norm=True):
        super().__init__()
        self.inside, self.head = nn.Linear(width, width), nn.Linear(width, 10)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.inside(x))))


def make(**kind):
    torch.manual_seed(0)
    return Net(**kind)


def data(samples=203):
    chance = torch.Generator().manual_seed(1)
    return torch.randn(samples, 16, generator=chance), torch.randint(0, 10, (samples,), generator=chance)


ASKED = {"loss": nn.CrossEntropyLoss(), "device": "cpu", "optimizer": "sgd", "lr": 0.1, "seed": 3, "epochs": 2}


def fit(model, samples=203, **arguments):
    notes = []
    result = autoaccum.fit(
        model, data(samples), **ASKED, **arguments,
        callbacks=[lambda event: notes.append(event.text) if event.name == "note" else None],
    )  # fmt: skip
    return result, notes


def compilations(notes):
    return [note for note in notes if note.startswith("torch.compile")]


def graphs():
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


# --- in a training


@since("2.5", "earlier ones compile once more")
def test_ragged_windows_and_a_short_tail_run_in_the_one_graph_that_the_probe_compiled():
    model, plain = make(), make()
    before = graphs()
    result, notes = fit(model, target_batch=100, max_batch=40, compile=True, val_data=data(30))
    assert result.plan.micro_batches == (34, 33, 33)
    assert {record.samples for record in result.history} == {100, 3}
    assert len(compilations(notes)) == 1
    assert notes[0].startswith("torch.compile: 1 graph at a batch of ")
    assert graphs() == before + 1
    assert result.verify.ok
    fit(plain, target_batch=100, plan=result.plan, val_data=data(30))
    for (name, value), other in zip(model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
def test_the_forecast_is_of_the_compiled_step():
    report = autoaccum.probe(
        make(), data(), loss=nn.CrossEntropyLoss(), device="cpu", target_batch=200, memory="64MiB", compile=True
    )
    ran = {trial.batch: trial.peak_bytes for trial in report.trials}
    assert report.forecast(200) == ran[200]
    assert report.residual < 1e-3


def test_a_single_sample_that_is_left_over_compiles_nothing():
    model = make(norm=False)
    result, notes = fit(model, samples=9, target_batch=4, micro_batch=2, compile=True)
    assert [record.samples for record in result.history] == [4, 4, 1] * 2
    assert len(compilations(notes)) == 1


def test_micro_batches_of_one_are_a_graph_of_their_own():
    result, notes = fit(make(norm=False), samples=9, target_batch=4, micro_batch=1, compile=True)
    assert result.plan.micro_batches == (1, 1, 1, 1)
    (note,) = compilations(notes)
    assert note.startswith("torch.compile: 1 graph at a batch of 1, in ")


def test_pooled_statistics_are_the_eager_ones_and_their_momentum_compiles_nothing():
    plain, changed = make(), make()
    x, y = data(50)
    told = []
    states = []
    for model in (plain, changed):
        wrapped = Compiled(model, told.append) if model is changed else None
        with pooled(model) as statistics:
            for window in range(3):
                statistics.begin(1)
                for piece in (slice(0, 20), slice(20, 37), slice(37, 50 - window)):
                    if wrapped is None:
                        F.cross_entropy(model(x[piece]), y[piece]).backward()
                    else:
                        with wrapped:
                            F.cross_entropy(model(x[piece]), y[piece]).backward()
                statistics.commit(Ranks())
                assert model.norm.momentum == 0.1
        states.append(model.norm.state_dict())
    assert len(told) == 1
    for (name, value), other in zip(states[0].items(), states[1].values()):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7, msg=name)
    gradient, other = plain.inside.weight.grad, changed.inside.weight.grad
    torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_checkpointing_and_compilation_go_together():
    class Deep(nn.Sequential):
        pass

    def deep():
        torch.manual_seed(0)
        return Deep(
            *(nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.0), nn.Tanh()) for _ in range(3)), nn.Linear(16, 10)
        )

    one, other = deep(), deep()
    _, notes = fit(one, target_batch=100, micro_batch=30, compile=True, ladder="checkpointing")
    assert len(compilations(notes)) == 1
    fit(other, target_batch=100, micro_batch=30)
    for value, expected in zip(one.parameters(), other.parameters()):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


# --- the model afterwards


def test_the_users_model_is_as_it_was():
    model = make()
    names, kind = list(model.state_dict()), type(model)
    fit(model, target_batch=100, micro_batch=50, compile=True)
    assert "forward" not in vars(model)
    assert model._compiled_call_impl is None
    assert list(model.state_dict()) == names
    assert type(model) is kind
    before = graphs()
    model(data(7)[0]).sum().backward()
    assert graphs() == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_is_a_plain_model(copied):
    model = make().eval()
    x = data(4)[0]
    with Compiled(model, lambda text: None):
        model(x).sum().backward()
        twin = copied(model)
    expected = model(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), expected)


def test_without_gradients_nothing_is_compiled():
    model, told = make().eval(), []
    with Compiled(model, told.append), torch.no_grad():
        model(data(4)[0])
    assert not told or "not called" in told[0]


# --- what falls back


def test_a_backend_that_fails_leaves_the_model_running_and_says_why(monkeypatch):
    def broken(graph, inputs):
        raise ValueError("no compiler on this machine")

    monkeypatch.setattr(compiled_module, "BACKEND", broken)
    model, plain = make(), make()
    result, notes = fit(model, target_batch=100, memory="100KiB", compile=True)
    (note,) = compilations(notes)
    assert note.startswith("torch.compile failed, and the model runs without it: ")
    assert "ValueError: no compiler on this machine" in note
    fit(plain, target_batch=100, plan=result.plan)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))


def test_an_error_of_the_users_own_comes_out_as_itself():
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, Compiled(make(), lambda text: None) as wrapped:
        wrapped.module(torch.randn(3, 5))
    assert "torch._dynamo" not in type(caught.value).__module__


def test_out_of_memory_inside_the_compiler_is_out_of_memory_and_no_fallback():
    def full(graph, inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    wrapped = Compiled(make(), lambda text: None, backend=full)
    with wrapped, pytest.raises(Exception, match="out of memory"):
        wrapped.module(data(4)[0])
    assert wrapped.failed is None


def test_parts_that_run_as_they_are_are_said():
    class Broken(Net):
        def forward(self, x):
            x = self.inside(x)
            torch._dynamo.graph_break()
            return self.head(x)

    torch.manual_seed(0)
    _, notes = fit(Broken(norm=False), target_batch=100, micro_batch=50, compile=True)
    assert "2 graphs at a batch of " in notes[0]
    assert "parts of the model run without it: " in notes[0]


@pytest.mark.slow
@since("2.5", "a float made of a counter is compiled")
def test_a_training_that_compiles_on_and_on_says_so_each_time_and_when_torch_gives_up():
    class Counting(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * float(f"1.{self.calls}")

    torch.manual_seed(0)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
    with torch._dynamo.config.patch({limit: 3}):
        _, notes = fit(Counting(), target_batch=20, micro_batch=20, compile=True, check=False)
    said = compilations(notes)
    assert "1 graph at a batch of 20" in said[1]
    assert said[2].endswith("3 in all")
    assert (
        "parts of the model run without it: torch has compiled them as often as torch._dynamo.config lets it" in said[3]
    )


def test_a_step_that_never_calls_the_model_itself_is_told_so():
    class Encoder(Net):
        def encode(self, x):
            return self.head(self.inside(x))

    torch.manual_seed(0)
    notes = []
    autoaccum.fit(
        Encoder(norm=False), data(20), step=lambda model, batch: F.cross_entropy(model.encode(batch[0]), batch[1]),
        target_batch=20, micro_batch=10, device="cpu", compile=True,
        callbacks=[lambda event: notes.append(event.text) if event.name == "note" else None],
    )  # fmt: skip
    assert [note for note in notes if "nothing was compiled, since the model's forward was not called" in note]


def test_a_model_that_is_compiled_already_is_left_to_its_owner():
    model = make(norm=False)
    model.compile(backend="eager")
    _, notes = fit(model, target_batch=100, micro_batch=50, compile=True)
    assert notes[0].startswith("compile=True changes nothing, since the model is compiled already")
    assert model._compiled_call_impl is not None


@pytest.mark.slow
@since("2.6", "earlier ones compile once more")
def test_generated_code_gives_the_same_gradients_in_one_graph(monkeypatch):
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
    if compiler is None:
        pytest.skip("the default backend needs a C++ compiler for the CPU, and there is none")
    monkeypatch.setattr(compiled_module, "BACKEND", "inductor")
    model, plain = make(), make()
    result, notes = fit(model, target_batch=100, memory="100KiB", compile=True)
    assert len(compilations(notes)) == 1
    assert notes[0].startswith("torch.compile: 1 graph at a batch of ")
    fit(plain, target_batch=100, plan=result.plan)
    for (name, value), other in zip(model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=name)


def test_matrices_are_not_padded_since_that_guards_on_the_batch(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda forward, **more: asked.append(more["options"]) or forward)
    for backend in ("inductor", "eager"):
        with Compiled(make(norm=False), print, backend=backend) as stand_in:
            stand_in._forward()
    assert asked == [{"shape_padding": False}, None]
    assert "shape_padding" in torch._inductor.list_options()


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(32, 32) for _ in range(10)), nn.Linear(32, 10)

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(F.gelu(layer(x)))
        return self.head(x.mean(1))


def kept(rung):
    """Bytes that a compiled forward keeps for its backward, parameters apart."""
    model, sizes = Deep(), []
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.nbytes)
        return tensor

    compiled, cpu = Compiled(model, lambda text: None), torch.device("cpu")
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with compiled, installed(rung, model, cpu, compiled=compiled), hooks:
        model(torch.randn(16, 64, 32))
    return sum(sizes)


def test_a_budget_for_activations_is_compiled_apart_and_refused_without_compilation():
    assert kept("activation_memory_budget/0.2") < kept(None) / 3
    with pytest.raises(SetupError, match=r"activation_memory_budget/0\.2.*not compiled: give compile=True"):
        autoaccum.prepare(make(), data(), target_batch=8, ladder="activation_memory_budget/0.2", **ASKED)

"""The ladder on real models: the same gradients in less memory, where one sample does not fit; and nothing left behind.

The model's blocks keep much for their backward. In bytes that PyTorch allocates on a CPU, one sample's step takes 4.1
MiB as it is, 2.4 MiB under bf16 autocast and 1.4 MiB with checkpointing.
"""

import copy
import gc
import inspect
import multiprocessing
import os
import pickle
import signal
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import NothingFitsError, PlanError, SetupError
from autoaccum.model.checkpointing import all_blocks
from autoaccum.model.compiled import BUDGETS, Compiled
from autoaccum.model.host_saving import SavedOnHost
from autoaccum.model.memory_savers import BY_NAME, RUNGS, installed, obstacle
from autoaccum.planning.plan import Plan
from tests.architectures import Architecture
from tests.test_memory_forecast import Windows

CPU = torch.device("cpu")
ONLY_CHECKPOINTING = "2400KiB"
TWO_WITH_CHECKPOINTING = "2800KiB"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path / "cache"))


class Block(nn.Module):
    def __init__(self, width=32, norm=False):
        super().__init__()
        self.inside, self.outside = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return x + self.drop(torch.tanh(self.outside(F.gelu(self.norm(self.inside(x))))))


class Net(nn.Module):
    def __init__(self, blocks=12, **kind):
        super().__init__()
        self.blocks = nn.ModuleList(Block(**kind) for _ in range(blocks))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1) if x.dim() == 3 else x)


def make(**kind):
    torch.manual_seed(0)
    return Net(**kind)


def data(samples=24):
    chance = torch.Generator().manual_seed(1)
    return torch.randn(samples, 512, 32, generator=chance), torch.randint(0, 10, (samples,), generator=chance)


def setup():
    return {"model": make(), "data": data(), "loss": nn.CrossEntropyLoss(), "optimizer": "sgd"}


ASKED = {"target_batch": 8, "device": "cpu", "seed": 3}


def bare(model):
    """That nothing stands in for a forward."""
    return all("forward" not in vars(part) for part in model.modules())


def gradients(model, batch, precision=None):
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# --- the rungs themselves


# Those of the optimizer and of a compiled model are held to it in tests/conformance/test_savers.py.
@pytest.mark.parametrize("rung", [rung for rung in RUNGS if rung not in {"bf16", *BY_NAME, *BUDGETS}])
def test_gradients_and_statistics_are_the_plain_steps_bit_for_bit(rung):
    batch = torch.randn(6, 32), torch.randint(0, 10, (6,))
    plain, changed = make(norm=True).train(), make(norm=True).train()
    expected = gradients(plain, batch)
    with installed(rung, changed, CPU):
        assert torch.equal(gradients(changed, batch), expected)


BLOCKS = Architecture(
    "blocks", lambda: Net(blocks=8), lambda n: (torch.randn(n, 16, 32), torch.randint(10, (n,))), F.cross_entropy
)


# Heads have forecasts in test_model_lazy_logits.py, steps in the backward pass in test_model_step_in_backward.py.
@pytest.mark.parametrize(
    "rung",
    [
        pytest.param(rung, marks=pytest.mark.slow if rung.endswith("/0.2") else ())
        for rung in RUNGS
        if rung not in ("bf16", "step_in_backward") and "chunked" not in rung
    ],
)
def test_the_forecast_under_a_rung_is_what_is_measured(rung):
    windows = Windows(BLOCKS)
    plain = windows.trace(61).peak
    compiled = Compiled(windows.model, lambda text: None, backend="aot_eager") if rung in BUDGETS else None
    own = {"optimizers": [windows.optimizer], "compiled": compiled}
    with compiled or nullcontext(), installed(rung, windows.model, CPU, **own):
        windows.trace(2)  # compiles
        forecast = windows.forecast(2, 4, 8)
        assert forecast.unaligned == 0
        for n in (24, 61):
            assert forecast.peak(n) == windows.trace(n).peak
    if not rung.endswith(("on_cpu", "on_host")) or "+" in rung:  # which free nothing where all is on the host
        assert forecast.peak(61) < plain


def test_bf16s_gradients_are_the_plain_steps_within_its_rounding():
    batch = tuple(part[:4] for part in data())
    expected, found = gradients(make().eval(), batch), gradients(make().eval(), batch, "bf16")
    assert 0 < (found - expected).norm() / expected.norm() < 2**-6  # bf16 has 8 bits; the sums round a few times


def test_what_is_installed_is_gone_afterwards_also_after_an_error():
    model = make()
    before, signature = list(model.state_dict()), str(inspect.signature(model.forward))
    for rung in RUNGS:
        with pytest.raises(ZeroDivisionError), installed(rung, model, CPU):
            assert bare(model) == ("checkpointing" not in rung and rung != "save_on_cpu")
            assert list(model.state_dict()) == before
            assert str(inspect.signature(model.forward)) == signature
            _ = 1 / 0
        assert bare(model)


def test_a_forward_of_the_users_own_on_the_module_is_put_back():
    model = nn.Linear(2, 2)
    model.forward = own = lambda x: x * 2
    with SavedOnHost(model, CPU):
        assert torch.equal(model(torch.ones(1, requires_grad=True)), torch.tensor([2.0]))
    assert model.forward is own


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_meanwhile_is_a_plain_model_with_weights_of_its_own(copied):
    model = make().eval()
    x = data(2)[0]
    with installed("checkpointing+save_on_cpu", model, CPU):
        twin = copied(model)
    with torch.no_grad():
        expected = model(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(x), expected)


def test_save_on_cpu_moves_what_is_kept_and_leaves_parameters_where_they_are(monkeypatch):
    model, batch = make(), data(1)
    made = []
    real = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: made.append(kwargs) or real(*args, **kwargs))
    with SavedOnHost(model, CPU):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    kept = sum(kwargs.get("device") == "cpu" for kwargs in made)
    assert kept >= 4 * len(model.blocks)  # the two inputs of a block's layers, what gelu and tanh keep
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = [getattr(node, "_saved_mat2", None) for node in nodes(loss)]
    assert any(tensor is not None and tensor.untyped_storage().data_ptr() in weights for tensor in saved)


def nodes(loss):
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


# --- which blocks


def test_blocks_are_the_outermost_repeated_children_that_hold_more_than_one_layer():
    inner = nn.Sequential(Block(), Block())
    model = nn.ModuleDict({
        "stem": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),  # single layers: nothing is saved
        "stages": nn.Sequential(inner, nn.Sequential(Block(), Block(), nn.Linear(2, 2))),  # rows of blocks
        "once": nn.ModuleList([Block()]),
        "cells": nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)]),
    })  # fmt: skip
    stages, cells = model["stages"], model["cells"]
    assert list(all_blocks(model).values()) == [*inner, *stages[1][:2], *cells]


def kept(model, rung):
    """Numbers that a forward keeps for its backward, parameters apart."""
    shapes, own = [], {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            shapes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), installed(rung, model, CPU):
        model(data(1)[0])
    return sum(shapes)


def test_the_more_blocks_run_again_the_less_is_kept():
    model = make()
    amounts = [kept(model, rung) for rung in (None, "checkpointing/4", "checkpointing/2", "checkpointing")]
    assert amounts == sorted(set(amounts), reverse=True)


def test_selective_checkpointing_runs_no_matrix_product_again():
    class Products(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return func(*args, **(kwargs or {}))

    counts = {}
    for rung in (None, "selective_checkpointing", "checkpointing"):
        model, batch = make(), data(1)
        with installed(rung, model, CPU), Products() as products:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        counts[rung] = products.count
    assert counts[None] == counts["selective_checkpointing"] < counts["checkpointing"]


def test_fewer_blocks_than_each_so_many_th_is_said():
    assert "there are but 3 blocks" in obstacle("checkpointing/4", make(blocks=3), CPU, "auto")


def test_experts_inside_a_block_are_part_of_it():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(Block() for _ in range(3))

    layers = nn.ModuleList(Mixture() for _ in range(2))
    assert list(all_blocks(layers).values()) == list(layers)


@pytest.mark.parametrize("rung", ["checkpointing", "checkpointing/2", "selective_checkpointing"])
def test_a_model_of_transformers_uses_its_own_switch_and_gets_it_back(rung):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0,
                                     eos_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, 50, (2, 8))
    before = [dict(vars(part)) for part in model.modules()]
    found = []
    for under in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        if under:
            with installed(rung, model, CPU):
                assert obstacle("checkpointing", model, CPU, "auto") == "the model's own checkpointing is on already"
                loss = model(input_ids=tokens, labels=tokens).loss  # with its cache on, as by default
                loss.backward()
        else:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-7)  # without its cache attention rounds otherwise
    now = [vars(part) for part in model.modules()]
    assert [set(part) for part in now] == [set(part) for part in before]
    assert all(
        part.get("gradient_checkpointing") == was.get("gradient_checkpointing") for part, was in zip(now, before)
    )


@pytest.mark.parametrize(
    ("rung", "model", "precision", "text"),
    [
        ("bf16", make, "fp32", 'precision="fp32" was asked for'),
        ("checkpointing", lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "auto", "no repeated blocks"),
        ("save_on_cpu", make, "auto", "frees nothing here"),
        ("checkpointing+save_on_cpu", make, "auto", "frees nothing here"),
    ],
)
def test_what_cannot_help_says_why(rung, model, precision, text):
    assert text in obstacle(rung, model(), CPU, precision)


def test_the_command_line_has_the_same_rungs():
    from autoaccum.cli.main import fit

    (option,) = [parameter for parameter in fit.params if parameter.name == "ladder"]
    assert list(option.type.choices) == ["auto", *RUNGS]


# --- in a training


def test_the_error_names_every_rung_with_its_peak_and_leaves_nothing_behind():
    given = setup()
    before, generator = copy.deepcopy(given["model"].state_dict()), torch.get_rng_state()
    with pytest.raises(NothingFitsError) as caught:
        autoaccum.probe(**given, **ASKED, memory=ONLY_CHECKPOINTING)
    text = str(caught.value)
    assert "bf16: does not fit, at 2.4 MiB" in text
    assert "; checkpointing: fits, at 1.4 MiB" in text
    assert "chunked_loss, chunked_loss+checkpointing: no head was found" in text
    assert "save_on_cpu, checkpointing+save_on_cpu, optimizer_on_host: frees nothing here" in text
    assert "step_in_backward: does not fit, at 4" in text
    assert text.endswith('ladder="auto" takes checkpointing, the cheapest that fits')
    rows = {row["saver"]: row for row in caught.value.savers}
    assert (rows["checkpointing"]["limit"], rows["checkpointing"]["micro_batch"]) == (1, 1)
    assert rows["checkpointing"]["window_seconds"] > 0
    assert rows["bf16"]["limit"] is None
    assert not rows["bf16"]["same_result"]
    assert bare(given["model"])
    assert all(torch.equal(value, before[name]) for name, value in given["model"].state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_false_looks_at_no_rung():
    with pytest.raises(NothingFitsError) as caught:
        autoaccum.probe(**setup(), **ASKED, memory=ONLY_CHECKPOINTING, ladder=False)
    assert "The ladder" not in str(caught.value)


def test_auto_takes_the_cheapest_that_fits_and_trains_to_the_same_weights():
    notes, given, plain = [], setup(), setup()
    result = autoaccum.fit(
        **given, **ASKED, memory=ONLY_CHECKPOINTING, ladder="auto",
        callbacks=[lambda event: notes.append(event.text) if event.name == "note" else None],
    )  # fmt: skip
    assert result.plan.ladder == result.probe.ladder == "checkpointing"
    assert result.plan.reasons["ladder"].startswith("checkpointing: each of the repeated blocks runs")
    assert any("the ladder's checkpointing is taken" in note for note in notes)
    assert max(record.samples for record in result.history) == 8
    assert bare(given["model"])
    alike = autoaccum.fit(**plain, **ASKED, plan=Plan.from_dict({**result.plan.to_dict(), "ladder": None}))
    assert alike.plan.ladder is None
    for (name, value), other in zip(given["model"].state_dict().items(), plain["model"].state_dict().values()):
        assert torch.equal(value, other), name


def test_the_model_runs_under_the_rung_while_it_trains_and_only_then():
    given = setup()
    loop = autoaccum.prepare(**given, **ASKED, memory=ONLY_CHECKPOINTING, ladder="auto")
    assert bare(given["model"])
    for _ in loop:
        assert "forward" in vars(given["model"].blocks[0])
        break
    del _
    gc.collect()  # the loop was left in the middle of an epoch
    assert bare(given["model"])


@pytest.mark.slow
def test_a_precision_that_was_asked_for_is_not_changed():
    result = autoaccum.fit(**setup(), **ASKED, memory=TWO_WITH_CHECKPOINTING, ladder="auto", precision="fp32")
    assert result.plan.ladder == "checkpointing"
    assert result.plan.micro_batches == (2, 2, 2, 2)
    assert result.verify.ok
    assert result.verify.verifiable  # two samples ran at once, under the rung
    chosen = autoaccum.probe(**setup(), **ASKED, memory=TWO_WITH_CHECKPOINTING, ladder="auto")
    assert chosen.ladder == chosen.plan.ladder == "bf16"
    assert chosen.plan.reasons["precision"] == "bf16 autocast: a rung of the ladder"


def test_a_rung_by_name_is_taken_without_being_needed_and_one_that_cannot_be_is_an_error():
    report = autoaccum.probe(**setup(), **ASKED, memory="64MiB", ladder="checkpointing")
    plain = autoaccum.probe(**setup(), **ASKED, memory="64MiB")
    assert (report.ladder, plain.ladder) == ("checkpointing", None)
    assert report.parts["per_sample"] < plain.parts["per_sample"] / 2
    assert report.limit > 2 * plain.limit
    with pytest.raises(SetupError, match=r'ladder="save_on_cpu" cannot be taken: frees nothing here'):
        autoaccum.probe(**setup(), **ASKED, ladder="save_on_cpu")
    with pytest.raises(SetupError, match=r'ladder="bf16" cannot be taken: precision="fp32"'):
        autoaccum.probe(**setup(), **ASKED, ladder="bf16", precision="fp32")
    with pytest.raises(SetupError, match="ladder='up'"):
        autoaccum.probe(**setup(), **ASKED, ladder="up")


def test_none_that_is_enough_is_said():
    with pytest.raises(NothingFitsError, match=r"checkpointing: does not fit, at 1\.4 MiB.*None of them is enough"):
        autoaccum.fit(**setup(), **ASKED, memory="1200KiB", ladder="auto")


class Fussy(Block):
    """Counts its calls, and does not bear a second one for the same sample."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls % 2 == 0 and torch._C._current_graph_task_id() != -1:
            raise RuntimeError("called again")
        return super().forward(x)


def test_a_rung_that_the_models_code_does_not_bear_is_passed_over_with_its_error():
    given = setup()
    given["model"].blocks = nn.ModuleList(Fussy() for _ in range(12))
    with pytest.raises(NothingFitsError, match="checkpointing: cannot be run, RuntimeError: called again"):
        autoaccum.probe(**given, **ASKED, memory=ONLY_CHECKPOINTING)


def test_the_same_training_again_goes_by_the_kept_answer_of_its_rung(tmp_path):
    first = autoaccum.probe(**setup(), **ASKED, memory="8MiB", ladder="checkpointing")
    again = autoaccum.probe(**setup(), **ASKED, memory="8MiB", ladder="checkpointing")
    plain = autoaccum.probe(**setup(), **ASKED, memory="64MiB")
    assert any("earlier run" in note for note in again.notes)
    assert not any("earlier run" in note for note in (*first.notes, *plain.notes))


@pytest.mark.slow
def test_a_resumed_training_goes_on_under_the_rung_of_its_checkpoint(tmp_path):
    whole, half, rest = setup(), setup(), setup()
    asked = {**ASKED, "memory": ONLY_CHECKPOINTING, "ladder": "auto"}
    autoaccum.fit(**whole, **asked)
    autoaccum.fit(**half, **asked, max_steps=2, checkpoint=tmp_path, checkpoint_every=1)
    trials = []
    loop = autoaccum.prepare(
        **rest, **asked, checkpoint=tmp_path, resume=True,
        callbacks=[lambda event: trials.append(event) if event.name == "trial" else None],
    )  # fmt: skip
    assert loop.plan.ladder == "checkpointing"
    for _ in loop:
        assert "forward" in vars(rest["model"].blocks[0])
    assert not trials
    for (name, value), other in zip(whole["model"].state_dict().items(), rest["model"].state_dict().values()):
        assert torch.equal(value, other), name


def test_a_saved_plan_brings_its_rung_and_says_where_it_cannot(tmp_path):
    made = autoaccum.probe(**setup(), **ASKED, memory=ONLY_CHECKPOINTING, ladder="auto").plan
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    loop = autoaccum.prepare(**setup(), device="cpu", plan=tmp_path / "plan.json")
    for _ in loop:
        assert "forward" in vars(loop.model.blocks[0])
    notes = []
    elsewhere = Plan.from_dict({**made.to_dict(), "ladder": "save_on_cpu"})
    autoaccum.prepare(**setup(), device="cpu", plan=elsewhere, callbacks=[lambda event: notes.append(event.to_dict())])
    assert any("under save_on_cpu, which is left out here: frees nothing" in note.get("text", "") for note in notes)
    older = made.to_dict()
    del older["ladder"]
    assert Plan.from_dict(older).ladder is None
    with pytest.raises(PlanError, match="ladder"):
        Plan.from_dict({**made.to_dict(), "ladder": 3})


class Deadly(Net):
    """Its process is killed by a step that is not checkpointed, as a system short of memory would; not the parent."""

    def forward(self, x):
        plain = torch.is_grad_enabled() and "forward" not in vars(self.blocks[0])
        if plain and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def deadly():
    return {**setup(), "model": Deadly(4), "precision": "fp32"}


@pytest.mark.usefixtures("spawns_warm")
def test_kills_without_a_rung_are_not_held_against_it():
    report = autoaccum.probe(**deadly(), **ASKED, memory="64MiB", ladder="auto", isolate=deadly)
    assert report.ladder == report.plan.ladder == "selective_checkpointing"  # the first that runs its blocks otherwise
    assert report.micro_batch == 8


class Writer(nn.Module):
    """A block that writes to buffers in three ways, and whose output depends on what they hold."""

    def __init__(self):
        super().__init__()
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.plain = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.ones(6))
        self.register_buffer("mask", torch.ones(6))

    def forward(self, x):
        out = torch.tanh(self.plain(self.spectral(x))) * (self.average * self.mask).clone() / (1 + self.calls)
        self.calls = self.calls + 1
        self.average.data.lerp_(out.detach().mean(0), 0.1)
        return x + out


@pytest.mark.parametrize("rung", ["checkpointing", "checkpointing/2", "selective_checkpointing"])
def test_a_block_that_writes_to_its_buffers_does_so_once_and_runs_again_on_what_it_found(rung):
    torch.manual_seed(0)
    model = nn.Sequential(Writer(), Writer(), Writer()).double()
    plain = copy.deepcopy(model)
    for _ in range(3):
        x = torch.randn(4, 6, dtype=torch.float64)
        plain(x).square().mean().backward()
        with installed(rung, model, CPU):
            model(x).square().mean().backward()
    for (name, expected), (_, found) in zip(plain.named_parameters(), model.named_parameters()):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-12, atol=1e-14, msg=name)
    for (name, expected), (_, found) in zip(plain.named_buffers(), model.named_buffers()):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, msg=name)

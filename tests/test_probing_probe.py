"""The probe on real models: exact on the CPU, and without a trace."""

import copy
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import autoaccum
from autoaccum.errors import DataError, LossError, NothingFitsError, PlanError, SetupError
from autoaccum.memory.device import open_device
from autoaccum.memory.host import HostMemory
from autoaccum.memory.resident import resident_bytes
from autoaccum.memory.trace import record
from tests.norms import Force


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path))


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 10)
    )  # fmt: skip


def images(size=300):
    chance = torch.Generator().manual_seed(1)
    return torch.randn(size, 1, 8, 8, generator=chance), torch.randint(0, 10, (size,), generator=chance)


def measured_peak(model, size, optimizer):
    """A window's peak by hand: gradients live, then the optimizer's step; all that this training holds counts."""
    x, y = images(300)
    x, y = x[:size].clone(), y[:size].clone()
    loss = nn.CrossEntropyLoss()
    for _ in range(2):
        loss(model(x), y).backward()
        optimizer.step()
    held = resident_bytes(model, optimizer, x, y)
    with record(open_device("cpu")) as recording:
        loss(model(x), y).backward()
        optimizer.step()
    return held + recording.trace.peak


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_the_limit_is_exact_in_bytes(name):
    model = cnn()
    report = autoaccum.probe(model, images(), loss=nn.CrossEntropyLoss(), optimizer=name, memory="2MiB", device="cpu")
    by_hand = cnn()
    optimizer = (torch.optim.AdamW if name == "adamw" else torch.optim.SGD)(by_hand.parameters(), lr=0.0)
    assert measured_peak(by_hand, report.limit, optimizer) <= 2 * 2**20
    assert measured_peak(by_hand, report.limit + 1, optimizer) > 2 * 2**20
    assert report.micro_batch == report.limit
    assert report.limit_proof == "forecast"
    assert report.out_of_memory_count == 0
    assert sum(trial.kind != "trace" for trial in report.trials) <= 2
    assert report.residual < 1e-3


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 200), nn.GELU(), nn.Linear(200, 10))


@pytest.mark.slow
@pytest.mark.parametrize("budget", [800_000, 2_000_000])
def test_the_answer_holds_where_scratch_follows_no_line(budget):
    """As where the processor multiplies bfloat16 itself: forecasts are far off there until the answer has been run."""
    x, y, loss = torch.randn(4000, 40), torch.randint(0, 10, (4000,)), nn.CrossEntropyLoss()
    arguments = {"loss": loss, "optimizer": "sgd", "precision": "bf16", "device": "cpu"}
    report = autoaccum.probe(perceptron(), (x, y), memory=budget, **arguments)
    by_hand = perceptron()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.0)

    def peak(size):
        inputs, targets = x[:size].clone(), y[:size].clone()

        def step():
            with torch.autocast("cpu", dtype=torch.bfloat16):
                value = loss(by_hand(inputs), targets)
            value.backward()

        step()
        held = resident_bytes(by_hand, optimizer, inputs, targets)
        with record(open_device("cpu")) as recording:
            step()
            optimizer.step()
        return held + recording.trace.peak

    assert peak(report.micro_batch) <= budget
    assert all(peak(size) > budget for size in range(int(report.limit * 1.02) + 1, int(report.limit * 1.1)))
    assert report.out_of_memory_count == 0


def test_a_target_gets_the_fewest_even_micro_batches():
    report = autoaccum.probe(cnn(), images(), loss=nn.CrossEntropyLoss(), target_batch=256, memory="2MiB", device="cpu")
    sizes = report.plan.micro_batches
    assert sum(sizes) == 256
    assert max(sizes) == report.micro_batch <= report.limit
    assert len(sizes) == -(-256 // report.limit)
    assert any(trial.batch == report.micro_batch and trial.outcome == "fits" for trial in report.trials)
    assert report.forecast(report.limit) <= report.budget_bytes < report.forecast(report.limit + 1)
    for wrong in ({"batch": -1}, {"batch": 1.5}, {"batch": 4, "length": 0}):
        with pytest.raises(PlanError, match="give a whole number of 1 or more"):
            report.forecast(**wrong)
    assert {"parameters", "buffers", "gradients", "optimizer_state", "per_sample"} <= report.parts.keys()


class Everything(nn.Module):
    """BatchNorm, dropout, tied and frozen weights, a power-iteration buffer; may fail at a size and a place."""

    def __init__(self, fail_at=10**9, place="forward"):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.last.weight = self.first.weight
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.spectral = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.norm, self.drop, self.head = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)
        self.fail_at, self.place, self.calls = fail_at, place, 0

    def forward(self, x):
        self.calls += 1
        h = self.norm(self.drop(self.last(self.spectral(self.frozen(self.first(x))))))
        if x.shape[0] >= self.fail_at:
            if self.place == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory: injected")
            h.register_hook(self.explode)
        return self.head(h)

    @staticmethod
    def explode(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory: injected")


class FailingAdamW(torch.optim.AdamW):
    """Runs out of memory in its third step, half of the parameters updated."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        super().step(closure)
        if self.steps == 3:
            raise torch.OutOfMemoryError("CUDA out of memory: injected")


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}


def picture(model, optimizer):
    """All state, with clones."""
    return copy.deepcopy(
        {
            "model": dict(model.state_dict()),
            "state": [dict(optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
            "gradients": [p.grad for p in model.parameters()],
            "requires": [p.requires_grad for p in model.parameters()],
            "training": [m.training for m in model.modules()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
            "momentum": model.norm.momentum,
            "calls": model.calls,
            "random": (torch.get_rng_state(), random.getstate()),
        }
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_trace_is_left_bit_for_bit(name, used):
    x, y = torch.randn(200, 8), torch.randint(0, 3, (200,))
    model = Everything()
    optimizer = OPTIMIZERS[name]([p for p in model.parameters() if p.requires_grad])
    if used:
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.norm.eval()  # one layer in eval mode must stay so
    loader = DataLoader(TensorDataset(x, y), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))
    generator = loader.generator.get_state()
    before = picture(model, optimizer)
    autoaccum.probe(
        model, loader, loss=nn.CrossEntropyLoss(), optimizer=optimizer, memory="64KiB", target_batch=128, device="cpu"
    )
    assert same(before, picture(model, optimizer))
    assert torch.equal(loader.generator.get_state(), generator)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_out_of_memory_in_a_trial_leaves_no_trace_and_bounds_the_answer(place):
    data = torch.randn(200, 8), torch.randint(0, 3, (200,))
    model = Everything(fail_at=40, place=place)
    optimizer = OPTIMIZERS["momentum"]([p for p in model.parameters() if p.requires_grad])
    before = picture(model, optimizer)
    report = autoaccum.probe(
        model, data, loss=nn.CrossEntropyLoss(), optimizer=optimizer, target_batch=100, device="cpu"
    )
    assert same(before, picture(model, optimizer))
    assert report.micro_batch < 40
    assert report.out_of_memory_count >= 1
    assert sum(report.plan.micro_batches) == 100


def test_out_of_memory_in_the_optimizers_step_leaves_no_trace():
    data = torch.randn(200, 8), torch.randint(0, 3, (200,))
    model = Everything()
    optimizer = FailingAdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = picture(model, optimizer)
    report = autoaccum.probe(
        model, data, loss=nn.CrossEntropyLoss(), optimizer=optimizer, target_batch=100, device="cpu"
    )
    assert same(before, picture(model, optimizer))
    assert report.out_of_memory_count == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_of_the_users_comes_out_as_it_is_and_leaves_no_trace(error):
    class Broken(Everything):
        def forward(self, x):
            if x.shape[0] > 3:
                raise error("mine")
            return super().forward(x)

    data = torch.randn(200, 8), torch.randint(0, 3, (200,))
    model = Broken()
    optimizer = OPTIMIZERS["adamw"]([p for p in model.parameters() if p.requires_grad])
    before = picture(model, optimizer)
    with pytest.raises(error, match="mine"):
        autoaccum.probe(model, data, loss=nn.CrossEntropyLoss(), optimizer=optimizer, device="cpu")
    assert same(before, picture(model, optimizer))


def test_training_is_the_same_with_and_without_a_probe_before_it():
    def train(plan=None):
        model = cnn()
        result = autoaccum.fit(
            model, images(), loss=nn.CrossEntropyLoss(), target_batch=None if plan else 128, plan=plan, memory="1MiB",
            seed=5, device="cpu", check=plan is None,
        )  # fmt: skip
        return result.plan, model.state_dict()

    plan, probed = train()
    assert plan.accumulation_steps > 1
    _, planned = train(plan)
    assert all(torch.equal(probed[name], planned[name]) for name in probed)


def test_nothing_fits_says_what_fills_the_budget_and_what_would_help():
    with pytest.raises(NothingFitsError, match=r"not even .* fits in 10\.0 KiB.*parameters .* KiB.*would help"):
        autoaccum.probe(cnn(), images(), loss=nn.CrossEntropyLoss(), memory="10KiB", device="cpu")


def test_batch_norm_over_single_values_makes_the_floor_two():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))
    report = autoaccum.probe(model, images(), loss=nn.CrossEntropyLoss(), target_batch=65, memory="64KiB", device="cpu")
    assert report.floor == 2
    assert min(report.plan.micro_batches) >= 2
    assert all(trial.batch >= 2 for trial in report.trials)


@pytest.mark.parametrize(
    ("model", "floor"),
    [
        (lambda: torch.compile(nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)), backend="eager"), 2),
        (lambda: Force(False), 2),
        (lambda: Force(True), 1),
    ],
    ids=["compiled", "asks for gradients", "asks for gradients, spatial"],
)
def test_the_floor_is_found_whatever_the_refusal_is_wrapped_in_and_with_gradients_on(model, floor):
    data = torch.randn(32, 5), torch.randn(32, 5)
    report = autoaccum.probe(model(), data, loss=nn.MSELoss(), target_batch=16, device="cpu")
    assert report.floor == floor


def test_the_second_probe_takes_the_cached_forecast_and_runs_the_answer_once():
    arguments = {"loss": nn.CrossEntropyLoss(), "memory": "2MiB", "target_batch": 256, "device": "cpu"}
    first = autoaccum.probe(cnn(), images(), **arguments)
    second = autoaccum.probe(cnn(), images(), **arguments)
    assert [trial.kind for trial in second.trials] == ["trace", "verify"]
    assert (second.micro_batch, second.limit) == (first.micro_batch, first.limit)
    assert second.forecast(77) == first.forecast(77)
    assert "earlier run" in second.notes[-1]
    other = autoaccum.probe(cnn(), images(), **{**arguments, "memory": "1MiB"})
    assert other.limit < first.limit
    third = autoaccum.probe(cnn(), images(), cache=False, **arguments)
    assert sum(trial.kind == "trace" for trial in third.trials) > 1


def test_a_ceiling_is_kept():
    report = autoaccum.probe(cnn(), images(), loss=nn.CrossEntropyLoss(), max_batch=20, device="cpu")
    assert (report.micro_batch, report.limit, report.limit_proof) == (20, 20, "cap")


def test_the_fastest_is_measured():
    report = autoaccum.probe(
        cnn(), images(), loss=nn.CrossEntropyLoss(), target_batch=256, memory="2MiB", prefer="fastest", device="cpu"
    )
    rates = dict(report.throughput)
    assert len(rates) >= 3
    assert rates[report.micro_batch] >= 0.98 * max(rates.values())
    assert sum(report.plan.micro_batches) == 256
    assert {trial.kind for trial in report.trials} == {"trace", "verify", "throughput"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_batch": 0}, PlanError, "target_batch=0"),
        ({"target_batch": -3}, PlanError, "target_batch=-3"),
        ({"target_batch": 2.5}, PlanError, "target_batch=2.5"),
        ({"target_batch": True}, PlanError, "target_batch=True"),
        ({"memory": "3GiBB"}, SetupError, "3GiBB"),
        ({"memory": "0%"}, SetupError, "0%"),
        ({"prefer": "best"}, SetupError, "prefer='best'"),
        ({"precision": "fp8"}, SetupError, "fp8"),
        ({"optimizer": "lbfgs"}, SetupError, "closure"),
        ({"lr": -1.0}, SetupError, "lr=-1.0"),
        ({"isolate": "yes"}, SetupError, "isolate='yes'"),
        ({"loss": lambda o, t: o}, LossError, "scalar"),
        ({"loss": lambda o, t: o.sum() * float("nan")}, LossError, "nan"),
        ({"loss": lambda o, t: o.sum().detach()}, LossError, "graph"),
    ],
)
def test_bad_input_names_value_and_remedy_and_touches_nothing(arguments, error, message):
    model = cnn()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(error, match=message):
        autoaccum.probe(model, images(), **{"loss": nn.CrossEntropyLoss(), "device": "cpu", **arguments})
    assert same(dict(before), dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.training


def test_empty_data_and_disagreeing_tensors():
    with pytest.raises(DataError, match="empty|no sample"):
        autoaccum.probe(cnn(), [], loss=nn.CrossEntropyLoss(), device="cpu")
    with pytest.raises(DataError, match="3"):
        autoaccum.probe(cnn(), (torch.zeros(3, 1, 8, 8), torch.zeros(4)), loss=nn.CrossEntropyLoss(), device="cpu")


def test_lazy_modules_are_materialised_first():
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.LazyLinear(10))
    report = autoaccum.probe(model, images(), loss=nn.CrossEntropyLoss(), memory="1MiB", device="cpu")
    assert report.micro_batch > 0
    assert model[1].weight.shape == (8, 64)
    assert int(model[2].num_batches_tracked) == 0


def test_a_report_goes_through_json_and_is_drawn(tmp_path):
    import json

    report = autoaccum.probe(cnn(), images(), loss=nn.CrossEntropyLoss(), memory="2MiB", target_batch=256, device="cpu")
    values = json.loads(json.dumps(report.to_dict()))
    assert values["curve"]
    assert {"activations", "parameters", "gradients"} <= set(values["timeline"]["parts"])
    assert max(map(sum, zip(*values["timeline"]["bytes"], strict=True))) == report.forecast(report.micro_batch)
    report.plot(tmp_path / "probe.png")
    assert (tmp_path / "probe.png").stat().st_size > 10_000


def test_memory_that_others_take_during_the_probe_is_seen_before_the_verdict(monkeypatch):
    looked = []

    def host():
        looked.append(4 if len(looked) < 2 else 2)
        return HostMemory(64 * 2**20, looked[-1] * 2**20, "free in the test", "machine")

    monkeypatch.setattr("autoaccum.memory.device.host_memory", host)
    x, y = images(300)
    model = cnn()
    report = autoaccum.probe(model, (x, y), loss=nn.CrossEntropyLoss(), device="cpu", cache=False, optimizer="sgd")
    assert report.micro_batch < 300
    chosen = [trial for trial in report.trials if trial.batch == report.micro_batch]
    assert chosen[-1].peak_bytes <= report.budget_bytes < 2 * 2**20
    assert max(trial.peak_bytes for trial in report.trials) > 2.5 * 2**20, "the first answer was for more"
    (note,) = (note for note in report.notes if "others took memory" in note)
    assert "3.6 MiB were free at its start" in note


THREADS = """
import threading, torch, autoaccum
from torch.nn import functional as F
torch.set_num_threads(1)
found = []

def go():
    model = torch.nn.Linear(6, 4)
    data = (torch.randn(64, 6), torch.arange(64) % 4)
    found.append(autoaccum.probe(model, data, loss=F.cross_entropy, memory="1MiB", device="cpu", cache=False).limit)

threads = [threading.Thread(target=go) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert found == [64, 64, 64], found
"""


@pytest.mark.slow
def test_threads_probe_in_turn():
    """PyTorch's profiler has one session a process: two at once ended in a segmentation fault."""
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=False,
                          cwd=Path(__file__).parents[1])  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_max_batch_under_what_batch_norm_needs_is_refused():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    data, loss = (torch.randn(32, 6), torch.randint(0, 4, (32,))), nn.CrossEntropyLoss()
    with pytest.raises(PlanError, match="max_batch=1 is less than the 2 samples .*BatchNorm.* give max_batch=2"):
        autoaccum.probe(model, data, loss=loss, target_batch=8, max_batch=1, device="cpu")
    report = autoaccum.probe(model, data, loss=loss, target_batch=8, max_batch=2, device="cpu")
    assert report.plan.micro_batches == (2, 2, 2, 2)


def test_where_the_data_end_before_the_memory_the_limit_is_a_cap():
    report = autoaccum.probe(nn.Linear(6, 4), (torch.randn(32, 6), torch.randint(0, 4, (32,))),
                             loss=nn.CrossEntropyLoss(), memory="1MiB", device="cpu")  # fmt: skip
    assert (report.limit, report.limit_proof) == (32, "cap")
    assert report.forecast(33) < report.budget_bytes


# --- a trial is a whole step, whatever its samples are ----------------------------------------------------------------


def training_peak(model, data, **settings):
    """The most bytes in use while a training of a few windows runs."""
    loop = autoaccum.prepare(model, data, check=False, progress=False, device="cpu", cache=False, **settings)
    with record(open_device("cpu")) as recording:
        loop.run()
    return resident_bytes(model) + recording.trace.peak


def wide(inputs=32, outputs=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 1024), nn.ReLU(), nn.Linear(1024, outputs))


def test_the_optimizers_state_counts_though_the_loss_scale_overflows_at_first():
    x, y = 100 * torch.randn(256, 32), 100 * torch.randn(256, 10)
    asked = {"loss": nn.MSELoss(), "target_batch": 256, "precision": "fp16"}
    with pytest.raises(NothingFitsError):
        autoaccum.probe(wide(), (x, y), memory="600KiB", device="cpu", **asked)
    report = autoaccum.probe(wide(), (x, y), memory="2MiB", device="cpu", **asked)
    assert report.parts["optimizer_state"] >= 2 * report.parts["parameters"]
    memory = report.trials[-1].peak_bytes + 1024  # the scaler's own few bytes, and the generators that are kept
    assert training_peak(wide(), (x, y), memory=memory, **asked, epochs=14) <= memory + 2 * y.nbytes + 2 * x.nbytes


class Reader(nn.Module):
    """Predicts tokens; returns its loss, which ignores -100."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.inside = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, 100))

    def forward(self, input_ids, labels):
        logits = self.inside(self.embed(input_ids))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def test_samples_whose_targets_are_all_ignored_make_no_trial():
    ids = torch.randint(0, 100, (256, 16))
    labels = ids.clone()
    plain = autoaccum.probe(Reader(), {"input_ids": ids, "labels": labels}, memory="2MiB", device="cpu", cache=False)
    labels[:8] = -100  # prompts that were cut before the answer
    report = autoaccum.probe(Reader(), {"input_ids": ids, "labels": labels}, memory="2MiB", device="cpu", cache=False)
    assert report.limit == plain.limit
    assert [t.peak_bytes for t in report.trials] == [t.peak_bytes for t in plain.trials]
    labels[:] = -100
    with pytest.raises(DataError, match="every target of the 64 samples looked at is ignored"):
        autoaccum.probe(Reader(), {"input_ids": ids, "labels": labels}, memory="2MiB", device="cpu", cache=False)


def test_windows_that_training_leaves_out_do_not_stop_the_probe():
    x, y = torch.randn(256, 32), torch.randint(0, 10, (256,))
    x[:5] = float("nan")
    asked = {"loss": nn.CrossEntropyLoss(), "target_batch": 64, "device": "cpu", "memory": "4MiB"}
    report = autoaccum.probe(wide(), (x, y), on_nonfinite="skip", **asked)
    result = autoaccum.fit(wide(), (x, y), on_nonfinite="skip", shuffle=False, check=False, progress=False, **asked)
    assert result.plan.micro_batch == report.micro_batch
    assert [record.skipped is not None for record in result.history] == [True, False, False, False]
    assert report.parts["optimizer_state"] >= 2 * report.parts["parameters"]
    with pytest.raises(LossError, match='on_nonfinite="skip"'):
        autoaccum.probe(wide(), (x, y), cache=False, **asked)


def test_where_weights_are_most_of_the_budget_there_is_a_forecast_all_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 10))
    x, y = torch.randn(300, 32), torch.randint(0, 10, (300,))
    report = autoaccum.probe(model, (x, y), loss=nn.CrossEntropyLoss(), memory=1_422_856, device="cpu", cache=False)
    assert report.trials[0].peak_bytes > 0.7 * report.budget_bytes
    assert [trial.kind for trial in report.trials] == ["trace", "trace", "trace", "verify"]
    assert report.forecast(report.limit) <= report.budget_bytes < report.forecast(report.limit + 1)


def test_what_was_measured_over_the_budget_is_not_promised_by_the_forecast_that_it_refutes():
    """oneDNN takes another kernel for this convolution somewhere between 15 and 22 samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    data = torch.randn(300, 3, 9, 9), torch.randint(0, 4, (300, 9, 9))
    asked = {"loss": nn.CrossEntropyLoss(), "optimizer": "sgd", "device": "cpu", "cache": False}
    report = autoaccum.probe(model, data, memory=220_000, target_batch=45, **asked)
    over = [trial for trial in report.trials if trial.outcome == "over budget"]
    if not over:
        pytest.skip("this machine's kernels for 23 samples take what those for 5 do")
    assert report.limit is None
    assert report.limit_proof is None
    assert report.residual > 0.1
    assert any("took" in note and "were forecast: kernels change" in note for note in report.notes)
    assert report.trials[-1].batch == report.micro_batch
    assert report.trials[-1].fits


def test_no_step_is_run_beyond_what_is_free_on_the_host_whatever_is_asked_for(monkeypatch):
    """There is no card of 80 GiB here to answer for; a forecast does."""
    free = HostMemory(64 * 2**20, 20 * 2**20, "20.0 MiB of it", "machine")
    monkeypatch.setattr("autoaccum.memory.device.host_memory", lambda: free)
    model = nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 10))
    data = torch.randn(8192, 64), torch.randint(0, 10, (8192,))
    asked = {"loss": nn.CrossEntropyLoss(), "device": "cpu", "cache": False}
    report = autoaccum.probe(model, data, **asked, memory="80GiB")
    assert report.budget_bytes <= 20 * 2**20
    assert all(trial.peak_bytes <= report.budget_bytes for trial in report.trials if trial.fits)
    assert max(trial.batch for trial in report.trials) < 8192
    assert 'memory="80GiB" asks for 80.0 GiB, which is not there to be used' in report.budget_reason
    assert any("forecast(n) tells what n samples take on a larger device" in note for note in report.notes)
    assert report.forecast(10**6) > report.budget_bytes


@pytest.mark.parametrize(("samples", "more"), [(1, {}), (40, {"max_batch": 1})])
def test_where_one_sample_is_all_that_is_allowed_the_note_says_so(samples, more):
    data = torch.randn(samples, 6), torch.zeros(samples, dtype=torch.long)
    report = autoaccum.probe(nn.Linear(6, 3), data, loss=nn.CrossEntropyLoss(), device="cpu", cache=False, **more)
    assert (report.micro_batch, report.limit_proof) == (1, "cap")
    assert any("there is no forecast, which needs two sizes that are allowed" in note for note in report.notes)


def once():
    return ((torch.randn(6), torch.tensor(0)) for _ in range(100))


def once_setup():
    return {"model": nn.Linear(6, 3), "data": once(), "loss": nn.CrossEntropyLoss(), "device": "cpu"}


@pytest.mark.usefixtures("spawns_warm")
def test_samples_that_a_probe_alone_reads_for_good_are_a_note():
    asked = {"target_batch": 8, "memory": "1MiB", "cache": False}
    given = once_setup()
    report = autoaccum.probe(**given, **asked)
    assert len(list(given["data"])) < 100
    assert sum("can be read only once" in note for note in report.notes) == 1
    loop = autoaccum.prepare(**once_setup(), **asked)
    assert not any("only once" in note for note in loop.probe.notes)
    assert sum(record.samples for record in loop) == 100
    given = once_setup()
    report = autoaccum.probe(**given, **asked, isolate=once_setup)
    assert len(list(given["data"])) == 100
    assert not any("only once" in note for note in report.notes)
    said = autoaccum.probe(**once_setup(), **asked, worst_case=(torch.randn(2, 6), torch.zeros(2, dtype=torch.long)))
    assert not any("only once" in note for note in said.notes)

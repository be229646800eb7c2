"""A trial is no easier than any step of the training: late steps, rare branches, sparse rows, and walls."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.memory.resident import resident_bytes
from autoaccum.memory.trace import record

CPU = SimpleNamespace(torch_device=torch.device("cpu"))
ROWS = 30


def rows(n, width=64):
    torch.manual_seed(0)
    return torch.randn(n, width), torch.randint(10, (n,))


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10))


def peaks(model, data, *, micro_batch, k, windows, **how):
    """The peak in bytes of each window of a real training, the samples that wait apart."""
    loop = autoaccum.prepare(
        model, data, loss=F.cross_entropy, target_batch=micro_batch * k, micro_batch=micro_batch, max_steps=windows,
        check=False, shuffle=False, device="cpu", **how,
    )  # fmt: skip
    found, steps = [], iter(loop)
    for _ in range(windows):
        held = resident_bytes(loop.model, loop.optimizer)
        with record(CPU) as recording:
            next(steps)
        found.append(held + recording.trace.peak)
    return found


def probe(model, data, **how):
    return autoaccum.probe(model, data, loss=F.cross_entropy, device="cpu", cache=False, **how)


class Rarely(torch.optim.SGD):
    """An optimizer with a large buffer at every fiftieth step."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                if state["step"] % 50 == 0:
                    torch.empty(5 * parameter.numel())
        return super().step(closure)


def test_the_step_of_radam_that_takes_most_is_tried():
    """It takes more from its sixth step on, and a probe takes fewer than that."""
    data = rows(2000)
    report = probe(perceptron(), data, optimizer="radam", memory="6500KiB")
    real = peaks(perceptron(), data, micro_batch=100, k=2, windows=8, optimizer="radam")
    assert real[7] > 1.2 * real[2]
    assert report.forecast(report.limit) <= report.budget_bytes < report.forecast(report.limit + 1)
    waiting = 200 * (data[0][0].nbytes + data[1][0].nbytes)  # the window's samples, a copy of these rows
    assert real[7] <= report.forecast(100) + waiting <= 1.02 * real[7]


def test_what_an_optimizer_does_every_so_often_is_tried():
    def often(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr)

    def rarely(parameters, lr):
        return Rarely(parameters, lr=lr)

    plain, more = (probe(perceptron(), rows(64), optimizer=made, max_batch=2) for made in (often, rarely))
    largest = max(parameter.nbytes for parameter in perceptron().parameters())
    assert max(trial.peak_bytes for trial in more.trials) >= max(trial.peak_bytes for trial in plain.trials) + largest


def test_the_optimizers_count_comes_back():
    model, data = perceptron(), rows(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3))
    F.cross_entropy(model(data[0]), data[1]).backward()
    optimizer.step()
    optimizer.zero_grad()
    rate = optimizer.param_groups[0]["lr"]
    probe(model, data, optimizer=optimizer)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(1e-3)


class Branches(nn.Module):
    """One of two layers, by what the first sample is."""

    def __init__(self):
        super().__init__()
        self.one, self.other, self.head = nn.Linear(64, 900), nn.Linear(64, 900), nn.Linear(900, 10)

    def forward(self, x):
        return self.head((self.one if x[0, 0] > 0 else self.other)(x))


def test_a_branch_that_no_sample_of_a_trial_takes_is_counted():
    x, y = rows(256)
    x[:128, 0], x[128:, 0] = 1.0, -1.0
    report = probe(Branches(), (x, y), memory="4MiB", target_batch=256)
    assert any("other.weight and 1 more got no gradient" in note for note in report.notes)
    whole = sum(p.nbytes for p in Branches().parameters())
    assert report.parts["gradients"] == whole
    assert report.parts["optimizer_state"] >= 2 * whole
    real = peaks(Branches(), (x, y), micro_batch=report.micro_batch, k=2, windows=2)
    assert max(real) <= report.forecast(report.micro_batch) + x.nbytes + y.nbytes


def test_a_model_all_of_which_is_used_has_no_such_note():
    assert not probe(perceptron(), rows(64)).notes


class Words(nn.Module):
    def __init__(self, words, *, sparse=True):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(words, 32, sparse=sparse), nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


def texts(n, words):
    torch.manual_seed(0)
    return torch.randint(words, (n, ROWS)), torch.randint(10, (n,))


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 4, 16])
def test_sparse_gradients_of_a_whole_window_fit(k, dtype):
    data = texts(16 * k * 2, 3000)
    report = probe(Words(3000).to(dtype), data, optimizer=sgd, target_batch=16 * k, max_batch=16)
    real = peaks(Words(3000).to(dtype), data, micro_batch=16, k=k, windows=2, optimizer=sgd)
    waiting = 16 * k * (data[0][0].nbytes + data[1][0].nbytes)
    assert max(real) <= report.forecast(16) + waiting
    assert max(real) >= 0.75 * report.forecast(16)


def test_sparse_gradients_are_the_dense_ones():
    data, rate = texts(64, 50), 0.1
    found = []
    for sparse in (True, False):
        result = autoaccum.fit(
            Words(50, sparse=sparse).double(), data, loss=F.cross_entropy, target_batch=32, micro_batch=8, lr=rate,
            optimizer=sgd, shuffle=False, check=False, device="cpu", progress=False,
        )  # fmt: skip
        found.append(torch.cat([p.detach().flatten() for p in result.model.parameters()]))
    assert torch.allclose(*found, rtol=1e-12, atol=1e-14)


class Wall(nn.Module):
    """Out of memory from some size on, for a reason that no forecast sees."""

    def __init__(self, at):
        super().__init__()
        self.layer, self.at = nn.Linear(64, 10), at

    def forward(self, x):
        if len(x) >= self.at:
            raise torch.OutOfMemoryError("out of memory")
        return self.layer(x)


@pytest.mark.slow
@pytest.mark.parametrize("at", [7, 100, 300])
def test_a_limit_below_a_wall_is_not_called_forecast(at):
    report = probe(Wall(at), rows(1200), memory="8MiB")
    assert report.micro_batch == report.limit < at
    assert report.limit_proof == ("out of memory" if report.limit == at - 1 else None)


def test_a_wall_below_what_a_target_needs_leaves_the_limit_unknown():
    report = probe(Wall(300), rows(1200), memory="8MiB", target_batch=512)
    assert report.micro_batch == 256
    assert (report.limit, report.limit_proof) == (None, None)
    assert report.plan.reasons["accumulation_steps"].endswith("since at most 256 samples fit")


def pairs(outputs, targets):
    """Memory grows with the square of the batch."""
    similar = F.normalize(outputs)
    return (similar @ similar.T).logsumexp(1).mean()


def test_where_the_forecast_missed_its_check_no_limit_is_promised_that_was_not_run():
    torch.manual_seed(0)
    report = autoaccum.probe(
        nn.Linear(64, 32), rows(400), loss=pairs, memory="300KiB", target_batch=16, device="cpu", cache=False
    )
    assert report.micro_batch == 16
    assert report.limit is None
    assert report.residual > 0.01
    assert any("off at a further trace" in note for note in report.notes)


def test_the_residual_is_no_better_than_the_trace_near_the_answer():
    torch.manual_seed(0)
    report = autoaccum.probe(nn.Linear(64, 32), rows(400), loss=pairs, memory="300KiB", device="cpu", cache=False)
    misses = [abs(report.forecast(t.batch) / t.peak_bytes - 1) for t in report.trials if 4 * t.batch >= report.limit]
    assert report.residual >= max(misses) > 0.01

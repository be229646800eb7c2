"""Several optimizers that take turns over the same samples: each its own window, exactly."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import CheckpointError, SetupError

torch.manual_seed(0)
REAL, NOISE = torch.randn(46, 6, dtype=torch.float64), torch.randn(46, 3, dtype=torch.float64)


class Gan(nn.Module):
    """A painter of six numbers, and a judge of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.painter = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 6)).double()
        self.judge = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()

    def forward(self, noise):
        return self.judge(self.painter(noise))


def judging(model, batch):
    real, noise = batch
    return F.softplus(-model.judge(real)).mean() + F.softplus(model.judge(model.painter(noise).detach())).mean()


def painting(model, batch):
    return F.softplus(-model(batch[1])).mean()


def phases(model, every=1, kind=torch.optim.SGD, **settings):
    return [
        autoaccum.Phase(judging, model.judge.parameters(), kind, lr=0.5),
        autoaccum.Phase(painting, model.painter, kind, every, lr=0.3, **settings),
    ]


def loop(model, given=None, **settings):
    keywords = {"target_batch": 23, "micro_batch": 9, "shuffle": False, "lr_rule": "none", "device": "cpu",
                "check": False, **settings}  # fmt: skip
    return autoaccum.prepare(model, (REAL, NOISE), phases=phases(model) if given is None else given, **keywords)


def by_hand(model, windows, every=1):
    """The same windows at once."""
    judge = torch.optim.SGD(model.judge.parameters(), lr=0.5)
    painter = torch.optim.SGD(model.painter.parameters(), lr=0.3)
    for index in range(windows):
        batch = (REAL[23 * (index % 2) :][:23], NOISE[23 * (index % 2) :][:23])
        for turn, (step, optimizer) in enumerate(((judging, judge), (painting, painter))):
            if turn and index % every:
                continue
            model.zero_grad()
            step(model, batch).backward()
            optimizer.step()


def same(model, other, within=1e-12):
    return all(
        float((a - b).detach().norm()) <= within * float(b.detach().norm())
        for a, b in zip(model.parameters(), other.parameters())
    )


@pytest.mark.parametrize("every", [1, 2])
def test_each_phase_is_a_window_of_the_same_samples(every):
    model, other = Gan(), Gan()
    records = list(loop(model, phases(model, every), epochs=2))
    by_hand(other, 4, every)
    assert same(model, other)
    assert [record.phase for record in records].count("judging") == 4
    assert [record.phase for record in records].count("painting") == 4 // every
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(record.samples == 23 and record.micro_batches == 3 for record in records)


def test_a_probe_counts_the_optimizer_state_of_all_phases():
    model = Gan().float()
    data = (REAL.float(), NOISE.float())
    before = copy.deepcopy(model.state_dict())
    given = phases(model, kind=torch.optim.AdamW)
    report = autoaccum.probe(model, data, phases=given, target_batch=46, memory="1MiB", device="cpu", cache=False)
    adamw = sum(2 * p.numel() * 4 for p in model.parameters())
    assert adamw <= report.parts["optimizer_state"] < adamw + 200  # two moments, and a count of steps each
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert report.plan.target_batch == 46


def test_the_phase_that_takes_most_decides():
    model = Gan().float()

    def hungry(model, batch):
        return painting(model, batch) + 0 * (batch[1].repeat(1, 400) * model.painter[0].weight.sum()).sum()

    def limit(*given):
        return autoaccum.probe(
            model, (REAL.float(), NOISE.float()), phases=list(given), device="cpu", memory="150KiB", cache=False
        ).micro_batch

    judge, painter = (autoaccum.Phase(judging, model.judge, "sgd"), autoaccum.Phase(hungry, model.painter, "sgd"))
    assert limit(judge, painter) == limit(painter, judge) == limit(painter) < limit(judge)


@pytest.mark.parametrize("failing", ["judge", "painter"])
def test_out_of_memory_in_a_phase_runs_that_phase_again(failing):
    model, other = Gan(), Gan()
    failures = []

    def tight(module, inputs, output):
        if len(inputs[0]) > 5 and torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            failures.append(len(inputs[0]))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    getattr(model, failing).register_forward_hook(tight)
    training = loop(model, epochs=1)
    with pytest.warns(UserWarning, match="the same samples run again") as told:
        records, failed = zip(*((record, len(failures)) for record in training))
    by_hand(other, 2)
    assert same(model, other)
    assert sum("out of memory" in str(each.message) for each in told) == 1
    assert len(set(failed[1:])) == 1  # later windows of both phases are cut smaller
    assert {record.micro_batches for record in records[2:]} == {6}


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path):
    def run(folder, epochs, **other):
        model = Gan()
        given = phases(model, 2, torch.optim.AdamW, schedule="cosine")
        loop(model, given, epochs=epochs, checkpoint=folder, checkpoint_every=1, seed=3, shuffle=True, **other).run()
        return model

    whole = run(tmp_path / "a", 3)
    interrupted = Gan()
    stopping = loop(
        interrupted, phases(interrupted, 2, torch.optim.AdamW, schedule="cosine"), epochs=3,
        checkpoint=tmp_path / "b", checkpoint_every=1, seed=3, shuffle=True,
    )  # fmt: skip
    for record in stopping:
        if record.step == 2 and record.phase == "judging":
            break
    del stopping
    assert same(run(tmp_path / "b", 3), whole, within=0)
    other = Gan()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="painting, every 1"):
        loop(other, phases(other, 1, torch.optim.AdamW), epochs=3, checkpoint=tmp_path / "b", seed=3, shuffle=True)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in before.items()), "nothing was put back"


def test_left_between_two_phases_it_goes_on_with_the_second():
    model, other = Gan(), Gan()
    running = loop(model, epochs=1)
    for _ in running:
        break
    with pytest.raises(CheckpointError, match="half a window"):
        running.state_dict()
    running.run()
    by_hand(other, 2)
    assert same(model, other)


def test_the_gradient_of_each_phase_is_checked():
    model = Gan()

    def contrastive(model, batch):
        found = model.painter(batch[1])
        return F.cross_entropy(found @ found.T, torch.arange(len(found)))

    given = [phases(model)[0], autoaccum.Phase(contrastive, model.painter, "sgd")]
    with pytest.raises(autoaccum.errors.LossError, match="batch-coupled loss: .* compared with one another"):
        loop(model, given, check=True)
    assert loop(model, check=True).verify.ok


def refused(model, case):
    judge, painter = phases(model)
    return {
        "shared parameters": ([judge, autoaccum.Phase(painting, model, "sgd")], {}, "share a parameter"),
        "another's optimizer": (
            [autoaccum.Phase(judging, model.judge, torch.optim.SGD(model.painter.parameters(), lr=1.0))], {},
            "does not name"),
        "never due": ([autoaccum.Phase(judging, model.judge, "sgd", 2)], {}, "every=1"),
        "no phases": ([], {}, "give a list of autoaccum.Phase"),
        "something else": ([painting], {}, "give a list of autoaccum.Phase"),
        "a loss beside them": ([judge, painter], {"loss": nn.MSELoss()}, "leave loss away"),
        "a clip beside them": ([judge, painter], {"clip_norm": 0.5}, "leave clip_norm away"),
        "a schedule beside them": ([judge, painter], {"schedule": "cosine"}, "leave schedule away"),
        "foreign parameters": ([autoaccum.Phase(judging, Gan().judge, "sgd")], {}, "not the model's"),
    }[case]  # fmt: skip


@pytest.mark.parametrize(
    "case", ["shared parameters", "another's optimizer", "never due", "no phases", "something else",
             "a loss beside them", "a clip beside them", "a schedule beside them", "foreign parameters"],
)  # fmt: skip
def test_phases_that_cannot_be_are_refused(case):
    model = Gan()
    given, settings, words = refused(model, case)
    with pytest.raises(SetupError, match=words):
        loop(model, given, **settings)


def test_a_phase_without_parameters_is_refused():
    model = Gan()
    spent = model.judge.parameters()
    list(spent)
    with pytest.raises(SetupError, match="names no parameters"):
        autoaccum.Phase(judging, spent, "sgd")

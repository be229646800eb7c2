"""From model, data and settings to a plan and a loop."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.data.source import open_source
from autoaccum.data.trial_samples import looked_at
from autoaccum.errors import SetupError
from autoaccum.session import Session
from tests.norms import Force

LOSS = nn.CrossEntropyLoss()
DATA = torch.randn(32, 5), torch.randn(32, 5)


def minimum_of(model):
    asked = {"loss": nn.MSELoss(), "device": "cpu", "micro_batch": 8, "target_batch": 16}
    return Session(model, DATA, asked).plan().minimum


def test_a_compiled_model_says_in_its_own_way_that_batch_norm_needs_two():
    """TorchDynamo makes a RuntimeError of the layer's ValueError."""
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    assert minimum_of(torch.compile(model, backend="eager")) == 2


@pytest.mark.parametrize(("spatial", "minimum"), [(False, 2), (True, 1)])
def test_a_model_may_ask_for_gradients_inside_its_forward(spatial, minimum):
    assert minimum_of(Force(spatial)) == minimum


def test_other_errors_of_the_models_come_out_as_they_are():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            raise RuntimeError("of the model's own")

    with pytest.raises(RuntimeError, match="^of the model's own$"):
        autoaccum.prepare(Broken(), DATA, loss=nn.MSELoss(), target_batch=16, micro_batch=8, device="cpu")


# --- the samples that the gradient check is given ---


def of_those_that_count(outputs, labels):
    """A mean whose denominator is not declared."""
    return F.cross_entropy(outputs[labels != -100], labels[labels != -100])


def labelled(ignored, seed=0):
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (400,), generator=chance)
    labels[torch.rand(400, generator=chance) < ignored] = -100
    return torch.randn(400, 5, generator=chance), labels


@pytest.mark.parametrize("ignored", [0, 0.05])
def test_labels_that_are_left_out_are_seen_however_few(ignored):
    """One in twenty: of eight samples, two times in three none is left out."""
    report = autoaccum.verify(nn.Linear(5, 4), labelled(ignored), loss=of_those_that_count, device="cpu")
    assert report.ok
    assert "as its graph says" in report.text
    declared = {"loss": of_those_that_count, "reduction": "sample_mean"}
    assert autoaccum.verify(nn.Linear(5, 4), labelled(ignored), device="cpu", **declared).ok == (not ignored)


@pytest.mark.parametrize(("width", "targets", "want"), [(5, 4, 64), (2**22, 4, 15), (5, None, 64)])
def test_more_samples_are_looked_at_where_labels_may_count_unequally_and_samples_are_small(width, targets, want):
    """Samples of 16 MiB: 16 of them are 256 MiB."""
    labels = torch.randn(400) if targets is None else torch.arange(400) % targets
    source = open_source((torch.zeros(1).expand(400, width), labels))
    assert len(looked_at(source, 8)[1]) == want


class Segments(nn.Module):
    """A model whose own loss leaves out labels of 255."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.layer(x), labels, ignore_index=255)}


@pytest.mark.parametrize("settings", [{"micro_batch": 4}, {"micro_batch": 4, "check": False}, {}])
def test_the_reason_names_the_label_that_is_left_out(settings):
    data = {"x": torch.randn(24, 6), "labels": torch.tensor([0, 1, 2, 255] * 6)}
    loop = autoaccum.prepare(Segments(), data, target_batch=8, device="cpu", cache=False, **settings)
    assert "targets other than 255" in loop.plan.reasons["denominator"]


def test_an_epoch_shorter_than_the_target_is_run_and_told_as_it_is():
    """40 samples where 64 were asked for: all 40 fit at once."""
    data = torch.randn(40, 6), torch.randint(0, 4, (40,))
    model, loss = nn.Linear(6, 4), nn.CrossEntropyLoss()
    result = autoaccum.fit(model, data, loss=loss, target_batch=64, lr=0.1, lr_batch=10, optimizer="sgd", device="cpu",
                           cache=False)  # fmt: skip
    (record,) = result.history
    plan = result.plan
    assert (record.samples, record.micro_batches) == (40, 1)
    assert plan.micro_batches == (40,)
    assert record.lr == pytest.approx(0.4), "the rate is for the 40 samples that a step has"
    assert plan.reasons["accumulation_steps"].startswith("1 micro-batch of 40")
    assert plan.reasons["target_batch"] == ("40 samples an optimizer step, where 64 were asked for: an epoch has 40")
    assert autoaccum.Plan.from_dict(plan.to_dict()) == plan


def test_a_huge_target_over_little_data_is_planned_at_once():
    data = torch.randn(24, 6), torch.randint(0, 4, (24,))
    loop = autoaccum.prepare(nn.Linear(6, 4), data, loss=nn.CrossEntropyLoss(), target_batch=2**31, device="cpu",
                             cache=False, epochs=10**9)  # fmt: skip
    assert loop.plan.micro_batches == (24,)
    assert loop.total_steps == 10**9


@pytest.mark.parametrize("isolate", [lambda: {}, 3, "yes", [1]], ids=["lambda", "number", "word", "list"])
def test_what_no_child_process_can_build_from_is_refused_by_name(isolate):
    data = torch.randn(24, 6), torch.randint(0, 4, (24,))
    with pytest.raises(SetupError, match="child process"):
        autoaccum.probe(nn.Linear(6, 4), data, loss=nn.CrossEntropyLoss(), target_batch=8, device="cpu", cache=False,
                        isolate=isolate)  # fmt: skip


# --- a probe of copies, in a child process ---


def tied():
    """A model with one parameter in two places, an optimizer that has stepped, and a view for data."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    whole = torch.randn(128, 6)
    return {"model": model, "data": (whole[:64], whole[64:]), "loss": nn.MSELoss(), "optimizer": optimizer}


@pytest.mark.slow
def test_a_child_probes_copies_of_what_can_be_pickled():
    given = tied()
    before = [tensor.clone() for tensor in given["model"].state_dict().values()]
    asked = {"target_batch": 32, "device": "cpu", "cache": False, "memory": "1MiB"}
    told = []
    loop = autoaccum.prepare(**given, **asked, isolate=True, callbacks=[told.append])
    here = autoaccum.probe(**given, **asked)
    assert loop.probe.micro_batch == here.micro_batch
    assert loop.probe.forecast(48) == here.forecast(48)
    assert [trial.batch for trial in loop.probe.trials] == [trial.batch for trial in here.trials]
    assert any(type(event).__name__ == "TrialRan" for event in told)
    assert all(torch.equal(a, b) for a, b in zip(before, given["model"].state_dict().values(), strict=True))
    loop.run()


def test_what_cannot_be_sent_to_a_child_is_named_with_what_to_give_instead():
    given = {**tied(), "loss": lambda outputs, targets: (outputs - targets).square().mean()}
    with pytest.raises(SetupError, match=r"isolate=True: loss=<function .*cannot be sent to a child.*isolate=f"):
        autoaccum.probe(**given, target_batch=32, device="cpu", isolate=True)


# --- each step does one thing, once ---


def test_a_session_keeps_what_its_steps_found():
    told = []
    asked = {"loss": nn.MSELoss(), "device": "cpu", "target_batch": 16, "cache": False, "callbacks": [told.append]}
    session = Session(nn.Linear(5, 5), DATA, asked)
    report = session.probe()
    ran = len(told)
    assert session.probe() is report
    assert session.plan() is session.plan()
    assert session.check() is session.check()
    loop = session.loop()
    assert (loop.probe, loop.plan, loop.verify) == (report, session.plan(), session.check())
    assert [event for event in told[ran:] if type(event).__name__ == "TrialRan"] == []

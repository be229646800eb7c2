"""Checkpoints: a training that ended early goes on to the very end it would have come to; what is damaged is seen."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import CheckpointError, DataError, SetupError
from autoaccum.training.checkpoint import ABOUT, STATE, Checkpoints, Entry
from autoaccum.training.events import TrainingWarning
from autoaccum.training.locks import FolderLock
from tests.torture import kills

X = torch.randn(52, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(52) % 3


class Interruption(Exception):
    """Stands for whatever ends a training early."""


def net(width=16, extra=0):
    torch.manual_seed(1)
    layers = [nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3)]
    layers += [nn.Linear(width, width) for _ in range(extra)]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def prepared(folder=None, model=None, data=None, **keywords):
    """A training of 4 epochs of 5 windows; the generators start elsewhere each time, as in a new process."""
    torch.manual_seed(random.SystemRandom().getrandbits(31))
    given = {"target_batch": 12, "micro_batch": 5, "loss": nn.CrossEntropyLoss(), "epochs": 4, "seed": 3,
             "check": False, "device": "cpu", "checkpoint": folder, **keywords}  # fmt: skip
    return autoaccum.prepare(model or net(), data if data is not None else (X, Y), **given)


def run_until(step, folder, **keywords):
    """Trains, and is interrupted after the step."""

    def listen(event):
        if event.name == "step" and event.record.step == step:
            raise Interruption

    loop = prepared(folder, callbacks=[listen], **keywords)
    with pytest.raises(Interruption):
        loop.run()
    return loop


def came_to(loop):
    """All that a training came to, for a comparison bit by bit."""
    records = [{**record.to_dict(), "seconds": 0, "samples_per_second": 0} for record in loop.history]
    tensors = [tensor.clone() for tensor in loop.model.state_dict().values()]
    for state in loop.optimizer.state_dict()["state"].values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return records, loop.evaluations, tensors


def assert_same(got, want):
    assert got[0] == want[0]
    assert got[1] == want[1]
    assert len(got[2]) == len(want[2])
    assert all(torch.equal(a, b) for a, b in zip(got[2], want[2]))


def undisturbed(**keywords):
    loop = prepared(**keywords)
    loop.run()
    return came_to(loop)


def finished(folder, **keywords):
    loop = prepared(folder, **keywords)
    loop.run()
    return came_to(loop)


def names(folder):
    return sorted(entry.name for entry in Checkpoints(folder).entries())


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [4, 5, 19, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 8))])
def test_a_training_that_was_interrupted_anywhere_goes_on_to_the_same_end_bit_for_bit(tmp_path, step):
    settings = {"val_data": (X[:10], Y[:10]), "schedule": "cosine", "warmup_steps": 3, "clip_norm": 1.0}
    run_until(step, tmp_path, checkpoint_every=1, **settings)

    assert_same(finished(tmp_path, checkpoint_every=1, **settings), undisturbed(**settings))


@pytest.mark.parametrize("name", list(kills.TRAININGS))
def test_every_kind_of_data_goes_on_from_an_older_checkpoint_too(tmp_path, name):
    """What was trained after the checkpoint is trained again, and nothing of it shows."""
    model = kills._model

    def arguments():
        torch.manual_seed(11)
        random.seed(11)
        numpy.random.seed(11)
        given = {"seed": 3, "epochs": 3, **kills.TRAININGS[name]()}
        return {"model": model(), "data": given.pop("data"), **given}

    def train(folder, stop=None):
        given = arguments()

        def listen(event):
            if event.name == "step" and event.record.step == stop:
                raise Interruption

        loop = autoaccum.prepare(
            given.pop("model"), given.pop("data"), target_batch=12, micro_batch=5, loss=nn.CrossEntropyLoss(),
            check=False, device="cpu", checkpoint=folder, checkpoint_every=None if folder is None else 3,
            callbacks=[listen], **given,
        )  # fmt: skip
        if stop is None:
            loop.run()
        else:
            with pytest.raises(Interruption):
                loop.run()
        return came_to(loop)

    train(tmp_path, stop=8)
    newest = names(tmp_path)[-1]
    shutil.rmtree(tmp_path / newest)

    assert_same(train(tmp_path), train(None))


def test_going_on_asks_neither_the_probe_nor_the_gradient_check_and_keeps_the_grown_k(tmp_path):
    class Tight(nn.Sequential):
        def forward(self, x):
            if len(x) > 3 and self.training and torch.is_grad_enabled():
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    def model():
        torch.manual_seed(1)
        return Tight(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))

    with pytest.warns(TrainingWarning, match="out of memory"):
        run_until(7, tmp_path, model=model(), micro_batch=12)
    heard = []
    loop = prepared(tmp_path, model=model(), micro_batch=None, check=True, callbacks=[lambda e: heard.append(e.name)])

    assert loop.step == 7
    assert loop.plan.micro_batches == (3, 3, 3, 3)
    assert loop.verify is None
    assert "trial" not in heard
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainingWarning)
        loop.run()
    assert "replay" not in heard


def test_the_probes_and_the_checks_reports_are_kept(tmp_path):
    first = prepared(tmp_path, micro_batch=None, check=True, cache=False)
    first.run()
    report = (tmp_path / "report.json").read_text()
    again = prepared(tmp_path, micro_batch=None, check=True)
    again.run()

    assert json.loads(report)["curve"]
    assert (tmp_path / "report.json").read_text() == report, "the forecast is not in a checkpoint"
    assert again.probe.trials == first.probe.trials
    assert again.probe.micro_batch == first.probe.micro_batch
    assert again.verify == first.verify
    assert again.plan == first.plan


def test_without_a_number_of_steps_a_checkpoint_comes_whenever_so_much_time_has_passed(tmp_path, monkeypatch):
    monkeypatch.setattr("autoaccum.training.run_folder.PATIENCE_SECONDS", 0.0)
    heard = []
    loop = prepared(tmp_path, checkpoint_every=None, epochs=1, callbacks=[heard.append])
    loop.run()
    assert {event.step for event in heard if event.name == "checkpoint"} == {record.step for record in loop.history}


def test_a_training_that_came_to_its_end_is_not_trained_further(tmp_path):
    want = finished(tmp_path)
    steps = []
    assert_same(finished(tmp_path, callbacks=[lambda e: steps.append(e) if e.name == "step" else None]), want)
    assert steps == []


def test_more_steps_than_before_go_on_from_where_the_training_ended(tmp_path):
    finished(tmp_path, max_steps=7)
    assert_same(finished(tmp_path, max_steps=17), undisturbed(max_steps=17))


def test_a_state_can_be_carried_by_hand(tmp_path):
    want = undisturbed()
    loop = prepared()
    for record in loop:
        if record.step == 8:
            break
    torch.save(loop.state_dict(), tmp_path / "state.pt")
    other = prepared()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    other.run()

    assert_same(came_to(other), want)


def test_a_state_from_another_kind_of_device_goes_on_and_says_what_differs():
    loop = prepared()
    next(iter(loop))
    state = {**loop.state_dict(), "device": "cuda"}
    heard = []
    other = prepared(callbacks=[heard.append])
    other.load_state_dict(state)
    assert "from cuda, and the training goes on on cpu" in heard[0].text
    assert other.run().history[-1].step == 20


def test_half_a_window_is_no_state(tmp_path):
    class Curious(nn.Linear):
        def forward(self, x):
            if self.training:
                with pytest.raises(CheckpointError, match="half a window"):
                    loop.state_dict()
                seen.append(1)
            return super().forward(x)

    seen = []
    loop = prepared(model=Curious(6, 3))
    next(iter(loop))
    assert seen


def test_what_a_state_dict_leaves_out_is_kept_all_the_same(tmp_path):
    """Buffers that are not persistent; a version that a module wrote; optimizer state finer than the parameters."""

    class Counting(nn.Linear):
        _version = 7

        def __init__(self):
            super().__init__(6, 3, dtype=torch.bfloat16)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)

        def forward(self, x):
            self.calls += 1
            return super().forward(x.bfloat16())

        def _load_from_state_dict(self, state, prefix, metadata, *rest):
            versions.append(metadata.get("version"))
            super()._load_from_state_dict(state, prefix, metadata, *rest)

    class Fine(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    master = self.state[parameter].setdefault("master", parameter.detach().float().clone())
                    master.sub_(parameter.grad.float(), alpha=group["lr"])
                    parameter.data.copy_(master)

    def train(folder, stop=None):
        torch.manual_seed(1)
        keywords = {"model": Counting(), "optimizer": lambda p, lr: Fine(p, lr=lr), "lr": 1e-4}
        loop = prepared(folder, **keywords) if stop is None else run_until(stop, folder, **keywords)
        if stop is None:
            loop.run()
        state = [loop.model.calls, loop.model.weight, *(s["master"] for s in loop.optimizer.state.values())]
        return [tensor.detach().clone() for tensor in state]

    versions = []
    train(tmp_path, stop=8)
    got, want = train(tmp_path), train(None)
    assert [tensor.dtype for tensor in got] == [torch.int64, torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert versions == [7]


def test_a_scheduler_of_the_users_own_goes_on(tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)

    run_until(7, tmp_path, schedule=schedule)
    got, want = finished(tmp_path, schedule=schedule), undisturbed(schedule=schedule)
    assert_same(got, want)
    assert len({record["lr"] for record in got[0]}) == 20


def test_schedulers_one_after_another_go_on_with_the_milestones_they_had(tmp_path):
    rates = torch.optim.lr_scheduler

    def schedule(optimizer):
        steps = [rates.LinearLR(optimizer, 0.1, total_iters=4), rates.MultiStepLR(optimizer, [2, 5, 5], gamma=0.5)]
        return rates.SequentialLR(optimizer, steps, milestones=[4])

    run_until(2, tmp_path, checkpoint_every=1, schedule=schedule)  # where the second takes over it counts them
    assert_same(finished(tmp_path, checkpoint_every=1, schedule=schedule), undisturbed(schedule=schedule))


def test_an_error_of_the_data_is_saved_up_to_and_gone_on_from_once_it_is_repaired(tmp_path):
    class Broken(torch.utils.data.Dataset):
        broken = False

        def __len__(self):
            return 52

        def __getitem__(self, index):
            if self.broken and index == 17:
                raise OSError("unreadable")
            return X[index] + torch.randn(6), Y[index]

    data = Broken()
    loop = prepared(tmp_path, data=data)
    data.broken = True  # preparing reads samples too, and would have said so
    with pytest.raises(DataError, match=r"sample 17 .*unreadable"):
        loop.run()
    assert names(tmp_path)
    data.broken = False
    assert_same(finished(tmp_path, data=data), undisturbed(data=data))


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "was", "now"),
    [
        ({"target_batch": 13}, "12", "13"),
        ({"data": (X[:51], Y[:51])}, "52", "51"),
        ({"model": net(width=20)}, r"shape \(16, 6\)", r"shape \(20, 6\)"),
        ({"model": net(extra=1)}, "none", r"float32 of shape"),
        ({"model": net().double(), "data": (X.double(), Y)}, "float32", "float64"),
        ({"optimizer": "sgd"}, "AdamW with 6", "SGD with 6"),
        ({"seed": 4}, "3", "4"),
    ],
    ids=["target", "length", "shape", "layer", "dtype", "optimizer", "seed"],
)
def test_a_checkpoint_of_another_training_is_refused_with_both_values(tmp_path, changed, was, now):
    run_until(6, tmp_path)
    with pytest.raises(CheckpointError, match=rf"{was}.* in the checkpoint, .*{now}.* here.*resume=False"):
        prepared(tmp_path, **changed)


def steps(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2)


def warmed_up(optimizer):
    parts = [torch.optim.lr_scheduler.LinearLR(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 2)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [2])


@pytest.mark.parametrize(
    ("then", "now", "was", "here"),
    [
        (steps, "cosine", "StepLR", "LambdaLR"),
        (steps, "constant", "StepLR", "None"),
        ("constant", "cosine", "None", "LambdaLR"),
        (steps, warmed_up, "StepLR", r"SequentialLR\(LinearLR, StepLR\)"),
    ],
)
def test_another_schedule_is_another_training_and_changes_nothing(tmp_path, then, now, was, here):
    state = run_until(6, tmp_path, schedule=then).state_dict()
    with pytest.raises(CheckpointError, match=rf"schedule: {was} in the checkpoint, {here} here.*resume=False"):
        prepared(tmp_path, schedule=now)
    other = prepared(schedule=now, model=net())
    before = [tensor.clone() for tensor in other.model.state_dict().values()]
    with pytest.raises(CheckpointError, match="schedule: "):
        other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.state_dict().values()))
    prepared(tmp_path, schedule=then)


def test_a_loss_that_holds_nothing_may_be_a_module_or_a_function(tmp_path):
    run_until(6, tmp_path, loss=nn.functional.cross_entropy)
    assert_same(finished(tmp_path), undisturbed())
    assert_same(finished(tmp_path, loss=nn.functional.cross_entropy), undisturbed())
    with pytest.raises(CheckpointError, match=r"loss's 'weight': none in the checkpoint, float32 of shape \(3,\) here"):
        prepared(tmp_path, loss=nn.CrossEntropyLoss(weight=torch.ones(3)))


def test_a_refused_state_changes_nothing(tmp_path):
    state = prepared().state_dict()
    other = prepared(model=net(width=20))
    before = [tensor.clone() for tensor in other.model.state_dict().values()]
    with pytest.raises(CheckpointError, match="of another training"):
        other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(before, other.model.state_dict().values()))


def test_resume_true_wants_a_checkpoint_false_starts_anew_and_auto_takes_what_there_is(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        prepared(tmp_path, resume=True)
    want = undisturbed()
    run_until(6, tmp_path)
    assert prepared(tmp_path, resume=True).step == prepared(tmp_path).step == 6
    old = names(tmp_path)

    assert_same(finished(tmp_path, resume=False), want)
    assert names(tmp_path / "earlier-1") == old
    assert (tmp_path / "earlier-1" / "metrics.jsonl").exists()
    assert prepared(tmp_path).step == 20


def test_checkpoints_of_before_they_were_folders_are_told_of_and_set_aside_with_their_record(tmp_path):
    old = {f"step-00000004-epoch-0-window-4{end}": f"their {end}" for end in (".pt", ".json")}
    for name, text in (old := {**old, "plan.json": "theirs", "metrics.jsonl": "their steps"}).items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=r"step-00000004-epoch-0-window-4\.pt is a checkpoint of an earlier"):
        prepared(tmp_path).run()
    run_until(3, tmp_path, resume=False)
    assert {path.name: path.read_text() for path in (tmp_path / "earlier-1").iterdir()} == old
    assert prepared(tmp_path).step == 3


def test_settings_that_need_a_folder_say_so_when_there_is_none(tmp_path):
    with pytest.raises(SetupError, match="checkpoint_every=5"):
        prepared(checkpoint_every=5)
    with pytest.raises(SetupError, match="resume=True"):
        prepared(resume=True)
    with pytest.raises(SetupError, match="checkpoint=3 is of type int: give the path of a folder"):
        prepared(3)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        prepared(tmp_path / "file")


def test_what_only_code_can_make_is_named_when_it_is_to_be_saved(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"when": object()}

        def set_extra_state(self, state):
            pass

    loop = prepared(model=nn.Sequential(Odd(6, 3)))
    with pytest.raises(CheckpointError, match=r"the model\['0\._extra_state'\]\['when'\] is a object"):
        loop.state_dict()


# --- damage ---------------------------------------------------------------------------------------------------------


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(bytes(contents))


def no_json(path):
    (path.parent / ABOUT).write_text("{")


def no_about(path):
    (path.parent / ABOUT).unlink()


DAMAGES = [cut_off, flip, no_json, no_about, lambda path: path.unlink(), lambda path: path.write_bytes(b"")]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut off", "flipped", "json", "no json", "gone", "empty"])
def test_the_checkpoint_before_a_damaged_one_is_used_loudly(tmp_path, damage):
    run_until(8, tmp_path, checkpoint_every=2)
    newest, before = names(tmp_path)[-1], names(tmp_path)[-2]
    damage(tmp_path / newest / STATE)
    heard = []

    with pytest.warns(TrainingWarning, match=newest):
        loop = prepared(tmp_path, checkpoint_every=2, callbacks=[heard.append])
    assert loop.step == int(before[5:13])
    assert any(newest in event.text for event in heard if event.name == "note")
    loop.run()
    assert_same(came_to(loop), undisturbed())
    assert (tmp_path / f"{newest}.damaged").is_dir()


def test_where_all_are_damaged_auto_begins_anew_loudly_and_true_refuses(tmp_path):
    run_until(6, tmp_path)
    for name in names(tmp_path):
        flip(tmp_path / name / STATE)
    with pytest.warns(TrainingWarning, match="damaged"), pytest.raises(CheckpointError, match="no checkpoint"):
        prepared(tmp_path, resume=True)
    with pytest.warns(TrainingWarning, match="damaged .*, and the training starts anew"):
        assert_same(finished(tmp_path), undisturbed())


def vouch(path):
    """Puts the right checksum of a checkpoint's state into its about.json."""
    about = json.loads((path / ABOUT).read_text())
    contents = (path / STATE).read_bytes()
    about["files"][STATE] = [len(contents), hashlib.sha256(contents).hexdigest()]
    (path / ABOUT).write_text(json.dumps(about))


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("vouched", [True, False])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, vouched):
    folder = tmp_path / "run"
    run_until(6, folder)
    path = folder / names(folder)[-1]
    evil = Evil()
    evil.path = tmp_path / "it ran"
    torch.save({"state": evil}, path / STATE)
    if vouched:  # whoever wrote it also wrote the checksum
        vouch(path)

    with pytest.raises(CheckpointError, match="has code in it, and nothing of it was run"):
        prepared(folder)
    assert not evil.path.exists()


# --- saving ---------------------------------------------------------------------------------------------------------


def test_the_last_three_are_kept_and_the_best(tmp_path):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.1])
    loop = prepared(tmp_path, val_data=(X[:10], Y[:10]), epochs=6)
    loop._evaluator.evaluate = lambda: {"loss": next(losses)}
    loop.run()

    assert names(tmp_path) == [f"step-{5 * n:08}-epoch-{n}-window-0" for n in (2, 4, 5, 6)]
    assert Checkpoints(tmp_path).best() == Entry(10, 2, 0)
    assert {path.name for name in names(tmp_path) for path in (tmp_path / name).iterdir()} == {STATE, ABOUT}
    assert [path.name for path in tmp_path.glob(".*")] == [".run.lock"]


def test_an_epoch_without_a_validation_loss_is_neither_the_best_nor_in_the_way_of_it(tmp_path):
    losses = iter([math.nan, 3.0, 1.0, math.nan])
    loop = prepared(tmp_path, val_data=(X[:10], Y[:10]))
    loop._evaluator.evaluate = lambda: {"loss": next(losses)}
    loop.run()
    assert Checkpoints(tmp_path).best() == Entry(15, 3, 0)

    losses = iter([math.nan, 3.0, 1.0, math.nan])
    loop = prepared(tmp_path / "rare", val_data=(X[:10], Y[:10]), checkpoint_every=100)
    loop._evaluator.evaluate = lambda: {"loss": next(losses)}
    loop.run()
    assert Checkpoints(tmp_path / "rare").best() == Entry(15, 3, 0), "only the best and the last are saved"


def test_a_checkpoint_is_told_of_when_it_is_on_the_disk(tmp_path):
    told = []

    def listen(event):
        if event.name == "checkpoint":
            assert {path.name for path in Path(event.path).iterdir()} == {STATE, ABOUT}
            told.append(event.step)

    prepared(tmp_path, checkpoint_every=5, callbacks=[listen], max_steps=13).run()
    assert told == [5, 10, 13]


def test_an_epoch_that_takes_long_is_saved_in_between(tmp_path, monkeypatch):
    clock = [0.0]
    watch = SimpleNamespace(monotonic=lambda: clock[0], strftime=time.strftime, gmtime=time.gmtime)
    monkeypatch.setattr("autoaccum.training.run_folder.time", watch)
    told = []
    loop = prepared(tmp_path, callbacks=[lambda e: told.append(e.step) if e.name == "checkpoint" else None], epochs=1)
    for _ in loop:
        clock[0] += 250
    assert told == [4, 5], "after 750 seconds, and at the end of the epoch"
    told.clear()
    for _ in prepared(tmp_path / "other", checkpoint_every=10, epochs=1, callbacks=loop.events._listeners):
        clock[0] += 10**6
    assert told == [5], "steps were asked for: the clock has no say"


def test_a_full_disk_costs_checkpoints_and_not_the_training(tmp_path, monkeypatch):
    real = torch.save

    def save(state, file):
        if full:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(state, file)

    monkeypatch.setattr(torch, "save", save)
    full = []
    loop = prepared(tmp_path, checkpoint_every=5)
    with pytest.warns(TrainingWarning) as said:  # noqa: PT031  # the loop is the statement
        for record in loop:
            full[:] = [1] * (5 <= record.step < 18)
    assert [str(warning.message) for warning in said if "No space left" in str(warning.message)] == [
        f"the checkpoint of step {step} could not be saved to '{tmp_path}': [Errno 28] No space left on device. "
        "The training goes on"
        for step in (10, 15)
    ]
    assert_same(came_to(loop), undisturbed())
    assert names(tmp_path) == ["step-00000005-epoch-0-window-5", "step-00000020-epoch-3-window-5",
                               "step-00000020-epoch-4-window-0"]  # fmt: skip
    assert "2 of 5 saves" in loop.run().unsaved


def test_a_folder_that_cannot_be_written_is_said_each_time_and_at_the_end(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(TrainingWarning, match="could not be saved") as said:
        result = prepared(tmp_path / "file" / "run").run()
    assert len(said) == 5  # the record, and a checkpoint each epoch
    assert "Not a directory" in result.unsaved
    assert result.to_dict()["unsaved"] == result.unsaved
    assert prepared().run().unsaved is None


def test_a_failed_save_leaves_the_one_before_as_it_was(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    store.write(Entry(1, 0, 1), {"value": 1}, {})
    assert store.settle() == Entry(1, 0, 1)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    store.write(Entry(2, 0, 2), {"value": 2}, {})
    with pytest.raises(OSError, match="Input/output"):
        store.settle()
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001-epoch-0-window-1"]
    assert not list(tmp_path.glob(".*.tmp"))
    assert Checkpoints(tmp_path).newest(pytest.fail) == (Entry(1, 0, 1), {"value": 1})


ENDING = """
import os, sys, time
from pathlib import Path
import torch
from autoaccum.training.checkpoint import Checkpoints, Entry
write = os.fsync
os.fsync = lambda file: (time.sleep(0.5), write(file))
Checkpoints(Path(sys.argv[1])).write(Entry(1, 0, 1), {"value": torch.ones(3)}, {})
"""


def test_a_checkpoint_that_is_being_finished_when_the_program_ends_is_finished(tmp_path):
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", ENDING, tmp_path], env={**os.environ, "PYTHONPATH": root}, check=False)
    assert done.returncode == 0
    entry, state = Checkpoints(tmp_path).newest(pytest.fail)
    assert entry == Entry(1, 0, 1)
    assert state["value"].tolist() == [1.0, 1.0, 1.0]


def test_a_checkpoint_has_its_name_when_all_of_it_is_on_the_disk_and_the_renaming_is_forced_there_too(
    tmp_path, monkeypatch
):
    done, opened, real = [], {}, os.open

    def opening(path, *rest):
        handle = real(path, *rest)
        opened[handle] = Path(path).name.split(".")[1 if Path(path).name.startswith(".") else 0]
        return handle

    replace = os.replace
    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(("fsync", opened[handle])))
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("name", Path(b).name)) or replace(a, b))
    store, entry = Checkpoints(tmp_path / "run"), Entry(1, 0, 1)
    store.write(entry, {"value": 1}, {})
    store.settle()
    assert done == [
        ("fsync", "state"), ("fsync", "about"), ("name", ABOUT), ("fsync", entry.name), ("name", entry.name),
        ("fsync", "run"),
    ]  # fmt: skip


def test_a_checkpoint_of_the_same_moment_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path)
    for value in (1, 2):
        store.write(Entry(1, 0, 1), {"value": value}, {})
        store.settle()
    assert store.newest(pytest.fail) == (Entry(1, 0, 1), {"value": 2})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    store.write(Entry(1, 0, 1), {"value": 3}, {})
    with pytest.raises(OSError, match="Input/output"):
        store.settle()
    assert store.newest(pytest.fail) == (Entry(1, 0, 1), {"value": 2})
    assert [path.name for path in tmp_path.iterdir()] == [Entry(1, 0, 1).name]


def test_a_checkpoint_half_cleared_away_is_no_checkpoint(tmp_path, monkeypatch):
    """As where the program is killed in the middle of it."""
    store = Checkpoints(tmp_path, keep=1)
    store.write(Entry(1, 0, 1), {"value": 1}, {})
    store.settle()
    monkeypatch.setattr(shutil, "rmtree", lambda path: (path / ABOUT).unlink())
    store.write(Entry(2, 0, 2), {"value": 2}, {})
    store.settle()
    monkeypatch.undo()
    assert store.entries() == [Entry(2, 0, 2)]
    Checkpoints(tmp_path).begin(Entry(2, 0, 2))
    assert [path.name for path in tmp_path.iterdir()] == [Entry(2, 0, 2).name]


def test_what_a_file_server_puts_beside_a_checkpoints_files_is_no_damage(tmp_path):
    store = Checkpoints(tmp_path)
    store.write(Entry(1, 0, 1), {"value": 1}, {})
    store.settle()
    (store.path(Entry(1, 0, 1)) / "@eaDir").mkdir()
    assert store.newest(pytest.fail) == (Entry(1, 0, 1), {"value": 1})


# --- the record -----------------------------------------------------------------------------------------------------


def test_the_folder_has_the_runs_record_and_each_step_once(tmp_path):
    heard = []
    run_until(8, tmp_path, checkpoint_every=3)
    for name in names(tmp_path)[-1:]:
        (tmp_path / name / ABOUT).unlink()  # the last one is lost, and two steps with it
    with pytest.warns(TrainingWarning):
        loop = prepared(tmp_path, checkpoint_every=3, callbacks=[heard.append])
    loop.run()

    assert autoaccum.Plan.load(tmp_path / "plan.json") == loop.plan
    assert json.loads((tmp_path / "report.json").read_text()) is None
    runs = json.loads((tmp_path / "environment.json").read_text())["runs"]
    assert [(run["resumed_at"], run["torch"]) for run in runs] == [(0, torch.__version__), (6, torch.__version__)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["record"]["step"] for line in lines if line["event"] == "step"] == list(range(1, 21))
    assert [line["event"] for line in lines if line["event"] in ("start", "end")] == ["start", "start", "end"]
    assert [line["resumed_at"] for line in lines if line["event"] == "start"] == [0, 6]
    assert any(f"record is in {tmp_path}" in event.text for event in heard if event.name == "note")


def test_the_probes_report_is_in_the_record(tmp_path):
    loop = prepared(tmp_path, micro_batch=None, cache=False)
    loop.run()
    assert json.loads((tmp_path / "report.json").read_text())["micro_batch"] == loop.probe.micro_batch


# --- kills ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trainings_killed_at_random_moments_come_to_the_same_end(tmp_path):
    """The command that `make torture` runs at full size."""
    import subprocess
    import sys

    answer = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", "--kills", "5", "--shard-kills", "0", "--ooms", "0",
         "--interrupts", "0", "--soak", "0", "--sharded", "0", "--cost", "0", "--json", str(answer)],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(answer.read_text())["kills"]
    assert figures["bit-identical"] == figures["trainings"] == 5
    assert figures["kills"] >= 5


HOLDER = """
import sys
from pathlib import Path
from autoaccum.training.locks import FolderLock
lock = FolderLock(Path(sys.argv[1]), "run")
assert lock.holder() is None
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_trains_in_is_refused(tmp_path):
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        loop = prepared(tmp_path)
        with pytest.raises(CheckpointError, match=f"another training, process {process.pid} on .*, writes to"):
            loop.run()
    finally:
        process.communicate("")
    loop.run()
    assert names(tmp_path)


def test_a_killed_trainings_workers_do_not_keep_its_folder(tmp_path):
    """They live on for seconds, and a supervisor starts the training again at once."""
    # Both write, each line in one piece: by then the worker has let go.
    forks = "import os, time\nworker = os.fork()\nos.write(1, f'{worker}\\n'.encode())\ntime.sleep(60)"
    code = HOLDER.replace("sys.stdin.read()", forks)
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    worker = max(int(process.stdout.readline()) for _ in range(2))
    process.kill()
    process.wait()
    try:
        os.kill(worker, 0)  # is still there
        assert FolderLock(tmp_path, "run").holder() is None
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_second_loop_of_this_process_waits_for_the_first_ones_end(tmp_path):
    first = iter(prepared(tmp_path))
    next(first)  # left where it stands, as in a notebook
    second = prepared(tmp_path)
    with pytest.raises(CheckpointError, match=r"a loop of this same process, writes to .*its iterator was closed"):
        second.run()
    first.close()
    second.run()
    assert names(tmp_path)[-1].startswith("step-00000020")


def test_what_was_saved_since_a_loop_was_prepared_is_not_taken_for_damaged(tmp_path):
    run_until(3, tmp_path)
    stale = prepared(tmp_path)
    prepared(tmp_path).run()
    with pytest.raises(CheckpointError, match=r"another training has saved to .*prepare it anew"):
        stale.run()
    assert prepared(tmp_path).step == 20


def test_a_loop_does_not_come_back_to_a_folder_that_another_has_trained_in_since(tmp_path):
    first = prepared(tmp_path)
    next(iter(first))
    second = prepared(tmp_path, resume=False)
    second.run()
    whole = names(tmp_path)
    with pytest.raises(CheckpointError, match="another training has saved to"):
        first.run()
    assert names(tmp_path) == whole
    assert first.step == 1


def test_the_folder_is_its_holders_whatever_its_process_id_is(tmp_path):
    """Two containers on one volume may both be process 1."""
    mine, other = FolderLock(tmp_path, "run"), FolderLock(tmp_path, "run")
    assert mine.holder() is None
    assert mine.holder() is None
    assert other.holder() == "a loop of this same process"
    (tmp_path / ".run.lock").write_text(json.dumps([os.getpid(), "elsewhere"]))
    assert other.holder() == f"process {os.getpid()} on elsewhere"
    mine.release()
    assert other.holder() is None


# --- names of ours --------------------------------------------------------------------------------------------------


def test_a_training_set_aside_never_takes_a_number_that_is_there(tmp_path):
    for _ in range(3):
        finished(tmp_path, resume=False)
    shutil.rmtree(tmp_path / "earlier-1")
    loop = prepared(tmp_path, resume=False, seed=4)
    loop.run()
    assert {path.name for path in tmp_path.glob("earlier-*")} == {"earlier-2", "earlier-3"}
    again = prepared(tmp_path, seed=4)
    assert again.history == loop.history


def test_where_the_folder_cannot_be_readied_nothing_is_saved_until_it_can(tmp_path, monkeypatch):
    finished(tmp_path, max_steps=3)
    contents = lambda path: path.read_bytes() if path.is_file() else sorted(map(Path.read_bytes, path.iterdir()))  # noqa: E731
    old = {path.name: contents(path) for path in tmp_path.iterdir() if path.name != ".run.lock"}
    real = Path.rename

    def rename(path, target):
        if refused:
            raise PermissionError(13, "Permission denied")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    refused, said = [1], []
    loop = prepared(tmp_path, resume=False, checkpoint_every=2, callbacks=[said.append])
    with pytest.warns(TrainingWarning, match="nothing of it is saved there until that is mended"):  # noqa: PT031
        for record in loop:
            if record.step == 5:
                assert {path.name: contents(path) for path in tmp_path.iterdir() if path.name in old} == old
                assert names(tmp_path) == [name for name in old if name.startswith("step-")]
                refused.clear()
    assert {path.name for path in (tmp_path / "earlier-1").iterdir()} == set(old)
    assert "3 of 12 saves" in loop.run().unsaved
    assert prepared(tmp_path, checkpoint_every=2).step == 20


def test_files_of_the_users_own_are_left_alone(tmp_path):
    run_until(6, tmp_path)
    theirs = [".notes.tmp", ".step-00000003.tmp", "step-7", "step-7-epoch-1-window-2", "step-00000004-epoch-0-window-4"]
    for name in theirs:
        (tmp_path / name).write_text(name)
    copied = tmp_path / "step-00000003-epoch-0-window-3"
    copied.mkdir()
    (copied / "notes").write_text("copied here without its about.json")
    half = tmp_path / f".step-00000004-epoch-0-window-4.{'0' * 32}.tmp"
    half.mkdir()
    (half / STATE).write_text("half")
    with pytest.warns(TrainingWarning, match=r"step-00000004.* was being written"):
        prepared(tmp_path).run()
    assert [(tmp_path / name).read_text() for name in theirs] == theirs
    assert (tmp_path / f"{copied.name}.damaged" / "notes").read_text() == "copied here without its about.json"
    assert not half.exists()


@pytest.mark.parametrize("name", [".run.lock", "metrics.jsonl", ".step-00000002-epoch-0-window-2.tmp"])
def test_links_in_the_folder_are_not_written_through(tmp_path, name):
    theirs, folder = tmp_path / "theirs", tmp_path / "run"
    theirs.write_text("kept\n" * 100)
    folder.mkdir()
    (folder / name).symlink_to(theirs)
    loop = prepared(folder, checkpoint_every=2, max_steps=3)
    if name.endswith(".tmp"):
        loop.run()
        assert names(folder)
    else:
        with pytest.warns(TrainingWarning, match="symbolic link"):
            result = loop.run()
        assert not names(folder), "and nothing is saved in such a folder"
        assert "symbolic link" in result.unsaved
    assert theirs.read_text() == "kept\n" * 100
    assert (folder / name).is_symlink()


def test_what_is_there_to_go_on_from_is_its_owners_alone(tmp_path):
    before = os.umask(0o022)
    try:
        prepared(tmp_path, max_steps=2).run()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    public = {name for name, mode in modes.items() if mode == 0o644}
    assert public == {"plan.json", "report.json", "metrics.jsonl"}, "environment.json has the command"
    assert {mode for name, mode in modes.items() if name not in public} == {0o600}
    assert [path.stat().st_mode & 0o777 for path in tmp_path.glob("step-*")] == [0o700]


# --- an about.json of any shape, and right checksums of wrong contents --------------------------------------------

SHAPES = [
    "null", "[]", "3", '"text"', "{}", "[" * 100_000, '{"bytes": 1e999}', '{"bytes": true}', '{"bytes": [1]}',
    '{"step": 1' + "0" * 5000 + "}",
]  # fmt: skip


def test_an_about_json_of_any_shape_falls_back_to_the_checkpoint_before(tmp_path):
    run_until(6, tmp_path / "run", checkpoint_every=2)
    for number, text in enumerate(SHAPES):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        newest = names(folder)[-1]
        (folder / newest / ABOUT).write_text(text)
        with pytest.warns(TrainingWarning, match=rf"{newest} is damaged"):
            assert prepared(folder, checkpoint_every=2).step == 4, text[:20]


def test_an_about_json_that_is_damaged_beside_a_training_does_not_end_it(tmp_path):
    loop = prepared(tmp_path, checkpoint_every=2)
    for record in loop:
        if record.step == 5:
            (tmp_path / names(tmp_path)[0] / ABOUT).write_text("null")
    assert_same(came_to(loop), undisturbed())
    assert loop.run().unsaved is None


@pytest.mark.parametrize(
    "wrong", [{"step": 5}, {"epoch": -1}, {"files": {}}, {"files": {STATE: [1]}}, {"loss": "small"}]
)
def test_a_json_that_says_something_else_than_its_name_or_file_is_damaged(tmp_path, wrong):
    run_until(6, tmp_path, checkpoint_every=2)
    path = tmp_path / names(tmp_path)[-1] / ABOUT
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))
    with pytest.warns(TrainingWarning, match="its about.json cannot be used"):
        assert prepared(tmp_path, checkpoint_every=2).step == 4


def vouched_for(folder, state):
    """Makes the newest checkpoint hold `state`, under the right checksum."""
    path = folder / names(folder)[-1]
    torch.save(state, path / STATE)
    vouch(path)


MISSING = object()
WRONG = [
    ("metrics", MISSING), ("metrics", "0"), ("metrics", -1), ("schema", MISSING), ("identity", MISSING),
    ("identity", 3), ("identity", []), ("modules", MISSING), ("modules", []), ("modules.model", 3),
    ("modules.model.state", []), ("modules.model.versions", 3),
    *((f"turns.each.0.{name}", value) for name, value in (
        ("optimizer", MISSING), ("optimizer", []), ("optimizer.param_groups", 3), ("optimizer.param_groups", []),
        ("optimizer.state", None), ("noise_scale", {}), ("noise_scale", None), ("scaler", MISSING),
        ("scheduler", MISSING), ("scheduler", 3), ("name", MISSING), ("name", "other"), ("step", "6"), ("step", -6),
        ("step", True),
    )),
    ("turns", MISSING), ("turns.each", 3), ("turns.each", []), ("turns.each", [3]), ("turns.windows", -1),
    ("validation_batch", -2), ("validation_batch", "5"), ("ranks", MISSING), ("ranks", []),
    ("ranks", [3]), ("ranks", [{}]), ("ranks", [{"random": {}, "data": []}]), ("ranks", [{"random": 3, "data": []}]),
    ("progress", MISSING), ("progress", []),
    ("progress.epoch", 1.5), ("progress.window", 10**400), ("progress.evaluation_due", 1), ("plan", MISSING),
    ("plan", []), ("plan.lr_scale", 0), ("plan.limits", []), ("turns.replays", MISSING), ("turns.replays.before", 3),
    ("turns.replays.undisturbed", -1), ("probe", MISSING), ("probe", 3), ("probe", {}),
    ("verify", {"x": 1}), ("history", MISSING), ("history", {}), ("history.numbers", {}),
    ("history.numbers.step", torch.zeros(3)), ("history.texts", []), ("evaluations", None),
    ("evaluations", [3]), ("evaluations", [{}]),
]  # fmt: skip


def changed(state, where, value):
    """A copy with the value at the dotted path changed, or gone."""
    name, _, rest = where.partition(".")
    if isinstance(state, list):
        return [changed(state[int(name)], rest, value), *state[1:]]
    if rest:
        return {**state, name: changed(state[name], rest, value)}
    return {key: each for key, each in {**state, name: value}.items() if each is not MISSING}


def test_a_right_checksum_of_a_wrong_structure_is_a_checkpoint_error_that_says_where(tmp_path):
    run_until(6, tmp_path)
    state = torch.load(tmp_path / names(tmp_path)[-1] / STATE, weights_only=True)
    for whole in (None, [], 3, "text", {}):
        vouched_for(tmp_path, whole)
        with pytest.raises(CheckpointError):
            prepared(tmp_path)
    for where, value in WRONG:
        vouched_for(tmp_path, changed(state, where, value))
        with pytest.raises(CheckpointError) as raised:
            next(iter(prepared(tmp_path)))
        message = str(raised.value)
        assert len(message) < 600, (where, message)
        assert "\n" not in message, (where, message)
    vouched_for(tmp_path, state)
    assert_same(finished(tmp_path), undisturbed())


@pytest.mark.parametrize("folder", ["x" * 5000, "a\0b"])
def test_a_name_that_is_none_of_a_folders_is_told_in_one_short_line(folder):
    with pytest.raises(CheckpointError, match="is no folder") as caught:
        Checkpoints(folder)
    assert len(str(caught.value)) < 250

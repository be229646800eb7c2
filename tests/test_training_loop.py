"""The loop: windows in, records out; epochs, steps, evaluation, what is skipped, and how it ends early."""

import gc
import multiprocessing
import shutil
import signal
import time
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import autoaccum
from autoaccum.errors import AutoaccumError, DataError, LossError, NothingFitsError, PlanError, SetupError
from autoaccum.training.events import StopTraining, TrainingWarning
from autoaccum.training.fit_result import History
from autoaccum.window.record import StepRecord

X = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(50) % 3


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def prepared(**keywords):
    given = {"model": net(), "data": (X, Y), "target_batch": 16, "micro_batch": 5, "loss": nn.CrossEntropyLoss(),
             "seed": 3, "check": False, "device": "cpu", **keywords}  # fmt: skip
    return autoaccum.prepare(given.pop("model"), given.pop("data"), **given)


def test_every_window_is_the_target_but_a_short_last_one():
    result = prepared(epochs=2).run()
    assert [record.samples for record in result.history] == [16, 16, 16, 2] * 2
    assert [record.step for record in result.history] == list(range(1, 9))
    assert [record.epoch for record in result.history] == [0] * 4 + [1] * 4
    assert [record.micro_batches for record in result.history] == [4, 4, 4, 1] * 2


def test_steps_decide_over_as_many_epochs_as_they_take():
    loop = prepared(max_steps=6)
    loop.run()
    assert (loop.step, loop.epoch, len(loop.history)) == (6, 1, 6)


def test_nothing_but_iteration_trains_and_leaving_goes_on_later():
    loop = prepared(epochs=2)
    before = loop.model[0].weight.clone()
    assert torch.equal(before, loop.model[0].weight)
    first = [record for _, record in zip(range(3), loop)]
    rest = list(loop)
    whole = prepared(epochs=2)
    whole.run()
    assert [record.step for record in (*first, *rest)] == list(range(1, 9))
    assert torch.equal(loop.model[0].weight, whole.model[0].weight)


@pytest.mark.parametrize("windows", [1, 8])
def test_a_loaders_workers_end_with_the_loop(windows):
    """Without Python's collector, which would find their queues first, and wait five seconds for each worker."""
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, num_workers=1, persistent_workers=True)
    gc.collect()
    gc.disable()
    try:
        loop = prepared(data=loader, micro_batch=None, memory="1MiB", epochs=2)
        records = [record for _, record in zip(range(windows), loop)]
        assert multiprocessing.active_children()
        del loop
        assert len(records) == windows
        assert not multiprocessing.active_children()
    finally:
        gc.enable()


def test_an_iterator_that_was_left_and_kept_gives_way_to_the_next():
    loop = prepared(epochs=2)
    loop.model.eval()
    left = iter(loop)
    next(left)
    assert [record.step for record in loop] == list(range(2, 9))
    assert not loop.model.training
    with pytest.raises(SetupError, match="another iteration .* is at step 8"):
        next(left)


def test_a_loop_that_ended_goes_on_ending():
    loop = prepared()
    ended = iter(loop)
    assert len(list(ended)) == 4
    assert list(loop) == []
    assert list(ended) == []


def test_two_iterators_in_turn_train_no_window_twice():
    loop, steps = prepared(epochs=2), []
    with pytest.raises(SetupError, match="a loop trains each window once"):
        for pair in zip(loop, loop):
            steps += [record.step for record in pair]
    assert steps == [1, 2]
    assert [record.step for record in loop] == list(range(3, 9))


@pytest.mark.parametrize("again", [list, autoaccum.TrainingLoop.run])
def test_a_loop_is_not_trained_from_inside_its_own_window(again):
    asked = []

    def listen(event):
        if event.name == "step" and not asked:
            asked.append(event)
            again(loop)

    loop = prepared(callbacks=[listen])
    with pytest.raises(SetupError, match=r"iterated while it trains .*loop\.history"):
        loop.run()
    assert [record.step for record in loop] == [2, 3, 4]


def test_leaving_a_loop_ends_it_at_once():
    loop = prepared(epochs=2)
    loop.model.eval()
    for _ in loop:
        assert loop.model.training
        break
    assert not loop.model.training


def test_the_same_seed_trains_the_same_twice():
    assert [r.loss for r in prepared().run().history] == [r.loss for r in prepared().run().history]


def test_each_epoch_ends_with_an_evaluation_and_the_model_stays_as_it_was():
    def accuracy(outputs, targets):
        return autoaccum.Mean((outputs.argmax(1) == targets).sum(), len(targets))

    loop = prepared(epochs=3, val_data=(X[:20], Y[:20]), metrics={"accuracy": accuracy})
    loop.model.eval()
    modes = []
    for _ in loop:
        modes.append(loop.model.training)
    assert all(modes)
    assert not loop.model.training, "as it was before"
    assert [(each["epoch"], each["step"]) for each in loop.evaluations] == [(1, 4), (2, 8), (3, 12)]
    assert set(loop.evaluate()) == {"loss", "accuracy"}
    assert loop.evaluations[-1]["loss"] == pytest.approx(loop.evaluate()["loss"])


def test_the_last_steps_of_a_training_counted_in_steps_are_evaluated_too():
    loop = prepared(max_steps=6, val_data=(X[:20], Y[:20]))
    loop.run()
    assert [(each["epoch"], each["step"]) for each in loop.evaluations] == [(1, 4), (1, 6)]


def test_events_come_in_the_order_of_what_happens():
    heard = []
    prepared(callbacks=[lambda event: heard.append(event.name)]).run()
    assert heard == ["start", "step", "step", "step", "step", "epoch", "end"]


def test_what_a_listener_raises_reaches_the_user_as_it_is():
    class Mine(Exception):
        pass

    def listen(event):
        if event.name == "step":
            raise Mine

    loop = prepared(callbacks=[listen])
    with pytest.raises(Mine):
        loop.run()
    assert [record.step for record in loop.history] == [1]


def test_an_epoch_without_a_window_says_so():
    with pytest.raises(DataError, match="gave no window of 64 samples"):
        prepared(data=zip(X, Y), target_batch=64, micro_batch=16, tail="drop").run()


# --- losses that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_norm", "micro_batch"), [(False, 8), (True, 8), (True, 16)])
def test_a_loss_that_is_not_finite_names_step_and_samples(batch_norm, micro_batch):
    x = X.clone()
    x[33, 2] = float("inf")
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if batch_norm else nn.LayerNorm(8), nn.Linear(8, 3))
    with pytest.raises(LossError, match=r"the loss of step \d+ is nan.*window \d of epoch 0.* 33") as caught:
        prepared(model=model, data=(x, Y), micro_batch=micro_batch).run()
    assert "it comes from sample 33 of the data" in str(caught.value)
    assert all(layer.training for layer in model)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


def test_the_samples_are_named_by_a_loaders_own_order_too_and_the_order_goes_on_from_there():
    def sampler():
        generator = torch.Generator().manual_seed(4)
        return torch.utils.data.RandomSampler(Y, replacement=True, generator=generator)

    drawn = list(sampler())
    bad = next(index for place, index in enumerate(drawn) if place >= 16 and index not in drawn[:16])
    x = X.clone()
    x[bad, 2] = float("inf")
    settings = {"data": DataLoader(TensorDataset(x, Y), batch_size=5, sampler=sampler()), "lr_batch": 16, "seed": None}
    with pytest.raises(LossError, match=rf"step 2 is nan.* {bad}\b.* of the data"):
        prepared(**settings).run()
    settings["data"] = DataLoader(TensorDataset(x, Y), batch_size=5, sampler=sampler())
    skipped = prepared(on_nonfinite="skip", **settings).run().history[1].skipped
    assert f"samples {', '.join(map(str, drawn[16:24]))} and 8 more of the data" in skipped
    left_out = [place // 16 for place, index in enumerate(drawn) if index == bad]
    settings["data"] = DataLoader(TensorDataset(x, Y), batch_size=5, sampler=sampler())
    found = [bool(record.skipped) for record in prepared(on_nonfinite="skip", **settings).run().history]
    assert found == [window in left_out for window in range(4)]


def test_windows_that_are_not_finite_can_be_left_out_and_leave_no_trace():
    x = X.clone()
    x[33] = float("nan")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    heard = []
    result = prepared(model=model, data=(x, Y), on_nonfinite="skip", callbacks=[heard.append]).run()
    skipped = [record for record in result.history if record.skipped]
    assert len(skipped) == 1
    assert "33" in skipped[0].skipped or "more of the data" in skipped[0].skipped
    assert [event.text for event in heard if event.name == "skip"] == [skipped[0].skipped]
    assert torch.isfinite(model[1].running_mean).all(), "the window's statistics are left out as well"
    assert result.history[-1].step == 3


def test_weights_that_went_astray_are_told_from_a_bad_sample():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(LossError, match="every sample of the window gives it"):
        prepared(model=model).run()


# --- the end before the end ------------------------------------------------------------------------------------------


def test_a_listener_can_ask_for_the_end(tmp_path):
    def listen(event):
        if event.name == "step" and event.record.step == 2:
            raise StopTraining("enough")

    heard = []
    loop = prepared(callbacks=[listen, lambda event: heard.append(event.name)], checkpoint=tmp_path)
    result = loop.run()
    assert result.stopped == "enough"
    assert heard.count("step") == 2, "listeners behind it hear the event too"
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000002-epoch-0-window-2"]
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert prepared(checkpoint=tmp_path / "copy").run().stopped is None
    assert loop.run().stopped is None, "asked again, it goes on"


@pytest.mark.parametrize(("when", "steps"), [("start", 0), ("epoch", 4)])
def test_a_stop_between_two_windows_trains_none_more(when, steps):
    """Early stopping asks at an epoch's end."""

    def listen(event):
        if event.name == when:
            raise StopTraining("enough")

    loop = prepared(callbacks=[listen], epochs=5)
    result = loop.run()
    assert (len(result.history), result.stopped) == (steps, "enough")


def test_a_stop_at_the_last_epochs_end_is_none():
    def listen(event):
        if event.name == "epoch":
            raise StopTraining("enough")

    assert prepared(callbacks=[listen], epochs=1).run().stopped is None


def test_signal_handlers_are_the_users():
    def mine(*_):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        seen = []
        prepared(callbacks=[lambda event: seen.append(signal.getsignal(signal.SIGTERM))]).run()
        assert set(seen) == {mine}
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


class Dies(torch.utils.data.Dataset):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        if index == 40 and torch.utils.data.get_worker_info() is not None:  # preparing reads samples without a worker
            import os

            os._exit(3)
        return X[index], Y[index]


def test_a_worker_that_dies_ends_the_training_with_what_was_trained_saved(tmp_path):
    loader = DataLoader(Dies(), batch_size=5, num_workers=1)
    with warnings.catch_warnings(), pytest.raises(DataError, match="a worker of the DataLoader died"):
        warnings.simplefilter("ignore")
        prepared(data=loader, checkpoint=tmp_path, lr_batch=16).run()
    assert list(tmp_path.glob("step-*"))


# --- the history -----------------------------------------------------------------------------------------------------


def record(step, **values):
    return StepRecord(**{"step": step, "epoch": 0, "loss": 0.1, "lr": 1e-3, "grad_norm": None, "samples": 16,
                         "micro_batches": 2, "seconds": 0.25, "samples_per_second": 64.0, **values})  # fmt: skip


def test_a_history_gives_back_what_was_put_in():
    records = [record(1), record(2, grad_norm=float("inf"), peak_bytes=2**40 + 1), record(2, loss=3.0, skipped="why")]
    history = History(records)
    assert history == records
    assert history[-1].skipped == "why"
    assert history[1:] == records[1:]
    assert isinstance(history[0].step, int)
    assert [each.loss for each in history] == [0.1, 0.1, 3.0]
    with pytest.raises(IndexError):
        history[3]

    other = History()
    other.load_state_dict(history.state_dict())
    assert other == history
    other.append(record(3))
    assert len(other) == 4


def test_a_history_of_another_version_has_none_where_it_lacks_a_column():
    state = History([record(1, grad_norm=2.0)]).state_dict()
    del state["numbers"]["grad_norm"]
    other = History()
    other.load_state_dict(state)
    assert other == [record(1)]
    empty = History()
    empty.load_state_dict(History().state_dict())
    assert empty == []


def test_no_hook_stays_on_the_model_and_a_second_iteration_pools_again():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    x, y = torch.randn(32, 4), torch.randint(0, 2, (32,))
    loop = autoaccum.prepare(
        model, (x, y), loss=nn.CrossEntropyLoss(), target_batch=16, micro_batch=8, epochs=2, device="cpu", check=False
    )
    for _ in loop:
        break
    del _
    counted = int(model[1].num_batches_tracked)
    assert counted == 1
    loop.run()
    assert int(model[1].num_batches_tracked) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- a check that could see nothing


def tokens_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def tokens(even):
    """32 sequences of 5 labels, of which some do not count: as many in each, or not."""
    labels = torch.arange(160).view(32, 5) % 7
    labels[:, 3:] = -100
    if not even:
        labels[16:, 1:] = -100
    return torch.arange(160).view(32, 5) % 7, labels


def of_tokens(data, **settings):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    return autoaccum.prepare(model, data, target_batch=8, device="cpu", **{"loss": tokens_loss, **settings})


class Opaque(torch.autograd.Function):
    """A mean over tokens that does not say in its graph what it divides by."""

    @staticmethod
    def forward(ctx, outputs, targets):
        with torch.enable_grad():
            inner = outputs.detach().requires_grad_()
            loss = tokens_loss(inner, targets)
        ctx.save_for_backward(*torch.autograd.grad(loss, inner))
        return loss.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None


def opaque_loss(outputs, targets):
    return Opaque.apply(outputs, targets)


def test_a_loss_that_the_check_could_not_see_through_is_warned_of():
    with pytest.warns(TrainingWarning, match="not verifiable") as told:
        of_tokens(tokens(even=True), micro_batch=1, loss=opaque_loss)
    assert 'declare it: reduction="token_mean"' in str(told[0].message)


@pytest.mark.parametrize("micro_batch", [1, 2])
@pytest.mark.filterwarnings("error::autoaccum.training.events.TrainingWarning")
def test_a_loss_whose_graph_says_what_it_divides_by_is_read(micro_batch):
    made = of_tokens(tokens(even=True), micro_batch=micro_batch).plan
    assert made.reasons["denominator"].endswith("as its graph says")


@pytest.mark.parametrize(
    "settings",
    [{"micro_batch": 8}, {"micro_batch": 1, "reduction": "token_mean"}, {"micro_batch": 1, "loss": None}],
    ids=["one micro-batch", "declared", "torch's own"],
)
@pytest.mark.filterwarnings("error::autoaccum.training.events.TrainingWarning")
def test_nobody_is_warned_where_the_loss_is_known_or_nothing_is_accumulated(settings):
    if "loss" in settings:
        settings = {**settings, "loss": nn.CrossEntropyLoss()}
        data = (torch.randn(32, 5).long().abs() % 7, torch.arange(32) % 7)
        model = nn.EmbeddingBag(7, 7)
        autoaccum.prepare(model, data, target_batch=8, device="cpu", **settings)
    else:
        of_tokens(tokens(even=True), **settings)


def test_the_check_looks_at_samples_from_all_over_the_data():
    """Labels that do not count are as many in each of the first samples, where samples and labels look alike."""
    with pytest.raises(LossError, match="token_mean"):
        of_tokens(tokens(even=False), micro_batch=4, loss=opaque_loss, reduction="sample_mean")


@pytest.mark.parametrize("loss", [tokens_loss, opaque_loss])
def test_what_a_loss_divides_by_is_found_in_samples_from_all_over_the_data(loss):
    loop = of_tokens(tokens(even=False), micro_batch=4, loss=loss)
    assert "the targets other than -100" in loop.plan.reasons["denominator"]
    assert loop.verify.ok


# --- a plan that was made before


def from_plan(made, listener=lambda event: None, **settings):
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    torch.manual_seed(0)
    data = (torch.randn(32, 6), torch.arange(32) % 3)
    given = {"loss": nn.CrossEntropyLoss(), "plan": made, "device": "cpu", "seed": 0, "callbacks": [listener],
             **settings}  # fmt: skip
    return autoaccum.prepare(model, data, **given)


@pytest.mark.parametrize("mode", ["keep", "momentum", "pooled"])
def test_a_given_plan_says_what_becomes_of_batch_norm(mode):
    made = autoaccum.plan(4, 16, batch_norm=mode, batch_norm_layers=1)
    by_plan, by_hand = (
        from_plan(made), from_plan(None, target_batch=16, micro_batch=4, batch_norm=mode)
    )  # fmt: skip
    for loop in (by_plan, by_hand):
        loop.model.load_state_dict(by_hand.model.state_dict())
    for loop in (by_plan, by_hand):
        loop.run()
    assert torch.equal(by_plan.model[1].running_mean, by_hand.model[1].running_mean)


def test_a_rate_beside_a_plan_is_the_one_the_plan_then_tells():
    made = autoaccum.plan(4, 16, optimizer="sgd", lr=0.25, lr_batch=4)
    assert made.lr == 1.0
    loop = from_plan(made, optimizer="sgd", lr=0.01)
    loop.run()
    assert loop.plan.lr == pytest.approx(0.04)
    assert [record.lr for record in loop.history] == pytest.approx([0.04, 0.04])
    assert loop.plan.reasons["lr"] == "0.04 = 0.01, the rate given beside the plan, × 4, the plan's factor"


def test_what_a_plan_sets_aside_is_said():
    made = autoaccum.plan(4, 16, optimizer="sgd", lr=0.25, lr_batch=4)
    said = []
    from_plan(made, lambda event: said.append(getattr(event, "text", "")), micro_batch=8, lr_batch=2, tail="drop")
    aside = [text.partition(" is set aside")[0] for text in said if "set aside" in text]
    assert sorted(aside) == ["lr_batch=2", "micro_batch=8", "tail='drop'"]


def test_what_only_a_probe_looks_at_is_said_to_be_set_aside_where_there_is_none():
    said = []
    given = {"prefer": "fastest", "isolate": True, "ladder": "auto"}
    prepared(micro_batch=4, callbacks=[lambda event: said.append(getattr(event, "text", ""))], **given)
    aside = [text.partition(" is set aside")[0] for text in said if "set aside" in text]
    assert aside == ["prefer='fastest'", "isolate=True", "ladder='auto'"]
    with pytest.raises(PlanError, match=r"micro_batch=4 is above max_batch=2"):
        prepared(micro_batch=4, max_batch=2)


def test_a_plan_beside_a_checkpoint_that_has_another_is_said_to_be_set_aside(tmp_path):
    def aside(limit, steps, tail="step"):
        said = []
        made = autoaccum.plan(limit, 16, tail=tail)
        given = {"plan": made, "micro_batch": None, "checkpoint": tmp_path, "max_steps": steps}
        result = prepared(**given, callbacks=[lambda event: said.append(getattr(event, "text", ""))]).run()
        assert [record.micro_batches for record in result.history] == [4] * steps
        return any("plan= is set aside" in text for text in said)

    cases = ((4, 1), (4, 2), (2, 3), (4, 3, "drop"))
    assert [aside(*case) for case in cases] == [False, False, True, True]


def test_a_loss_that_couples_samples_trains_where_nothing_is_accumulated():
    def coupled(outputs, targets):
        return (outputs @ outputs.T).softmax(1).square().mean()

    data, model = (torch.randn(16, 6), torch.arange(16)), nn.Linear(6, 3)
    with pytest.raises(LossError):
        autoaccum.prepare(model, data, loss=coupled, target_batch=16, micro_batch=8, device="cpu")
    autoaccum.prepare(model, data, loss=coupled, target_batch=16, micro_batch=16, device="cpu").run()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"regrow_after": 0}, "regrow_after=0: give a whole number"),
        ({"regrow_after": -5}, "regrow_after=-5: give a whole number"),
        ({"callbacks": print}, "callbacks="),
        ({"callbacks": [3]}, "callbacks"),
        ({"sinks": None}, "sinks=None"),
    ],
)
def test_settings_that_could_only_fail_later_are_refused(settings, match):
    with pytest.raises(AutoaccumError, match=match):
        autoaccum.prepare(
            nn.Linear(6, 3), (torch.randn(8, 6), torch.arange(8) % 3), loss=nn.CrossEntropyLoss(), target_batch=8,
            micro_batch=4, device="cpu", **settings,
        )  # fmt: skip


def test_batch_norm_that_needs_two_samples_is_looked_at_on_the_ladder():
    model = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Linear(64, 3))
    data = (torch.randn(64, 6), torch.arange(64) % 3)
    with pytest.raises(NothingFitsError) as raised:
        autoaccum.prepare(model, data, loss=nn.CrossEntropyLoss(), target_batch=8, memory="2KiB", device="cpu",
                          cache=False)  # fmt: skip
    assert "cannot be run" not in str(raised.value)


def test_the_wait_for_the_samples_counts_in_a_windows_time():
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            time.sleep(0.01)
            return torch.ones(6), 0

    loop = autoaccum.prepare(
        nn.Linear(6, 3), Slow(), loss=nn.CrossEntropyLoss(), target_batch=8, micro_batch=8, device="cpu", check=False
    )
    for record in loop:
        assert record.seconds >= 8 * 0.01
        assert record.samples_per_second == pytest.approx(8 / record.seconds)


def test_a_window_is_let_go_before_the_next_is_read():
    """In memory that is short, the samples of two windows would be one too many."""
    alive, most = weakref.WeakSet(), []

    class Watched(Dataset):
        def __len__(self):
            return 32

        def __getitem__(self, index):
            sample = torch.randn(4)
            most.append(len(alive))
            return sample, index % 2

    def collated(samples):
        inputs = torch.stack([sample for sample, _ in samples])
        alive.add(inputs)
        return inputs, torch.tensor([label for _, label in samples])

    data = DataLoader(Watched(), batch_size=8, collate_fn=collated)
    loop = autoaccum.prepare(nn.Linear(4, 2), data, target_batch=8, loss=nn.CrossEntropyLoss(), micro_batch=2,
                             check=False, progress=False)  # fmt: skip
    most.clear()
    loop.run()
    assert max(most) == 3  # the micro-batches of one window that were read before its last

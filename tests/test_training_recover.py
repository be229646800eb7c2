"""Out of memory and other errors in mid-training: what was trained is what would have been, and no sample is lost."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autoaccum
from autoaccum.errors import AutoaccumError, DataError, NothingFitsError, StateNotRestoredError
from autoaccum.planning.plan import plan
from autoaccum.ranks import Ranks
from autoaccum.training.events import Noted, StopTraining, TrainingWarning
from autoaccum.training.recover import OptimizerOutOfMemoryError
from autoaccum.training.smaller import Replays, cut_smaller
from tests.ranks_started import started
from tests.torture import ooms

X = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(48) % 3


class Tight(nn.Module):
    """Runs out of memory where a listed window is given more than so many samples at once."""

    def __init__(self, body, limits=None, *, error=None):
        super().__init__()
        self.body, self.limits, self.window = body, limits or {}, 0
        self.error = error or (lambda: torch.cuda.OutOfMemoryError("CUDA out of memory"))

    def forward(self, x):
        out = self.body(x)
        if self.training and torch.is_grad_enabled() and len(x) > self.limits.get(self.window, 10**6):
            raise self.error()
        return out


def body():
    torch.manual_seed(1)
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 16))
    return nn.Sequential(spectral, nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def prepared(model, **keywords):
    torch.manual_seed(5)
    given = {"target_batch": 16, "micro_batch": 8, "loss": nn.CrossEntropyLoss(), "epochs": 2, "seed": 3,
             "check": False, "device": "cpu", **keywords}  # fmt: skip
    return autoaccum.prepare(model, given.pop("data", (X, Y)), **given)


def trained(model, **keywords):
    """The state after each window of a training whose windows may run out of memory."""
    loop, states = prepared(model, **keywords), []
    for _ in loop:
        model.window += 1
        states.append([tensor.detach().clone() for tensor in model.body.state_dict().values()])
    return loop, states


def alike(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))


# --- replays --------------------------------------------------------------------------------------------------------


def test_each_update_equals_the_undisturbed_one_wherever_memory_ran_out():
    result = ooms.run(24, seed=1)
    assert result.failures == []
    assert result.worst < 1e-10


def test_a_replayed_window_is_bit_for_bit_what_smaller_micro_batches_would_have_been():
    """Dropout, power iterations and BatchNorm inside: everything begins again where the window began."""
    with pytest.warns(TrainingWarning, match="step 3 at a micro-batch of 8: .* at most 4"):
        loop, got = trained(Tight(body(), {2: 4}))

    limited, want = prepared(model := Tight(body())), []
    for _ in limited:
        model.window += 1
        want.append([tensor.detach().clone() for tensor in model.body.state_dict().values()])
        if model.window == 2:
            limited._accumulator.plan = limited.plan.with_limit(4, "smaller from here on")
    assert alike(got, want)
    assert [record.micro_batches for record in loop.history] == [2, 2, 4, 4, 4, 4]
    assert loop.plan.micro_batches == (4, 4, 4, 4)
    assert [record.samples for record in loop.history] == [16] * 6


def test_the_replay_is_told_and_recorded(tmp_path):
    heard = []
    with pytest.warns(TrainingWarning):
        trained(Tight(body(), {1: 2}), callbacks=[heard.append], checkpoint=tmp_path)
    replays = [event for event in heard if event.name == "replay"]
    assert [(event.step, event.micro_batch, event.accumulation_steps) for event in replays] == [(2, 4, 4), (2, 2, 8)]
    assert (tmp_path / "metrics.jsonl").read_text().count('"event": "replay"') == 2
    assert autoaccum.Plan.load(tmp_path / "plan.json").micro_batch == 2


def test_an_error_that_may_be_about_memory_is_tried_smaller_and_raised_where_that_does_not_help():
    def error():
        return RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")

    with pytest.warns(TrainingWarning):
        loop, _ = trained(Tight(body(), {1: 4}, error=error))
    assert loop.plan.micro_batch == 4
    with pytest.warns(TrainingWarning), pytest.raises(RuntimeError, match="CUDNN_STATUS_INTERNAL_ERROR"):
        trained(Tight(nn.Sequential(nn.Linear(6, 3)), {1: 0}, error=error))


def test_at_the_smallest_micro_batch_it_is_an_error_that_names_the_last_checkpoint(tmp_path):
    model = Tight(nn.Sequential(nn.Linear(6, 3)), {3: 0})
    with pytest.warns(TrainingWarning), pytest.raises(NothingFitsError) as caught:
        trained(model, checkpoint=tmp_path, checkpoint_every=1)
    assert "step 4 ran out of memory at a micro-batch of 1" in str(caught.value)
    assert f"the last checkpoint is {tmp_path}/step-00000003-epoch-1-window-0" in str(caught.value)

    model = Tight(nn.Sequential(nn.Linear(6, 3)), {0: 0})
    with pytest.warns(TrainingWarning), pytest.raises(NothingFitsError, match="checkpoint=FOLDER keeps them"):
        trained(model)


def test_a_batch_norm_that_takes_no_single_sample_sets_the_floor():
    with pytest.warns(TrainingWarning):
        loop, _ = trained(Tight(body(), {1: 2}), micro_batch=3, target_batch=14)
    assert min(loop.plan.micro_batches) == 2
    with pytest.warns(TrainingWarning), pytest.raises(NothingFitsError, match="micro-batch of 2, the smallest"):
        trained(Tight(body(), {1: 1}), micro_batch=3, target_batch=14)


def test_memory_that_comes_back_is_tried_again():
    limits = {1: 4, 4: 4, 5: 4, 6: 4}
    with pytest.warns(TrainingWarning):
        loop, _ = trained(Tight(body(), limits), epochs=5, regrow_after=3)
    # Halved in window 1; whole again for window 4, too soon; whole again three windows later.
    assert [record.micro_batches for record in loop.history] == [2, 4, 4, 4, 4, 4, 4, 2, 2, 2, 2, 2, 2, 2, 2]


def test_an_error_inside_the_optimizers_step_is_raised_and_nothing_goes_on_from_there(tmp_path, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(0.2), fsync(file)))  # a slow disk: saved beside the loop

    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            if model.window == 4:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)  # half of an update
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().step(closure)

    model = Tight(body())
    loop = prepared(model, optimizer=lambda p, lr: Greedy(p, lr=lr), checkpoint=tmp_path, checkpoint_every=3)
    with pytest.raises(
        OptimizerOutOfMemoryError, match=r"not trusted\. the last checkpoint is .*step-00000003"
    ) as caught:
        for _ in loop:
            model.window += 1
    assert isinstance(caught.value, AutoaccumError)
    assert isinstance(caught.value, torch.cuda.OutOfMemoryError)
    assert len(list(tmp_path.glob("step-*"))) == 1, "nothing of the half update is saved"
    with pytest.raises(StateNotRestoredError, match="half updated"):
        next(iter(loop))
    with pytest.raises(StateNotRestoredError, match="half updated"):
        loop.state_dict()

    model.window = 5
    again = prepared(Tight(body()), optimizer=lambda p, lr: Greedy(p, lr=lr), checkpoint=tmp_path)
    assert again.step == 3
    assert again.run().history[-1].step == 6


def test_validation_that_runs_out_of_memory_leaves_the_plan_alone():
    class Narrow(nn.Linear):
        def forward(self, x):
            if not self.training and len(x) > 3:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    torch.manual_seed(0)
    model = Narrow(6, 3)
    loop = prepared(model, val_data=(X, Y))
    result = loop.run()
    assert loop.plan.micro_batches == (8, 8)
    with torch.no_grad():
        want = nn.functional.cross_entropy(nn.functional.linear(X, model.weight, model.bias), Y)
    assert result.evaluations[-1]["loss"] == pytest.approx(float(want), rel=1e-6)


# --- other errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_window_that_was_interrupted_is_as_if_it_had_not_begun(error):
    def train(limits):
        model = Tight(body(), limits, error=error)
        loop, states = prepared(model), []
        while len(states) < 6:
            try:
                for _ in loop:
                    model.window += 1
                    states.append([tensor.detach().clone() for tensor in model.body.state_dict().values()])
            except error:
                model.limits = {}
                assert all(parameter.grad is None for parameter in model.parameters())
        return states

    assert alike(train({2: 4}), train({}))


def test_an_interrupted_stream_that_is_read_once_loses_no_sample():
    def stream():
        yield from zip(X, Y)

    model = Tight(body(), {1: 4}, error=ValueError)
    loop = prepared(model, data=stream(), epochs=1)
    with pytest.raises(ValueError):
        for _ in loop:
            model.window += 1
    model.limits = {}
    assert [record.samples for record in loop] == [16, 16]


# --- how smaller ones are found --------------------------------------------------------------------------------------


class Answers(Ranks):
    """Ranks whose answers were written down before."""

    def __init__(self, rank, others):
        self.rank, self.size = rank, len(others[0])
        self._answers = iter(others)

    def gather(self, what, value):
        answer = next(self._answers)
        assert answer[self.rank] == value
        return list(answer)


def test_on_ranks_with_unequal_limits_only_those_that_ran_out_are_halved_and_all_agree():
    plans = [plan((8, 2), 20, world_size=2, rank=rank) for rank in range(2)]
    assert [p.micro_batches for p in plans] == [(8, 8), (2, 2)]
    answers = [(8, 2), (8, 1), (0, 1)]
    after = [
        Replays(None).shrink(plans[rank], 8 if rank == 0 else 2, rank == 1, Answers(rank, answers), step=1)
        for rank in range(2)
    ]
    assert [smaller.limits for smaller, _ in after] == [(8, 1), (8, 1)]
    assert [limit for _, limit in after] == [8, 1]
    assert after[0][0].share(20)[1] == after[1][0].share(20)[0], "the shares tile the window"


def test_gradients_that_wait_whole_for_a_windows_end_go_before_any_size_is_halved():
    made = dataclasses.replace(plan(8, 16), gradient_sync="window")
    replays = Replays(regrow_after=1)
    smaller, limit = replays.shrink(made, 8, True, Ranks(), step=3)
    assert smaller.gradient_sync == "micro-batch"
    assert [smaller.micro_batches, limit] == [made.micro_batches, 8]
    assert "ran out in step 3" in smaller.reasons["gradient_sync"]
    assert replays.shrink(smaller, 8, True, Ranks(), step=3)[1] == 4
    assert replays.grow() == made


def test_a_floor_that_cannot_be_met_moves_the_limit_up():
    made = plan(4, 7, minimum=2)
    smaller, limit = Replays(None).shrink(made, 4, True, Ranks(), step=1)
    assert smaller.micro_batches == (3, 2, 2)
    assert limit == 3
    with pytest.raises(NothingFitsError, match="no smaller micro-batches make the same batch"):
        Replays(None).shrink(plan(3, 3, minimum=2), 3, True, Ranks(), step=1)


def test_pieces_that_cannot_be_cut_alone_are_joined():
    batches = [torch.arange(3), torch.arange(3, 6)]
    assert [piece.tolist() for piece in cut_smaller(batches, 2, 2)] == [[0, 1], [2, 3], [4, 5]]
    ragged = [torch.zeros(3, 4), torch.zeros(3, 5)]
    with pytest.raises(NothingFitsError, match="cannot be cut smaller"):
        cut_smaller(ragged, 2, 2)
    assert [len(piece) for piece in cut_smaller(ragged, 2, 1)] == [2, 1, 2, 1]


# --- a real one -----------------------------------------------------------------------------------------------------

REAL = """
    import resource, sys, torch
    from torch import nn
    import autoaccum

    def data_segment():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))

    def model():
        torch.manual_seed(0)
        layers = [layer for _ in range(6) for layer in (nn.Linear(64, 64), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(64, 4)).double()

    x, y = torch.randn(3 * 8192, 64).double(), torch.randint(0, 4, (3 * 8192,))  # 4 MiB an activation, of 13
    taken, heard = [], []

    def listen(event):
        if event.name == "replay":
            heard.append(event.micro_batch)
        if event.name == "step" and event.record.step == 2 and take:
            # Someone takes what was free, all but little.
            taken.append(bytearray(limit - data_segment() - 30 * 2**20))

    for take in (False, True):
        loop = autoaccum.prepare(model(), (x, y), loss=nn.CrossEntropyLoss(), target_batch=8192, micro_batch=8192,
                                 optimizer="sgd", lr=0.1, epochs=2, seed=0, device="cpu", check=False,
                                 callbacks=[listen])
        if take:
            limit = data_segment() + 256 * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        losses = [record.loss for record in loop]
        if not take:
            want = losses
    worst = max(abs(a - b) / abs(a) for a, b in zip(want, losses))
    print(heard, worst, len(losses))
    sys.exit(not (heard and worst < 1e-9 and len(losses) == 6))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what torch allocates on Linux only")
def test_memory_that_is_really_taken_away_in_mid_run_is_survived():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0",
                   "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(REAL)], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


# --- two ranks ------------------------------------------------------------------------------------------------------

pytest_ranks = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch is built without torch.distributed")


def _net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).double()


def _losses(limits, **keywords):
    model = Tight(_net(), limits)
    loop = prepared(model, data=(X.double(), Y), optimizer="sgd", lr=0.5, **keywords)
    states, stopped = [], None
    for _ in loop:
        model.window += 1
        states.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    stopped = loop._stopped
    return states, [(record.micro_batches, record.samples) for record in loop.history], loop.plan.limits, stopped


def _work(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {"undisturbed": _losses({}, micro_batch=4)}
    found["one ran out"] = _losses({1: 2} if rank == 1 else {}, micro_batch=4)
    found["both ran out, one twice"] = _losses({2: 1 if rank == 0 else 2}, micro_batch=4)

    for name, step in (("step", 2), ("step", 3), ("epoch", 3)):  # three steps are an epoch

        def stop(event, name=name, step=step):
            if rank == 1 and event.name == name and (event.record.step if name == "step" else event.step) == step:
                raise StopTraining("enough")

        found[name, step] = _losses({}, micro_batch=4, epochs=2, callbacks=[stop])
    try:
        _losses({1: 0} if rank == 0 else {}, micro_batch=4)
    except AutoaccumError as error:
        found["nothing fits"] = f"{type(error).__name__}: {error}"

    drop = lambda: nn.Sequential(_net(), nn.Dropout(0.5))  # noqa: E731
    settings = {"data": (X.double(), Y), "micro_batch": 4, "epochs": 3, "seed": None}
    whole = prepared(drop(), **settings).run()
    run = Path(folder, "run")
    loop = prepared(drop(), checkpoint=run, checkpoint_every=2, **settings)
    for record in loop:
        if record.step == 5:
            break
    torch.manual_seed(77 + rank)
    again = prepared(drop(), checkpoint=run, checkpoint_every=2, **settings)
    found["resumed at"] = again.step
    again.run()
    vectors = [nn.utils.parameters_to_vector(made.model.parameters()).detach() for made in (whole, again)]
    found["resumed"] = torch.equal(*vectors)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    started(_work, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest_ranks
@pytest.mark.parametrize("case", ["undisturbed", "one ran out", "both ran out, one twice"])
def test_two_ranks_replay_together_and_equal_one_process(found, case):
    want = _losses({})[0]
    for rank in range(2):
        got = found[rank][case][0]
        assert len(got) == len(want)
        assert all((a - b).norm() / a.norm() < 1e-12 for a, b in zip(want, got))


@pytest.mark.slow
@pytest_ranks
def test_only_the_rank_that_ran_out_takes_smaller_pieces(found):
    counts = [[count for count, _ in found[rank]["one ran out"][1]] for rank in range(2)]
    assert found[0]["one ran out"][2] == found[1]["one ran out"][2] == (4, 2)
    assert counts[0][:2] == [2, 2]
    assert counts[1][:2] == [2, 4]
    assert all(samples == 16 for rank in range(2) for _, samples in found[rank]["one ran out"][1])


@pytest.mark.slow
@pytest_ranks
@pytest.mark.parametrize("when", [("step", 2), ("step", 3), ("epoch", 3)])
def test_a_rank_that_is_asked_to_stop_stops_all_there(found, when):
    assert [len(found[rank][when][0]) for rank in range(2)] == [when[1]] * 2
    assert found[1][when][3] == "enough"
    assert "another rank" in found[0][when][3]


@pytest.mark.slow
@pytest_ranks
def test_where_one_rank_cannot_go_on_the_other_hears_of_it(found):
    assert found[0]["nothing fits"].startswith("NothingFitsError: step 2 ran out of memory")
    assert "rank 0 of 2 failed" in found[1]["nothing fits"]


@pytest.mark.slow
@pytest_ranks
def test_two_ranks_go_on_from_one_checkpoint_with_generators_of_their_own(found):
    assert [found[rank]["resumed at"] for rank in range(2)] == [4, 4]
    assert found[0]["resumed"]
    assert found[1]["resumed"]


# --- what a step changes in other ways


class Counting(nn.Module):
    """Puts a new tensor in its buffer's place at each forward."""

    def __init__(self, act=lambda seen: None):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.act = nn.Linear(6, 3), act
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            self.seen = self.seen + len(x)
            self.act(self)
        return self.layer(x)


def once_at(seen, error):
    """Raises the first time so many samples were seen."""
    left = [1]

    def act(model):
        if model.seen == seen and left:
            left.clear()
            raise error

    return act


def test_a_buffer_that_is_bound_anew_counts_each_sample_once_in_a_replay():
    model = Counting(once_at(40, torch.cuda.OutOfMemoryError("CUDA out of memory")))
    with pytest.warns(TrainingWarning, match="out of memory in step 3"):
        prepared(model, epochs=1, micro_batch=8).run()
    assert model.seen == 48


def test_a_buffer_that_is_bound_anew_keeps_nothing_of_an_interrupted_window():
    model = Counting(once_at(40, KeyboardInterrupt()))
    loop = prepared(model, epochs=1, micro_batch=8)
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    assert model.seen == 32
    loop.run()
    assert model.seen == 48


class InPlace(nn.Module):
    """Scales its input in place, and runs out of memory once."""

    def __init__(self, at):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.left = nn.Linear(6, 3), at

    def forward(self, x):
        x = x.mul_(2)
        self.left -= self.training
        if self.left == 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.layer(x)


def test_a_window_whose_samples_the_model_wrote_to_is_not_run_again():
    model = InPlace(at=4)
    loop = prepared(model, epochs=1)
    next(iter(loop))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(DataError, match="step 2 ran out of memory .* writes into its inputs"):
        loop.run()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


# --- modes


def with_frozen():
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[0].eval()
    return model


@pytest.mark.parametrize("settings", [{"micro_batch": 4}, {"micro_batch": None, "memory": "1GiB"}], ids=str)
def test_a_layer_that_its_owner_froze_stays_so(settings):
    model = with_frozen()
    prepared(model, epochs=1, check=True, val_data=(X, Y), **settings).run()
    assert [module.training for module in model] == [False, True, True, True]
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[0].running_mean, torch.zeros(6))
    assert model[2].num_batches_tracked > 0


def test_a_model_that_is_in_evaluation_mode_as_a_whole_is_trained_as_a_whole():
    model = with_frozen().eval()
    prepared(model, epochs=1).run()
    assert model[0].num_batches_tracked > 0
    assert not any(module.training for module in model.modules())


def test_looking_at_the_models_answers_between_two_windows_changes_no_training():
    ends = []
    for looks in (False, True):
        model = nn.Sequential(with_frozen(), nn.Dropout(0.5))
        loop = prepared(model, epochs=1)
        for _ in loop:
            if looks:
                model.eval()
        ends.append(model.state_dict())
        assert not model[0][0].training
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))


def test_out_of_memory_at_a_size_that_the_probe_ran_costs_a_twentieth_of_it_and_then_half():
    replays, made = Replays(None, verified=40), plan(40, 80)
    smaller, limit = replays.shrink(made, 40, True, Ranks(), step=1)
    assert (limit, smaller.limits) == (38, (38,))
    assert replays.shrink(smaller, 38, True, Ranks(), step=1)[1] == 19
    assert Replays(None, verified=40).shrink(plan(40, 80), 30, True, Ranks(), step=1)[1] == 15, "not near"


class Straining:
    """A device whose allocator empties its cache in each window of micro-batches above a size."""

    def __init__(self, device, loop, above):
        self._device, self._loop, self._above, self.count = device, loop, above, 0

    def __getattr__(self, name):
        return getattr(self._device, name)

    def retries(self):
        self.count += self._loop.plan.micro_batch > self._above
        return self.count


def test_where_the_allocator_retries_window_after_window_micro_batches_become_somewhat_smaller():
    notes = []
    loop = prepared(body(), epochs=4, callbacks=[notes.append])
    for turn in loop._turns.all:
        turn._device = Straining(loop._device, loop, above=7)
    sizes = []
    for record in loop:
        sizes.append((record.micro_batches, loop.plan.limits))
    assert sizes[0] == (2, (8,))
    assert sizes[-1] == (3, (7,))
    (told,) = [note.text for note in notes if isinstance(note, Noted) and "emptied its cache" in note.text]
    assert "micro-batches of at most 7 from step" in told
    assert sum(limits == (8,) for _, limits in sizes) == 3, "three windows of it, and one more that shows it goes on"


class Keeping:
    """The device, where malloc keeps freed blocks until they are given back."""

    def __init__(self, device):
        self._device, self.keeps = device, True

    def release(self, **how):
        self.keeps = False
        self._device.release(**how)

    def __getattr__(self, name):
        return getattr(self._device, name)


def test_blocks_that_malloc_kept_go_before_any_size_is_halved():
    """The same window in the same pieces, once; what runs out again runs smaller."""
    heard = []
    loop = prepared(model := Tight(body(), {1: 4, 2: 4}), callbacks=[heard.append])
    device = Keeping(loop._device)
    for turn in loop._turns.all:
        turn._device = device

    class Roomier(dict):
        def get(self, window, default):
            return default if window == 1 and not device.keeps else super().get(window, default)

    model.limits, sizes = Roomier(model.limits), []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", TrainingWarning)
        for record in loop:
            model.window += 1
            sizes.append(record.micro_batches)
    assert sizes[:3] == [2, 2, 4], "whole again where blocks were given back, in halves where that was not it"
    first, second = [each for each in heard if each.name == "replay"]
    assert (first.step, first.micro_batch) == (2, 8)
    assert "holes count" in first.text
    assert (second.step, second.micro_batch) == (3, 4)
    assert len(told) == 2

"""One window gives the gradient, the update and the statistics of the whole batch at once."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autoaccum.data import tree
from autoaccum.errors import LossError, SetupError
from autoaccum.loss.mean import Mean
from autoaccum.loss.objective import Objective
from autoaccum.planning.plan import plan
from autoaccum.window.accumulate import Accumulator


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()


def batch(size, seed=1):
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, dtype=torch.float64, generator=chance)
    return x, torch.randint(0, 5, (size,), generator=chance)


def error(model, reference):
    """Relative distance of all parameters."""
    pairs = list(zip(model.parameters(), reference.parameters(), strict=True))
    difference = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    return difference / math.sqrt(sum(float(b.square().sum()) for _, b in pairs))


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.5, **settings)


def whole_batch_step(model, data, clip=None, loss=F.cross_entropy):
    reference = copy.deepcopy(model)
    optimizer = sgd(reference)
    x, y = data
    loss(reference(x), y).backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(reference.parameters(), clip)
    optimizer.step()
    return reference


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_persons_own_loop_takes_the_whole_batchs_step(size, limit):
    model, data = net(), batch(size)
    reference = whole_batch_step(model, data)
    accumulator = Accumulator(model, sgd(model), plan(limit, 40))
    for x, y in accumulator.window(data):
        accumulator.backward(F.cross_entropy(model(x), y))
    assert error(model, reference) < 1e-12
    assert accumulator.last.samples == size
    assert accumulator.last.micro_batches == -(-size // limit)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_loss_of_the_record_is_the_whole_batchs():
    model, data = net(), batch(30)
    expected = float(F.cross_entropy(model(data[0]), data[1]))
    accumulator = Accumulator(model, sgd(model), plan(7, 30))
    for x, y in accumulator.window(data):
        accumulator.backward(F.cross_entropy(model(x), y))
    assert accumulator.last.loss == pytest.approx(expected, rel=1e-12)
    assert accumulator.last.step == 1


def test_a_denominator_told_late_is_put_right_once():
    model, (x, y) = net(), batch(24)
    y[:9] = -100
    reference = whole_batch_step(model, (x, y))
    accumulator = Accumulator(model, sgd(model), plan(8, 24))
    for x_, y_ in accumulator.window((x, y)):
        accumulator.backward(F.cross_entropy(model(x_), y_), denominator=(y_ != -100).sum())
    assert error(model, reference) < 1e-12


@pytest.mark.parametrize("way", ["ignored", "weighted", "tokens"])
def test_what_a_cross_entropy_divides_by_need_not_be_told(way):
    model, (x, y) = net(), batch(24)
    y[:9] = -100  # the first micro-batch has nothing that counts
    weight = torch.rand(5, dtype=x.dtype) if way == "weighted" else None

    def loss(outputs, targets):
        if way == "tokens":
            outputs, targets = torch.stack([outputs, outputs**2], 2), torch.stack([targets, targets.clamp(min=0)], 1)
        return F.cross_entropy(outputs, targets, weight=weight)

    reference = whole_batch_step(model, (x, y), loss=loss)
    accumulator = Accumulator(model, sgd(model), plan(8, 24))
    for x_, y_ in accumulator.window((x, y)):
        accumulator.backward(loss(model(x_), y_))
    assert error(model, reference) < 1e-12


def test_a_loop_whose_loss_divides_by_another_count_than_samples_is_refused_where_it_is_not_told():
    model, (x, y) = net(), batch(23)

    def take(loss, told=None):
        accumulator = Accumulator(model, sgd(model), plan(8, 23))
        for x_, y_ in accumulator.window((x, y)):
            accumulator.backward(loss(model(x_), y_), None if told is None else told(y_))

    def masked(outputs, targets):
        return (F.cross_entropy(outputs, targets, reduction="none") * (targets > 1)).sum() / (targets > 1).sum()

    for loss in (masked, lambda o, y: o[y > 1].square().mean(), lambda o, y: o.square().mean() + masked(o, y)):
        with pytest.raises(LossError, match=r"divides by \d+ where \d samples run, and by .* denominator"):
            take(loss)
    take(masked, lambda y: (y > 1).sum())
    # Of these nothing varies but with the samples.
    take(lambda o, y: F.mse_loss(o, o.detach() + 1) + 0.1 * model[0].weight.square().mean())
    take(lambda o, y: F.cross_entropy(o, y, reduction="sum") / len(y) + 1e-3 * o.square().sum() / o.numel())


def test_windows_of_other_lengths_have_other_divisors_and_need_not_be_told():
    model = net()
    accumulator = Accumulator(model, sgd(model), plan(8, 23))
    for length in (3, 5):
        x = torch.randn(23, length, 6, dtype=torch.float64)
        reference = whole_batch_step(model, (x, x[..., 0]), loss=lambda o, y: F.mse_loss(o[..., 0], y))
        for x_, y_ in accumulator.window((x, x[..., 0])):
            accumulator.backward(F.mse_loss(model(x_)[..., 0], y_))
        assert error(model, reference) < 1e-12


def test_a_micro_batch_in_which_nothing_counts_gives_neither_nan_nor_weight():
    model, (x, y) = net(), batch(24)
    y[:8] = -100
    reference = whole_batch_step(model, (x, y))
    accumulator = Accumulator(model, sgd(model), plan(8, 24))
    for x_, y_ in accumulator.window((x, y)):
        accumulator.backward(F.cross_entropy(model(x_), y_), denominator=int((y_ != -100).sum()))
    assert error(model, reference) < 1e-12


def test_an_objective_knows_the_denominators_before_the_first_backward():
    model, (x, y) = net(), batch(24)
    y[:8], y[10] = -100, -100
    reference = whole_batch_step(model, (x, y))
    accumulator = Accumulator(model, sgd(model), plan(8, 24), objective=Objective(model, loss=nn.CrossEntropyLoss()))
    pieces = tree.split((x, y), (8, 8, 8))
    sums = accumulator.open(pieces)
    assert sums.totals == {"loss": 15.0}
    accumulator.run(pieces)
    accumulator.finish()
    assert error(model, reference) < 1e-12


def test_a_window_in_which_nothing_counts_takes_no_step():
    model, (x, y) = net(), batch(8)
    before = copy.deepcopy(model)
    optimizer = sgd(model, momentum=0.9, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    accumulator = Accumulator(
        model, optimizer, plan(4, 8), objective=Objective(model, loss=nn.CrossEntropyLoss()), scheduler=scheduler
    )
    pieces = tree.split((x, torch.full_like(y, -100)), (4, 4))
    accumulator.open(pieces)
    accumulator.run(pieces)
    record = accumulator.finish()
    assert "ignored" in record.skipped
    assert (record.step, accumulator.skipped_windows, optimizer.param_groups[0]["lr"]) == (0, 1, 0.5)
    assert error(model, before) == 0
    assert not optimizer.state
    own = Accumulator(model, optimizer, plan(4, 8))
    assert [*own.window((x[:0], y[:0]))] == []
    assert own.last.skipped == "the window has no samples"


def test_clipping_is_of_the_whole_windows_gradient():
    model, data = net(), batch(30)
    reference = whole_batch_step(model, data, clip=0.05)
    accumulator = Accumulator(model, sgd(model), plan(7, 30), clip_norm=0.05)
    for x, y in accumulator.window(data):
        accumulator.backward(F.cross_entropy(model(x), y))
    assert error(model, reference) < 1e-7  # torch adds 1e-6 to the norm, as does this
    assert accumulator.last.grad_norm > 0.05


def test_the_schedule_moves_once_an_update():
    model, data = net(), batch(30)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    accumulator = Accumulator(model, optimizer, plan(3, 30), scheduler=scheduler)
    lrs = []
    for _ in range(3):
        for x, y in accumulator.window(data):
            accumulator.backward(F.cross_entropy(model(x), y))
        lrs.append(accumulator.last.lr)
    assert lrs == [0.5, 0.25, 0.125]


def test_leaving_a_window_early_takes_no_step():
    model, data = net(), batch(30)
    before = copy.deepcopy(model)
    accumulator = Accumulator(model, sgd(model), plan(7, 30))
    for x, y in accumulator.window(data):
        accumulator.backward(F.cross_entropy(model(x), y))
        break
    assert error(model, before) == 0
    assert accumulator.last is None
    assert all(parameter.grad is None for parameter in model.parameters())


def test_backward_must_be_called_once_for_each_micro_batch():
    model, data = net(), batch(30)
    accumulator = Accumulator(model, sgd(model), plan(7, 30))
    with pytest.raises(LossError, match="called 0 times"):
        for _ in accumulator.window(data):
            pass
    with pytest.raises(LossError, match="called 2 times"):
        for x, y in accumulator.window(data):
            for _ in range(2):
                accumulator.backward(F.cross_entropy(model(x), y))
    with pytest.raises(SetupError, match="no window is open"):
        accumulator.backward(model(data[0]).sum())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda loss: loss.detach(), "without a graph"),
        (lambda loss: loss.item(), "float"),
        (lambda loss: loss * torch.ones(2), r"shape \(2,\)"),
    ],
)
def test_a_loss_that_cannot_be_learned_from_is_refused(wrong, message):
    model, data = net(), batch(30)
    accumulator = Accumulator(model, sgd(model), plan(7, 30))
    with pytest.raises(LossError, match=message):
        for x, y in accumulator.window(data):
            accumulator.backward(wrong(F.cross_entropy(model(x), y)))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_left_over_is_refused_not_added():
    model, data = net(), batch(8)
    accumulator = Accumulator(model, sgd(model), plan(4, 8))
    model(data[0]).sum().backward()
    with pytest.raises(SetupError, match="gradient stands before the window's first backward"):
        next(accumulator.window(data))


@pytest.mark.parametrize("mode", ["raise", "skip"])
def test_a_loss_that_is_not_finite_takes_no_step(mode):
    model, (x, y) = net(), batch(8)
    before = copy.deepcopy(model)
    x[3] = math.inf
    accumulator = Accumulator(model, sgd(model), plan(4, 8), on_nonfinite=mode)

    def window():
        for x_, y_ in accumulator.window((x, y)):
            accumulator.backward(F.cross_entropy(model(x_), y_))

    if mode == "raise":
        with pytest.raises(LossError, match='step 1 is nan.*on_nonfinite="skip"'):
            window()
    else:
        window()
        assert "nan" in accumulator.last.skipped
        assert accumulator.skipped_windows == 1
    assert error(model, before) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_left_out_too():
    model, (x, y) = net(), batch(8)
    before = copy.deepcopy(model)
    x[3] = 0  # the root of 0 has an infinite slope
    accumulator = Accumulator(model, sgd(model), plan(4, 8), on_nonfinite="skip")
    for x_, _ in accumulator.window((x, y)):
        accumulator.backward(((model(x_) - model(torch.zeros_like(x_))) ** 2).sum(-1).sqrt().mean())
    assert math.isfinite(accumulator.last.loss)
    assert "gradient norm of step 1 is nan" in accumulator.last.skipped
    assert math.isnan(accumulator.last.grad_norm)
    assert error(model, before) == 0
    for x_, y_ in accumulator.window(batch(8)):
        accumulator.backward(F.cross_entropy(model(x_), y_))
    assert (accumulator.last.skipped, accumulator.last.grad_norm) == (None, None), "nobody asked for it"


def test_batch_norm_is_pooled_and_committed_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 5)).double()
    reference = copy.deepcopy(model)
    data = batch(23)
    reference(data[0])
    accumulator = Accumulator(model, sgd(model), plan(5, 23))
    for x, y in accumulator.window(data):
        accumulator.backward(F.cross_entropy(model(x), y))
    torch.testing.assert_close(model[0].running_mean, reference[0].running_mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model[0].running_var, reference[0].running_var, rtol=1e-12, atol=1e-14)
    assert int(model[0].num_batches_tracked) == 1


def test_the_fp16_scale_is_one_for_the_window_and_overflow_skips_the_step():
    model = net().float()
    before = copy.deepcopy(model)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    accumulator = Accumulator(model, optimizer, plan(4, 8), precision="fp16", scheduler=scheduler)
    accumulator.precision.scaler._init_scale = 2.0**60
    x, y = batch(8)
    for x_, y_ in accumulator.window((x.float(), y)):
        accumulator.backward(F.cross_entropy(model(x_), y_))
    assert "overflowed at the loss scale" in accumulator.last.skipped
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert error(model, before) == 0
    accumulator.precision.scaler.update(1024.0)
    for x_, y_ in accumulator.window((x.float(), y)):
        accumulator.backward(F.cross_entropy(model(x_), y_))
    assert accumulator.last.skipped is None
    assert error(model, whole_batch_step(before, (x.float(), y))) < 5e-3  # fp16's own rounding


@pytest.mark.parametrize("steps", [4, 64, 1024])
def test_bf16_gradients_are_summed_in_fp32(steps):
    torch.manual_seed(0)
    model = nn.Linear(8, 4).bfloat16()
    x, y = torch.randn(steps, 8).bfloat16(), torch.randn(steps, 4).bfloat16()
    exact = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in model.parameters()]
    for i in range(steps):
        model.zero_grad()
        F.mse_loss(model(x[i : i + 1]).float(), y[i : i + 1].float()).backward()
        for total, parameter in zip(exact, model.parameters(), strict=True):
            total += parameter.grad.double() / steps
    model.zero_grad(set_to_none=True)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.double() for p in model.parameters()))
    accumulator = Accumulator(model, optimizer, plan(1, steps))
    for x_, y_ in accumulator.window((x, y)):
        accumulator.backward(F.mse_loss(model(x_).float(), y_.float()))
    distance = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(seen, exact, strict=True)))
    assert distance / math.sqrt(sum(float(b.square().sum()) for b in exact)) < 4e-3  # one rounding to bf16
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def test_a_mean_returned_by_a_step_is_used_as_it_is():
    model, (x, y) = net(), batch(24)
    y[:9] = -100
    reference = whole_batch_step(model, (x, y))
    accumulator = Accumulator(model, sgd(model), plan(8, 24))
    for x_, y_ in accumulator.window((x, y)):
        losses = F.cross_entropy(model(x_), y_, reduction="sum")
        accumulator.backward(Mean(losses, (y_ != -100).sum()))
    assert error(model, reference) < 1e-12


def test_sparse_embeddings_tied_and_unused_parameters():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 6, sparse=True)
            self.head = nn.Linear(6, 5)
            self.unused = nn.Linear(2, 2)

        def forward(self, tokens):
            return self.head(self.embed(tokens))

    torch.manual_seed(0)
    model = Model().double()
    reference = copy.deepcopy(model)
    tokens, y = torch.randint(0, 10, (20,)), torch.randint(0, 5, (20,))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    F.cross_entropy(reference(tokens), y).backward()
    optimizer.step()
    accumulator = Accumulator(model, sgd(model), plan(6, 20))
    for t, y_ in accumulator.window((tokens, y)):
        accumulator.backward(F.cross_entropy(model(t), y_))
    assert error(model, reference) < 1e-12
    assert model.unused.weight.grad is None


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"accumulate": "fp64"}, "accumulate='fp64'"),
        ({"on_nonfinite": "hope"}, "on_nonfinite='hope'"),
        ({"batch_norm": "pool"}, "batch_norm='pool'"),
        ({"precision": "int8"}, "precision='int8'"),
    ],
)
def test_bad_settings_name_value_and_choices(setting, message):
    model = net()
    with pytest.raises(SetupError, match=message):
        Accumulator(model, sgd(model), plan(4, 8), **setting)


# What a DataLoader gives is one batch, a list of alike batches is micro-batches.


def seen(accumulator, given):
    """The structures and sizes of the micro-batches."""
    found = []
    for micro in accumulator.window(given):
        found.append((type(micro[1]), tree.batch_size(micro)))
        accumulator.backward(sum(p.sum() for p in accumulator.model.parameters()))
    return found


@pytest.mark.parametrize(
    "collated",
    [
        [{"x": torch.ones(8, 6)}, torch.zeros(8)],
        [[torch.ones(8, 6), torch.ones(8, 2)], torch.zeros(8)],
        [("a", "b", "c", "d", "e", "f", "g", "h"), torch.ones(8, 6)],
    ],
    ids=["dict and tensor", "pair and tensor", "names and tensor"],
)
def test_the_parts_of_a_collated_batch_are_no_micro_batches(collated):
    model = net()
    accumulator = Accumulator(model, sgd(model), plan(4, 8))
    assert [size for _, size in seen(accumulator, collated)] == [4, 4]
    assert accumulator.last.samples == 8


def test_a_list_of_alike_batches_is_taken_as_it_is_cut():
    model = net()
    accumulator = Accumulator(model, sgd(model), plan(4, 8))
    micros = [batch(4, seed=1), batch(3, seed=2)]
    assert [size for _, size in seen(accumulator, micros)] == [4, 3]


def test_a_list_that_may_be_one_batch_or_two_is_not_guessed_at():
    model = net()
    accumulator = Accumulator(model, sgd(model), plan(4, 8))
    pair = [{"x": torch.ones(8, 6)}, {"x": torch.ones(8, 6)}]
    with pytest.raises(SetupError, match="largest of 8 samples, and the plan's limit is 4: .* as a tuple"):
        seen(accumulator, pair)
    assert [size for _, size in seen(accumulator, tuple(pair))] == [4, 4]


def test_a_window_whose_generator_somebody_holds_is_said_to_be_open():
    model = net()
    accumulator = Accumulator(model, sgd(model), plan(4, 8))
    held = accumulator.window(batch(8))
    x, y = next(held)
    accumulator.backward(F.cross_entropy(model(x), y))
    with pytest.raises(SetupError, match="the window before is still open"):
        next(accumulator.window(batch(8)))
    held.close()
    assert len(seen(accumulator, batch(8))) == 2


def test_a_number_is_no_plan():
    model = net()
    with pytest.raises(SetupError, match="plan=8.* a Plan, as autoaccum.plan"):
        Accumulator(model, sgd(model), 8)


def test_a_window_that_is_left_out_leaves_no_trace_in_batch_norm():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4))
    accumulator = Accumulator(model, sgd(model), plan(limit=4, target_batch=8), on_nonfinite="skip")
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(8, 5)
    x[3, 2] = float("nan")
    for inputs, targets in accumulator.window((x, torch.zeros(8, dtype=torch.long))):
        accumulator.backward(F.cross_entropy(model(inputs), targets))
    assert accumulator.last.skipped is not None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_inside_the_step_closes_the_window():
    model = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4))
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=1)
    accumulator = Accumulator(model, optimizer, plan(limit=4, target_batch=8), scheduler=scheduler)
    momentum = model[0].momentum

    def window():
        for inputs, targets in accumulator.window((torch.randn(8, 5), torch.zeros(8, dtype=torch.long))):
            accumulator.backward(F.cross_entropy(model(inputs), targets))

    window()
    for _ in range(2):
        with pytest.raises(ValueError, match="Tried to step"):
            window()
        assert model[0].momentum == momentum
        assert all(parameter.grad is None for parameter in model.parameters())


def test_an_own_loop_takes_no_more_memory_under_autocast_than_a_trial():
    from autoaccum.memory.device import open_device
    from autoaccum.memory.trace import record

    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(9)])
    data = torch.randn(16, 256), torch.zeros(16, dtype=torch.long)
    loss = nn.CrossEntropyLoss()

    def peak(objective):
        accumulator = Accumulator(model, sgd(model), plan(8, 16), objective=objective, precision="bf16")
        with record(open_device("cpu")) as recording:
            if objective is None:
                for inputs, targets in accumulator.window(data):
                    accumulator.backward(loss(model(inputs), targets))
            else:
                accumulator.open(tree.split(data, [8, 8]))
                accumulator.run(tree.split(data, [8, 8]))
                accumulator.finish()
        accumulator.close()
        return recording.trace.peak

    assert peak(None) <= 1.02 * peak(Objective(model, loss=loss))


def test_the_loss_is_fetched_before_the_last_backward_pass():
    """A device then still has that pass to do while the host reads the loss."""
    seen = []

    class Seen(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(list(accumulator._sums._fetched))
            return gradient

    model = nn.Linear(3, 1)
    made = plan(limit=2, target_batch=4)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), made, precision="fp32")
    for piece in accumulator.window(torch.ones(4, 3)):
        accumulator.backward(Seen.apply(model(piece)).mean())
    assert [len(fetched) for fetched in seen] == [0, 2]
    assert seen[1][0] == pytest.approx(accumulator.last.loss)

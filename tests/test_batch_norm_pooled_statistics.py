"""Pooled running statistics: after a window a layer holds what one update with the whole batch would have left.

The first layer's input does not depend on how the batch is cut, so there the two must agree to rounding, in float64.
"""

import copy

import pytest
import torch
from torch import nn

from autoaccum.batch_norm.pooled_statistics import PooledStatistics, needs_two
from autoaccum.errors import PlanError, SetupError
from autoaccum.ranks import Ranks
from tests.norms import SIZES, assert_same, batch, float64, pooled, state, train_window  # noqa: F401, a fixture

LAYERS = {
    "BatchNorm1d on rows": (lambda **kind: nn.BatchNorm1d(3, **kind), (3,)),
    "BatchNorm1d on sequences": (lambda **kind: nn.BatchNorm1d(3, **kind), (3, 7)),
    "BatchNorm2d": (lambda **kind: nn.BatchNorm2d(3, **kind), (3, 4, 5)),
    "BatchNorm3d": (lambda **kind: nn.BatchNorm3d(3, **kind), (3, 2, 3, 2)),
    "SyncBatchNorm, one process": (lambda **kind: nn.SyncBatchNorm(3, **kind), (3, 4)),
    "InstanceNorm1d": (lambda **kind: nn.InstanceNorm1d(3, track_running_stats=True, **kind), (3, 7)),
    "InstanceNorm2d": (lambda **kind: nn.InstanceNorm2d(3, track_running_stats=True, **kind), (3, 4, 5)),
    "InstanceNorm3d": (lambda **kind: nn.InstanceNorm3d(3, track_running_stats=True, **kind), (3, 2, 3, 2)),
}


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_window_leaves_what_one_update_with_the_whole_batch_leaves(kind, momentum):
    make, shape = LAYERS[kind]
    whole, layer = make(momentum=momentum), make(momentum=momentum)
    with pooled(layer) as statistics:
        for seed, sizes in enumerate((SIZES, (2, 2, 2, 7), (13,), SIZES)):
            samples = batch(*shape, seed=seed)
            whole(samples)
            train_window(statistics, layer, samples, sizes)
            assert_same(layer, state(whole), 1e-12)
    assert layer.momentum == momentum


def test_elements_count_not_samples_where_lengths_differ():
    """One pooled update is the update with all elements at once: n is elements per channel, not samples."""
    short, long = batch(3, 4, samples=6), batch(3, 9, samples=2, seed=2)
    elements = torch.cat([part.transpose(0, 1).reshape(3, -1) for part in (short, long)], dim=1)
    whole, layer = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    whole(elements.T)
    with pooled(layer) as statistics:
        statistics.begin(1)
        layer(short), layer(long)
        statistics.commit(Ranks())
    assert_same(layer, state(whole), 1e-12)


def test_instances_count_not_elements_where_torch_averages_over_instances():
    """InstanceNorm's statistics are a mean over instances, long or short; one without a batch dimension is one."""
    short, long, lone = batch(3, 4, samples=6), batch(3, 9, samples=2, seed=2), batch(3, 5, samples=1, seed=3)[0]
    instances = [*short, *long, lone]
    layer = nn.InstanceNorm1d(3, momentum=0.25, track_running_stats=True)
    with pooled(layer) as statistics:
        statistics.begin(1)
        layer(short), layer(long), layer(lone)
        statistics.commit(Ranks())
    means = torch.stack([instance.mean(1) for instance in instances]).mean(0)
    variances = torch.stack([instance.var(1) for instance in instances]).mean(0)
    torch.testing.assert_close(layer.running_mean, 0.25 * means, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, 0.75 + 0.25 * variances, rtol=1e-12, atol=1e-12)


def test_variance_does_not_cancel_in_float32_under_a_mean_a_thousand_times_larger():
    samples = (torch.randn(64, 3) + 4000.0).float()
    layer = nn.BatchNorm1d(3, momentum=1.0, dtype=torch.float32)
    with pooled(layer) as statistics:
        train_window(statistics, layer, samples, [8] * 8)
    torch.testing.assert_close(layer.running_var.double(), samples.double().var(0), rtol=1e-3, atol=0)


def test_layers_with_momenta_of_their_own_and_a_momentum_changed_between_windows():
    def make():
        torch.manual_seed(3)
        return nn.ModuleList([nn.BatchNorm1d(3, momentum=m) for m in (0.1, 0.4, None)])

    class Parallel(nn.Module):  # all layers see the input itself
        def __init__(self):
            super().__init__()
            self.layers = make()

        def forward(self, data):
            return sum(layer(data) for layer in self.layers)

    whole, model = Parallel(), Parallel()
    with pooled(model) as statistics:
        for seed, momentum in enumerate((0.1, 0.7, None, 0.2)):
            whole.layers[0].momentum = model.layers[0].momentum = momentum
            whole(batch(3, seed=seed))
            train_window(statistics, model, batch(3, seed=seed))
            assert [layer.momentum for layer in model.layers] == [momentum, 0.4, None]
            assert_same(model, state(whole), 1e-12)


def test_a_layer_used_twice_counts_twice_and_is_updated_once():
    whole, layer = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    left, right = batch(3), batch(3, samples=8, seed=2)
    whole(torch.cat([left, right]))
    with pooled(layer) as statistics:
        statistics.begin(1)
        for a, b in zip(left.split(SIZES), right.split((3, 3, 2))):
            layer(a), layer(b)
        statistics.commit(Ranks())
    assert_same(layer, state(whole), 1e-12)
    assert layer.num_batches_tracked == 1


def test_a_layer_used_twice_among_layers_used_once():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.once, self.twice, self.never = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, data):
            return self.twice(data) + self.once(data) + self.twice(2 * data)

    model, samples = Shared(), batch(3)
    once, twice = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    once(samples)
    twice(torch.cat([samples, 2 * samples]))
    never = state(model.never)
    with pooled(model) as statistics:
        train_window(statistics, model, samples)
    assert_same(model.once, state(once), 1e-12)
    assert_same(model.twice, state(twice), 1e-12)
    assert_same(model.never, never)


# Types.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_buffers_are_pooled_in_float32(dtype):
    """256 micro-batches pooled in the buffers' own type would stop moving; here the error is that of one rounding."""
    samples = (torch.randn(1024, 3) + 3).to(dtype)
    layer = nn.BatchNorm1d(3, momentum=1.0, dtype=dtype)
    with pooled(layer) as statistics:
        train_window(statistics, layer, samples, [4] * 256)
    assert layer.running_mean.dtype == layer.running_var.dtype == dtype
    exact, half = samples.double(), 0.6 * torch.finfo(dtype).eps  # half a unit in the last place, and a little
    torch.testing.assert_close(layer.running_mean.double(), exact.mean(0), rtol=half, atol=0)
    torch.testing.assert_close(layer.running_var.double(), exact.var(0), rtol=half, atol=0)


def test_layers_of_several_types_in_one_model():
    wide, narrow = nn.BatchNorm1d(3), nn.BatchNorm1d(3, dtype=torch.float32)
    model = nn.ModuleList([wide, narrow, nn.BatchNorm1d(3, dtype=torch.bfloat16)])
    model.forward = lambda data: sum(layer(data.to(layer.weight.dtype)).double() for layer in model)
    whole = nn.BatchNorm1d(3)
    whole(batch(3))
    with pooled(model) as statistics:
        train_window(statistics, model, batch(3))
    assert_same(wide, state(whole), 1e-12)
    assert_same(narrow.double(), state(whole), 1e-6)
    assert_same(model[2].double(), state(whole), 2e-2)


def test_buffers_replaced_between_windows_are_found():
    whole, layer = nn.BatchNorm1d(3), nn.BatchNorm1d(3, dtype=torch.float32)
    with pooled(layer) as statistics:
        for seed in range(3):
            layer.double()
            layer.load_state_dict(state(layer), assign=True)
            whole(batch(3, seed=seed))
            train_window(statistics, layer, batch(3, seed=seed))
    assert_same(layer, state(whole), 1e-12)


# What is left alone.


def test_layers_in_eval_mode_and_without_running_statistics_are_left_alone():
    frozen, free = nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)
    model = nn.Sequential(nn.BatchNorm1d(3), frozen, free, nn.LayerNorm(3))
    frozen.eval()
    frozen.running_mean.fill_(-0.0)
    before, bits = state(frozen), frozen.running_mean.view(torch.int64).clone()
    with pooled(model) as statistics:
        assert [name for name, _ in statistics.layers] == ["0", "1"]
        for _ in range(2):
            train_window(statistics, model, batch(3))
        assert free.momentum == 0.1
    assert_same(frozen, before)
    assert torch.equal(frozen.running_mean.view(torch.int64), bits)


def test_the_mode_is_asked_at_each_call():
    whole, layer = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    first, second, third = batch(3).split(SIZES)
    whole(torch.cat([first, third]))
    with pooled(layer) as statistics:
        statistics.begin(1)
        layer(first)
        layer.eval()
        layer(second)
        layer.train()
        layer(third)
        statistics.commit(Ranks())
    assert_same(layer, state(whole), 1e-12)


def test_evaluation_inside_a_window_normalises_with_the_running_statistics():
    layer = nn.BatchNorm1d(3)
    samples = batch(3)
    expected = copy.deepcopy(layer).eval()(samples)
    with pooled(layer) as statistics:
        statistics.begin(1)
        loss = layer(samples.clone().requires_grad_()).square().sum()
        layer.eval()
        assert torch.equal(layer(samples), expected)
        layer.train()
        loss.backward()  # the buffers were written in between, unseen by autograd
        statistics.commit(Ranks())


def test_a_layer_whose_tracking_is_switched_off_is_left_alone():
    layer = nn.BatchNorm1d(3)
    layer.track_running_stats = False
    before = state(layer)
    with pooled(layer) as statistics:
        train_window(statistics, layer, batch(3))
    assert_same(layer, before)


def test_mode_keep_touches_nothing():
    plain, model = nn.Sequential(nn.BatchNorm1d(3)), nn.Sequential(nn.BatchNorm1d(3))
    with pooled(model, "keep") as statistics:
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        train_window(statistics, model, batch(3))
        for micro in batch(3).split(SIZES):
            plain(micro)
        assert_same(model, state(plain))
        statistics.begin(1)
        model(batch(3)), plain(batch(3))
        statistics.discard()
    assert_same(model, state(plain))


# Mode "momentum".


@pytest.mark.parametrize("momentum", [0.1, 0.5, 0.0, 1.0])
def test_mode_momentum_updates_each_micro_batch_by_the_small_momentum(momentum):
    plain, layer = nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=momentum)
    with pooled(layer, "momentum") as statistics:
        for k, sizes in ((3, SIZES), (1, (13,)), (2, (7, 6))):
            plain.momentum = 1 - (1 - momentum) ** (1 / k)
            statistics.begin(k)
            for micro in batch(3).split(sizes):
                layer(micro), plain(micro)
            statistics.commit(Ranks())
    plain.num_batches_tracked.fill_(3)
    assert_same(layer, state(plain), 1e-12)
    assert layer.momentum == momentum


def test_mode_momentum_averages_windows_where_momentum_is_none():
    """The cumulative average of windows of k: every window weighs the same, whatever its k."""
    layer = nn.BatchNorm1d(3, momentum=None)
    means = []
    with pooled(layer, "momentum") as statistics:
        for seed, sizes in enumerate((SIZES, (7, 6), SIZES)):
            statistics.begin(len(sizes))
            for micro in batch(3, seed=seed).split(sizes):
                layer(micro)
            statistics.commit(Ranks())
            means.append(torch.stack([micro.mean(0) for micro in batch(3, seed=seed).split(sizes)]).mean(0))
    torch.testing.assert_close(layer.running_mean, torch.stack(means).mean(0), rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 3


# Windows that die, and the end.


@pytest.mark.parametrize("mode", ["pooled", "momentum"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_discard_puts_everything_back_bit_for_bit_and_the_replay_is_undisturbed(mode, momentum):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=momentum)
        )

    undisturbed, model = make(), make()
    with pooled(undisturbed, mode) as ours, pooled(model, mode) as statistics:
        for statistics_, model_ in ((ours, undisturbed), (statistics, model)):
            train_window(statistics_, model_, batch(3, seed=7))
        before = state(model)

        def die(module, inputs):
            raise MemoryError

        statistics.begin(1)
        model(batch(3))
        bomb = model[1].register_forward_pre_hook(die)
        with pytest.raises(MemoryError):
            model(batch(3))
        bomb.remove()
        statistics.discard()
        assert_same(model, before)
        assert [layer.momentum for _, layer in statistics.layers] == [momentum, momentum]
        statistics.discard()
        assert_same(model, before)

        for statistics_, model_ in ((ours, undisturbed), (statistics, model)):
            train_window(statistics_, model_, batch(3, seed=8))
        assert_same(model, state(undisturbed))


def test_begin_drops_a_window_that_was_left_open():
    model, undisturbed = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    undisturbed(batch(3))
    with pooled(model) as statistics:
        statistics.begin(1)
        model(100 * batch(3))
        train_window(statistics, model, batch(3))
    assert_same(model, state(undisturbed), 1e-12)


def test_a_window_that_another_owner_left_open_is_dropped():
    """As after an interrupted cell in a notebook: momentum 1 and a micro-batch's statistics are not the layer's own."""
    model, undisturbed = nn.BatchNorm1d(3, momentum=0.3), nn.BatchNorm1d(3, momentum=0.3)
    undisturbed(batch(3))
    abandoned = PooledStatistics(model, "pooled")
    abandoned.begin(1)
    model(100 * batch(3))
    statistics = PooledStatistics(model, "pooled")
    assert model.momentum == 0.3
    abandoned.begin(1)
    model(100 * batch(3))
    train_window(statistics, model, batch(3))
    assert_same(model, state(undisturbed), 1e-12)
    with pytest.raises(SetupError, match="call begin"):
        abandoned.commit(Ranks())


def test_a_momentum_that_has_no_small_one_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=1.5))
    with pooled(model, "momentum") as statistics, pytest.raises(PlanError):
        statistics.begin(4)
    assert [layer.momentum for layer in model] == [0.1, 1.5]


def test_a_lazy_layer_is_refused_until_it_has_its_shape():
    model = nn.LazyBatchNorm1d()
    with pooled(model) as statistics:
        with pytest.raises(SetupError, match="has no shape yet: run one batch"):
            statistics.begin(1)
        model(batch(3))
        statistics.begin(1)
        statistics.discard()


def test_close_in_mid_window_discards_and_leaves_no_hook():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3))
    before = state(model)
    statistics = PooledStatistics(model, "pooled")
    statistics.begin(1)
    model(batch(3))
    statistics.close()
    assert_same(model, before)
    assert model[0].momentum == 0.3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    statistics.close()


def test_between_windows_the_model_is_its_own():
    """A forward in training mode outside a window updates as torch does, momentum and all."""
    plain, model = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with pooled(model):
        plain(batch(3)), model(batch(3))
        assert_same(model, state(plain))


def test_a_forward_that_bypasses_the_hooks_is_an_error_not_a_loss():
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = state(model)
    with pooled(model) as statistics:
        statistics.begin(1)
        model[0].forward(batch(3))
        with pytest.raises(SetupError, match=r"'0' ran in this window, but not through its hooks"):
            statistics.commit(Ranks())
        statistics.discard()
    assert_same(model, before)


def test_an_unknown_mode_and_a_commit_without_a_window_are_refused():
    with pytest.raises(SetupError, match="'frozen' is not known"):
        PooledStatistics(nn.BatchNorm1d(3), "frozen")
    with pytest.raises(SetupError, match="call begin"):
        PooledStatistics(nn.BatchNorm1d(3), "pooled").commit(Ranks())


def test_a_model_without_such_layers_costs_nothing():
    model = nn.Linear(3, 3)
    with pooled(model) as statistics:
        train_window(statistics, model, batch(3))
        assert statistics.layers == []
        assert not model._forward_hooks


def test_one_value_per_channel_is_recognised():
    with pytest.raises(ValueError) as refused:
        nn.BatchNorm1d(3)(batch(3, samples=1))
    assert needs_two(refused.value)
    wrapped = RuntimeError("in the worker")
    wrapped.__cause__ = refused.value
    assert needs_two(wrapped)
    with pytest.raises(ValueError) as other:  # more samples would not help here
        nn.InstanceNorm1d(3)(batch(3, 1, samples=1))
    assert not needs_two(other.value)
    assert not needs_two(ValueError("expected 2D or 3D input (got 4D input)"))

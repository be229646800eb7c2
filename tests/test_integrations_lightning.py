"""Lightning with a TargetBatch among its callbacks: the whole batch's update, and everything else as without it."""

import logging
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import autoaccum
from autoaccum.errors import LossError, PlanError, SetupError
from autoaccum.training.events import TrialRan, WindowReplayed
from tests.versions import as_newest, peer

pl = peer("lightning").pytorch

from autoaccum.integrations.lightning import TargetBatch  # noqa: E402

EXACT = 1e-10
USUAL = {
    "max_epochs": 2, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False, "gradient_clip_val": 0.5, "accelerator": "cpu", "precision": "64-true",
}  # fmt: skip
torch.manual_seed(0)
X = torch.randn(70, 6, dtype=torch.float64)
Y = torch.randint(0, 5, (70,))
Y[::5] = -100


class Module(pl.LightningModule):
    """A linear layer with ignored targets, momentum and a schedule."""

    def __init__(self, interval="step"):
        super().__init__()
        torch.manual_seed(1)
        self.net, self.interval, self.sizes = nn.Linear(6, 5).double(), interval, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.sizes.append(len(x))
        loss = cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("mean", x.mean(), on_step=True, on_epoch=True)
        self.log("most", x.max(), on_step=False, on_epoch=True, reduce_fx="max")
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}


class Rows(pl.Callback):
    """What is logged after each batch and epoch."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        values |= {"lr": trainer.optimizers[0].param_groups[0]["lr"], "out": float(outputs["loss"])}
        self.rows.append({**values, "step": trainer.global_step})

    def on_train_epoch_end(self, trainer, module):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def trained(module, *callbacks, batch=32, data=None, checkpoint=None, **settings):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(callbacks=list(callbacks), **{**USUAL, **settings})
        torch.manual_seed(3)
        loader = data if data is not None else DataLoader(TensorDataset(X, Y), batch, shuffle=True)
        trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def target(size=32, **keywords):
    return TargetBatch(size, **{"progress": False, "micro_batch": 7, **keywords})


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def off(module, reference):
    return float((flat(module) - flat(reference)).norm() / flat(reference).norm())


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_update_logs_schedule_clipping_and_ragged_tail_are_the_whole_batchs(interval):
    alone, theirs, ours, rows = Module(interval), Rows(), Module(interval), Rows()
    trainer = trained(alone, theirs)
    with_us = trained(ours, target(), rows, batch=8, accumulate_grad_batches=4)
    assert off(ours, alone) <= EXACT
    assert (with_us.global_step, with_us.current_epoch) == (trainer.global_step, trainer.current_epoch) == (6, 2)
    for own, their in zip(rows.rows, theirs.rows, strict=True):
        assert own == pytest.approx(their, rel=1e-9)
    assert max(ours.sizes) <= 8  # the check before training runs eight
    assert sum(ours.sizes[-18:]) >= 70


def test_its_step_is_probed_and_leaves_no_trace():
    heard, alone, ours, rows, theirs = [], Module(), Module(), Rows(), Rows()
    trained(alone, theirs)
    trained(ours, target(memory="4KiB", micro_batch=None, cache=False, callbacks=[heard.append]), rows, batch=8)
    plan = next(event for event in heard if event.name == "start").plan
    assert plan["accumulation_steps"] > 1
    assert any(isinstance(event, TrialRan) for event in heard)
    assert off(ours, alone) <= EXACT
    for own, their in zip(rows.rows, theirs.rows, strict=True):
        assert own == pytest.approx(their, rel=1e-9)


def test_attach_adds_the_callback():
    alone, ours = Module(), Module()
    trained(alone)
    trainer = pl.Trainer(**USUAL)
    assert autoaccum.attach(trainer, target_batch=32, micro_batch=8, progress=False) is trainer
    with pytest.raises(SetupError, match="attached already"):
        autoaccum.attach(trainer, target_batch=32)
    running = pl.Trainer(**USUAL)
    running.training = True
    with pytest.raises(SetupError, match="training has begun"):
        autoaccum.attach(running, target_batch=32)
    torch.manual_seed(3)
    trainer.fit(ours, DataLoader(TensorDataset(X, Y), 4, shuffle=True))
    assert off(ours, alone) <= EXACT


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_out_of_memory_errors_are_replayed_and_change_neither_update_nor_logs(count):
    class Scarce(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if replays() < count and len(batch[0]) > 2 and torch.rand((), generator=draw) < 0.6:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return loss

    def replays():
        return sum(isinstance(event, WindowReplayed) for event in heard)

    draw, heard = torch.Generator().manual_seed(1), []
    alone, ours, rows, theirs = Module(), Scarce(), Rows(), Rows()
    trained(alone, theirs, max_epochs=count)
    ours_alone = target(micro_batch=32, check=False, regrow_after=1, callbacks=[heard.append])
    trained(ours, ours_alone, rows, batch=8, max_epochs=count)
    assert replays() == count
    assert off(ours, alone) <= EXACT
    for own, their in zip(rows.rows, theirs.rows, strict=True):
        assert own == pytest.approx(their, rel=1e-9)


def test_a_training_goes_on_from_the_trainers_checkpoint_without_probing(tmp_path):
    def saving():
        return pl.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")

    data, heard = DataLoader(TensorDataset(X, Y), 8), []
    whole, again = Module(), Module()
    trained(whole, target(micro_batch=None, memory="4KiB", cache=False), saving(), data=data, enable_checkpointing=True)
    trained(again, target(micro_batch=None, memory="4KiB", cache=False, callbacks=[heard.append]), data=data,
            checkpoint=str(tmp_path / "epoch=0.ckpt"))  # fmt: skip
    assert not any(isinstance(event, TrialRan) for event in heard)
    assert torch.equal(flat(again), flat(whole))


class Noisy(Module):
    """With dropout."""

    def training_step(self, batch, batch_idx):
        return super().training_step((nn.functional.dropout(batch[0], 0.3), batch[1]), batch_idx)


@pytest.mark.skipif(not as_newest("lightning"), reason="held for the newest Lightning that is tested")
@pytest.mark.parametrize("limit", [1.0, 2])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_in_mid_epoch_it_goes_on_with_the_next_window_of_the_order_drawn_then(step, limit, tmp_path):
    saving = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, again = Noisy(), Noisy()
    settings = {"limit_train_batches": limit, "enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer = trained(whole, target(), saving, batch=8, **settings)
    gone_on = trained(again, target(), batch=8, checkpoint=str(tmp_path / f"step={step}.ckpt"), **settings)
    assert gone_on.global_step == trainer.global_step == 2 * (3 if limit == 1.0 else 2)
    assert off(again, whole) <= 1e-14  # what the check learnt of the loss changes how its weights are rounded


def test_a_stream_hooks_of_the_modules_and_limits():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(X, Y))

    class Doubling(Module):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 2, batch[1]

    alone, ours = Doubling(), Doubling()
    trained(alone, data=DataLoader(Stream(), 32), limit_train_batches=2)
    trained(ours, target(), data=DataLoader(Stream(), 8), limit_train_batches=2)
    assert off(ours, alone) <= EXACT


def test_early_stopping_and_what_is_left_afterwards():
    ours, rows = Module(), Rows()
    stop = pl.callbacks.EarlyStopping("loss_epoch", patience=1, min_delta=10.0, check_on_train_epoch_end=True)
    trainer = trained(ours, target(), stop, rows, max_epochs=9)
    assert trainer.current_epoch == 2
    assert all(not parameter._backward_hooks for parameter in ours.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())
    assert "_on_before_batch_transfer" not in vars(ours)
    assert type(trainer.fit_loop.epoch_loop.automatic_optimization).__name__ == "_AutomaticOptimization"


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Iterates(Module):
    def training_step(self, dataloader_iter):
        return None


class Coupled(Module):
    def training_step(self, batch, batch_idx):
        out = self.net(batch[0])
        return (out - out.mean(0)).square().mean()


@pytest.mark.parametrize(
    ("module", "settings", "error", "says"),
    [
        (Manual, {"gradient_clip_val": None}, SetupError, "manual optimization"),
        (Iterates, {}, SetupError, "dataloader_iter"),
        (Module, {"overfit_batches": 2}, SetupError, "overfit_batches"),
        (Coupled, {}, LossError, "batch-coupled"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_trained(module, settings, error, says):
    made = module()
    before = flat(made)
    with pytest.raises(error, match=says):
        trained(made, target(), **settings)
    assert torch.equal(flat(made), before)


def test_bad_values_and_loaders():
    with pytest.raises(PlanError, match="target_batch"):
        TargetBatch()
    with pytest.raises(SetupError, match="does not take 'sizes'"):
        TargetBatch(8, sizes=3)
    ready = DataLoader(TensorDataset(X, Y), batch_sampler=[[0, 1], [2, 3]])
    with pytest.raises(SetupError, match="its own batch_sampler"):
        trained(Module(), target(), data=ready)


def own(accumulated, **settings):
    return pl.Trainer(**{**USUAL, "accumulate_grad_batches": accumulated, **settings})


class Plain(Module):
    """No target is ignored: every micro-batch counts alike."""

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch[0]), batch[1].clamp(min=0))


def test_verify_says_what_lightnings_own_accumulation_does():
    module, loader = Module(), DataLoader(TensorDataset(X, Y), 8)
    before, random = flat(module), torch.get_rng_state()
    report = autoaccum.verify(own(4), (module, loader))
    assert not report.ok
    assert report.cause == "uneven denominators"
    assert "averaged per micro-batch" in report.text
    assert "TargetBatch(32)" in report.text
    assert torch.equal(flat(module), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert module._trainer is None
    assert "configure_optimizers" not in vars(module)


class Drawing(pl.LightningModule):
    """Draws noise for every sample."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 1)

    def training_step(self, batch, batch_idx):
        return (self.net(batch[0] + torch.randn_like(batch[0])) - batch[0][:, :1]).square().mean()


def test_verify_gives_a_modules_samples_the_same_noise_in_every_micro_batch():
    loader = DataLoader(TensorDataset(X.float(), X.float()), 4)
    report = autoaccum.verify(own(4, precision="32-true"), (Drawing(), loader))
    assert report.cause == "k times too small"  # in the last window of an epoch alone


def test_verify_sees_what_becomes_of_an_epochs_last_window():
    report = autoaccum.verify(own(4), (Plain(), DataLoader(TensorDataset(X, Y), 8)))
    assert not report.ok
    assert "the last window of an epoch, of 2 micro-batches" in report.text
    assert not autoaccum.verify(own(1), (Plain(), DataLoader(TensorDataset(X, Y), 8))).verifiable

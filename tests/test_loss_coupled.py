"""Losses that compare samples: the gradient of the whole window, at the memory of a micro-batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import autoaccum
from autoaccum.errors import LossError, NothingFitsError, SetupError
from autoaccum.loss.coupled import Representations

torch.manual_seed(0)
SAMPLES = 46
X, Y = torch.randn(SAMPLES, 8, dtype=torch.float64), torch.randn(SAMPLES, 6, dtype=torch.float64)
KINDS = torch.arange(SAMPLES) % 5


class Towers(nn.Module):
    """Two encoders and a temperature that is learned."""

    def __init__(self, drop=0.0, deep=False):
        super().__init__()
        self.left = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(drop), nn.Linear(16, 4))
        self.right, self.temperature, self.deep = nn.Linear(6, 4), nn.Parameter(torch.tensor(1.0)), deep

    def forward(self, x, y):
        left = checkpoint(self.left, x, use_reentrant=False) if self.deep else self.left(x)
        return F.normalize(left, dim=1), F.normalize(self.right(y), dim=1)


def towers(**settings):
    torch.manual_seed(1)
    return Towers(**settings).double()


def encode(model, batch):
    left, right = model(batch[0], batch[1])
    return {"left": left, "right": right, "temperature": model.temperature.exp()}


def clip(found):
    scores = found["temperature"] * found["left"] @ found["right"].T
    own = torch.arange(len(scores))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def info_nce(found, batch):
    scores = found["left"] @ found["right"].T / 0.2
    return F.cross_entropy(scores, torch.arange(len(scores)))


def sup_con(found, batch):
    scores = found["left"] @ found["left"].T / 0.3 - 1e9 * torch.eye(len(batch[2]))
    same = (batch[2][:, None] == batch[2][None]).double() - torch.eye(len(batch[2]))
    return -((scores.log_softmax(1) * same).sum(1) / same.sum(1).clamp(min=1)).mean()


def batch_hard(found, batch):
    distances = (found["left"][:, None] - found["right"][None]).square().sum(-1)
    same = batch[2][:, None] == batch[2][None]
    return F.relu(distances.masked_fill(~same, 0).amax(1) - distances.masked_fill(same, 1e3).amin(1) + 0.5).mean()


def barlow_twins(found):
    left, right = ((side - side.mean(0)) / side.std(0) for side in (found["left"], found["right"]))
    difference = (left.T @ right / len(left) - torch.eye(left.shape[1])).square()
    return difference.diagonal().sum() + 0.01 * (difference.sum() - difference.diagonal().sum())


def vic_reg(found):
    total = F.mse_loss(found["left"], found["right"])
    for side in (found["left"], found["right"]):
        covariance = torch.cov(side.T)
        total = total + F.relu(1 - side.std(0)).mean() + (covariance - covariance.diag().diag()).square().sum() / 4
    return total


class Projected(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.matrix = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))

    def forward(self, found, batch):
        scores = found["left"] @ self.matrix @ found["right"].T
        return F.cross_entropy(scores, torch.arange(len(scores)))


LOSSES = {
    "CLIP": clip, "InfoNCE": info_nce, "SupCon": sup_con, "batch-hard": batch_hard, "Barlow Twins": barlow_twins,
    "VICReg": vic_reg,
}  # fmt: skip


def by_hand(model, loss, count):
    """The gradient of one window of the first `count` samples at once."""
    batch = (X[:count], Y[:count], KINDS[:count])
    value = autoaccum.Coupled(encode, loss)(model, batch)
    value.backward()
    return value


def loop(model, loss, *, target=23, **settings):
    step = loss if isinstance(loss, autoaccum.Coupled) else autoaccum.Coupled(encode, loss)
    given = {"optimizer": torch.optim.SGD, "lr": 1.0, "micro_batch": 9, "shuffle": False, "max_steps": 1,
             "lr_rule": "none", "device": "cpu", "check": False, **settings}  # fmt: skip
    return autoaccum.prepare(model, (X, Y, KINDS), target_batch=target, step=step, **given)


def moved(before, after):
    """What a step of SGD at rate 1 took away: the gradient."""
    return [old.detach() - new.detach() for old, new in zip(before, after)]


def error(found, reference):
    off = sum(float((a - b).square().sum()) for a, b in zip(found, reference))
    return (off / sum(float(b.square().sum()) for b in reference)) ** 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_the_update_is_the_whole_windows(name):
    model, other = towers(), towers()
    before = copy.deepcopy(list(model.parameters()))
    record = next(iter(loop(model, LOSSES[name])))
    value = by_hand(other, LOSSES[name], 23)
    reference = [torch.zeros_like(p) if p.grad is None else p.grad for p in other.parameters()]
    assert record.micro_batches == 3
    assert record.loss == pytest.approx(value.item(), rel=1e-12)
    assert error(moved(before, model.parameters()), reference) < 1e-12


def test_what_the_loss_has_of_its_own_is_trained_once():
    model, other, loss, same = towers(), towers(), Projected(), Projected()
    before = copy.deepcopy([*model.parameters(), *loss.parameters()])
    next(iter(loop(model, loss)))
    by_hand(other, same, 23)
    reference = [torch.zeros_like(p) if p.grad is None else p.grad for p in (*other.parameters(), *same.parameters())]
    assert error(moved(before, [*model.parameters(), *loss.parameters()]), reference) < 1e-12
    assert float((before[-1] - loss.matrix.detach()).norm()) > 0


@pytest.mark.parametrize("deep", [False, True])
def test_dropout_repeats_its_masks_and_the_generators_move_once(deep):
    model, other = towers(drop=0.3, deep=deep), towers(drop=0.3)
    before = copy.deepcopy(list(model.parameters()))
    running = loop(model, clip)
    torch.manual_seed(5)
    next(iter(running))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    pieces = [encode(other, (X[a:b], Y[a:b])) for a, b in ((0, 8), (8, 16), (16, 23))]
    whole = {name: torch.cat([piece[name] for piece in pieces]) for name in ("left", "right")}
    clip({**whole, "temperature": other.temperature.exp()}).backward()
    assert error(moved(before, model.parameters()), [p.grad for p in other.parameters()]) < 1e-12
    assert torch.equal(drawn, torch.rand(3))


def test_statistics_and_buffers_move_once():
    def normalising():
        torch.manual_seed(3)
        body = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, 6)), nn.BatchNorm1d(6), nn.Linear(6, 4)
        )
        return body.double()

    def first(found):
        return F.cross_entropy(found @ found.T, torch.arange(len(found)))

    def outputs(model, batch):
        return model(batch[0])

    model, other = normalising(), normalising()
    next(iter(loop(model, autoaccum.Coupled(outputs, first), batch_norm="keep")))
    for a, b in ((0, 8), (8, 16), (16, 23)):  # each micro-batch once, in order
        other(X[a:b])
    for (name, found), reference in zip(model.named_buffers(), other.buffers()):
        assert torch.equal(found, reference), name
    pooled = normalising()
    next(iter(loop(pooled, autoaccum.Coupled(outputs, first))))
    assert int(pooled[1].num_batches_tracked) == 1


@pytest.mark.parametrize("stage", ["first pass", "second pass"])
def test_a_window_that_runs_out_of_memory_runs_again(stage):
    class Tight(Towers):
        failed = 0

        def forward(self, x, y):
            if len(x) > 4 and torch.is_grad_enabled() is (stage == "second pass") and len(x) < 8:
                Tight.failed += 1
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return super().forward(x, y)

    torch.manual_seed(1)
    model, other = Tight(drop=0.0).double(), towers()
    before = copy.deepcopy(list(model.parameters()))
    with pytest.warns(UserWarning, match="the same samples run again"):
        record = next(iter(loop(model, clip)))  # 8 + 8 + 7: the last fails
    by_hand(other, clip, 23)
    assert Tight.failed
    assert record.micro_batches > 3
    assert error(moved(before, model.parameters()), [p.grad for p in other.parameters()]) < 1e-12


def test_a_loss_that_does_not_fit_itself_says_so():
    def hungry(found):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(NothingFitsError, match=r"the loss itself ran out of memory over the 23 samples"):
        next(iter(loop(towers(), hungry)))


def test_outputs_and_targets_need_no_step():
    def loss(outputs, kinds):
        return sup_con({"left": outputs}, (None, None, kinds))

    torch.manual_seed(1)
    model = nn.Linear(8, 4).double()
    other, before = copy.deepcopy(model), copy.deepcopy(list(model.parameters()))
    result = autoaccum.fit(
        model, (X, KINDS), target_batch=23, loss=loss, reduction="coupled", optimizer=torch.optim.SGD, lr=1.0,
        micro_batch=9, shuffle=False, max_steps=1, lr_rule="none", device="cpu",
    )  # fmt: skip
    loss(other(X[:23]), KINDS[:23]).backward()
    assert error(moved(before, model.parameters()), [p.grad for p in other.parameters()]) < 1e-12
    assert result.verify.ok
    assert "twice" in result.plan.reasons["denominator"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_runs_under_one_scale(precision):
    def gradient(target, micro_batch):
        model = towers().float()
        before = copy.deepcopy(list(model.parameters()))
        data = (X[:16].float(), Y[:16].float())
        autoaccum.fit(
            model, data, target_batch=16, step=autoaccum.Coupled(encode, clip), optimizer=torch.optim.SGD, lr=1.0,
            micro_batch=micro_batch, shuffle=False, max_steps=1, lr_rule="none", device="cpu", check=False,
            precision=precision, clip_norm=0.1,
        )  # fmt: skip
        return moved(before, model.parameters())

    whole, split = gradient(16, 16), gradient(16, 6)
    assert any(float(part.norm()) > 0 for part in whole)
    assert error(split, whole) < 0.03


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(tmp_path):
    def run(folder, steps):
        model = towers(drop=0.3)
        made = loop(
            model, clip, target=16, max_steps=steps, seed=7, shuffle=True, checkpoint=folder, checkpoint_every=1
        )
        made.run()
        return model.state_dict()

    whole = run(tmp_path / "a", 4)
    run(tmp_path / "b", 2)
    # Another number of steps is the same training, gone on with.
    for name, value in run(tmp_path / "b", 4).items():
        assert torch.equal(value, whole[name]), name


def test_a_trial_holds_the_whole_windows_loss():
    """The limit is one of memory in PyTorch's bytes, to which the loss over 512 samples adds its 512 × 512."""

    def wide():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))

    def outputs(model, batch):
        return model(batch[0])

    def loss(found):
        return F.cross_entropy(found @ found.T, torch.arange(len(found)))

    data = (torch.randn(512, 8),)
    keywords = {"optimizer": "sgd", "device": "cpu", "memory": "6MiB", "cache": False}
    small = autoaccum.probe(wide(), data, step=autoaccum.Coupled(outputs, loss), target_batch=64, **keywords)
    large = autoaccum.probe(wide(), data, step=autoaccum.Coupled(outputs, loss), target_batch=512, **keywords)
    assert large.forecast(8) - small.forecast(8) > 2 * 512 * 512 * 4
    assert large.residual == 0
    verified = max((trial for trial in large.trials if trial.kind != "trace"), key=lambda trial: trial.batch)
    assert verified.peak_bytes == large.forecast(verified.batch)
    with pytest.raises(NothingFitsError, match="compares all 512 samples of a window at once"):
        autoaccum.probe(
            wide(), data, step=autoaccum.Coupled(outputs, loss), target_batch=512, **{**keywords, "memory": "2MiB"}
        )


def test_verify_says_what_an_undeclared_one_would_cost():
    model = nn.Linear(8, 4).double()

    def loss(outputs, kinds):
        return sup_con({"left": outputs}, (None, None, kinds))

    report = autoaccum.verify(model, (X, KINDS), loss=loss, device="cpu")
    assert not report.ok
    assert 'reduction="coupled"' in report.text
    assert "× the time of a plain window" in report.text
    assert autoaccum.verify(model, (X, KINDS), loss=loss, reduction="coupled", device="cpu").ok


def test_a_plain_loss_is_told_that_its_second_forward_is_for_nothing():
    model = nn.Linear(8, 5).double()
    report = autoaccum.verify(model, (X, KINDS), loss=F.cross_entropy, reduction="coupled", device="cpu")
    assert report.ok
    assert "for nothing" in report.text


def bad(case):
    def joined(model, batch):
        return model(batch[0], batch[1])[0].mean(0)

    def partial(model, batch):
        left, right = model(batch[0], batch[1])
        return {"left": left, "right": right.sum(0)}

    def detached(model, batch):
        return [side.detach() for side in model(batch[0], batch[1])]

    calls = []

    def counting(model, batch):
        calls.append(1)
        found = encode(model, batch)
        return {**found, "left": found["left"] * len(calls)}

    return {
        "no samples along dimension 0": (joined, lambda found: found.sum(), "none of it has the samples"),
        "a sum that depends on the batch": (
            partial, lambda found: (found["left"] * found["right"]).sum(), "is shared by the whole window"),
        "no graph": (detached, lambda found: (found[0] * found[1]).sum(), "nothing can be learned"),
        "one value a sample": (encode, lambda found: found["left"].sum(1), "a gradient needs a scalar"),
        "side effects": (counting, clip, "ran a second time"),
    }[case]  # fmt: skip


@pytest.mark.parametrize(
    "case", ["no samples along dimension 0", "a sum that depends on the batch", "no graph", "one value a sample",
             "side effects"],
)  # fmt: skip
def test_bad_halves_are_refused_in_words(case):
    encoder, loss, words = bad(case)
    model = towers()
    with pytest.raises(LossError, match=words):
        next(iter(loop(model, autoaccum.Coupled(encoder, loss))))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_declarations_that_cannot_be_are_refused():
    with pytest.raises(SetupError, match=r"autoaccum\.Coupled\(encode, loss\)"):
        autoaccum.prepare(towers(), (X, Y), target_batch=8, reduction="coupled", device="cpu")
    with pytest.raises(SetupError, match="autoaccum.Coupled"):
        autoaccum.prepare(towers(), (X, Y), target_batch=8, step=lambda m, b: m(*b), reduction="coupled", device="cpu")
    with pytest.raises(SetupError, match="token_mean"):
        loop(towers(), clip, reduction="token_mean")
    with pytest.raises(SetupError, match="encode=3"):
        autoaccum.Coupled(3, clip)


def test_a_vector_is_not_taken_for_samples_by_coincidence():
    kept = Representations(autoaccum.Coupled(print, print), set(), 11)
    for samples in (4, 3, 4):
        kept.enter({"rows": torch.zeros(samples, 2), "vector": torch.ones(4)}, samples)
    rows, vector = kept.leaves().values()
    assert rows.shape == (11, 2)
    assert torch.equal(vector, torch.ones(4))
    assert kept.shared == {"['vector']"}

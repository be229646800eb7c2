"""Weighted as the objective says, ragged micro-batches give the whole batch's gradient, for every loss."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from autoaccum.data import tree
from autoaccum.errors import LossError, SetupError
from autoaccum.loss.counts import ignored_by
from autoaccum.loss.mean import Mean, Sum
from autoaccum.loss.objective import Objective
from autoaccum.loss.reduction import GivenLoss
from autoaccum.ranks import Ranks
from autoaccum.window.passes import backward
from autoaccum.window.window_sums import WindowSums

N, C, T, D = 9, 5, 4, 3  # samples, classes, places, features
SIZES = (4, 1, 3, 1)
REDUCTIONS = ("mean", "sum", "none")


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape, ignored=-100, seed=1):
    """Class indices, unevenly ignored: none in the first samples, all of the fifth's, some elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(C, shape, generator=generator)
    targets[4:] = torch.where(torch.rand(targets[4:].shape, generator=generator) < 0.4, ignored, targets[4:])
    targets[4] = ignored
    return targets


class Net(nn.Module):
    """x (samples, D) -> outputs of any shape, through one weight that needs all of them."""

    def __init__(self, *shape, after=lambda outputs: outputs):
        super().__init__()
        self.shape, self.after = shape, after
        self.weight = nn.Parameter(tensor(D, max(1, torch.Size(shape).numel()), seed=7) / 2)

    def forward(self, x):
        return self.after((x @ self.weight).reshape(len(x), *self.shape))


def gradient(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def whole(model, loss):
    model.zero_grad()
    loss().backward()
    return gradient(model)


def share_of(term, total):
    """A term's share of a mean over `total`: what the backward pass begins at, multiplied out."""
    tensor, factor = term.part(total)
    return tensor * factor


def counted(objective, batch):
    """The denominator of a loss of one term, as it is read."""
    objective.settle([batch])
    return {"loss": float(objective.terms(batch, None, batch)["loss"].denominator)}


def accumulated(objective, batch, sizes=SIZES):
    """As a window does."""
    objective.model.zero_grad()
    micros = tree.split(batch, sizes)
    sums = WindowSums(micros, objective, objective.prepare(micros), Ranks(), "a window")
    for micro in micros:
        terms = objective.terms(micro, sums.own, micro)
        parts = sums.enter(terms)
        if parts:
            backward([tensor for tensor, _ in parts], [factor for _, factor in parts])
        sums.done += 1
    _, correction = sums.close(*sums.so_far)
    return gradient(objective.model) * correction


def error(objective, batch, reference, sizes=SIZES):
    reference = whole(objective.model, reference)
    return float((accumulated(objective, batch, sizes) - reference).norm() / reference.norm())


def probabilities(*shape, dim=1):
    return tensor(*shape, seed=3).softmax(dim)


def signs(*shape):
    return torch.where(tensor(*shape, seed=4) > 0, 1.0, -1.0).double()


WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
X = tensor(N, D, seed=5)
log = functools.partial(torch.log_softmax, dim=1)

# name: (module, its settings, targets, the model). Targets of several parts are a tuple.
TABLE = {
    "CrossEntropy": (nn.CrossEntropyLoss, {}, classes(N, T), Net(C, T)),
    "CrossEntropy, ignore_index": (nn.CrossEntropyLoss, {"ignore_index": 2}, classes(N, T, ignored=2), Net(C, T)),
    "CrossEntropy, weight": (nn.CrossEntropyLoss, {"weight": WEIGHT}, classes(N, T), Net(C, T)),
    "CrossEntropy, weight, one a sample": (nn.CrossEntropyLoss, {"weight": WEIGHT}, classes(N), Net(C)),
    "CrossEntropy, smoothing": (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, classes(N, T), Net(C, T)),
    "CrossEntropy, smoothing, weight, ignore_index": (
        nn.CrossEntropyLoss,
        {"label_smoothing": 0.2, "weight": WEIGHT, "ignore_index": 3},
        classes(N, T, ignored=3),
        Net(C, T),
    ),
    "CrossEntropy, probabilities": (nn.CrossEntropyLoss, {}, probabilities(N, C, T), Net(C, T)),
    "CrossEntropy, probabilities, weight": (nn.CrossEntropyLoss, {"weight": WEIGHT}, probabilities(N, C), Net(C)),
    "CrossEntropy, probabilities, places, weight, smoothing": (
        nn.CrossEntropyLoss,
        {"weight": WEIGHT, "label_smoothing": 0.1},
        probabilities(N, C, T),
        Net(C, T),
    ),
    "NLL": (nn.NLLLoss, {}, classes(N, T), Net(C, T, after=log)),
    "NLL, weight, ignore_index": (
        nn.NLLLoss,
        {"weight": WEIGHT, "ignore_index": 1},
        classes(N, 2, 2, ignored=1),
        Net(C, 2, 2, after=log),
    ),
    "MSE": (nn.MSELoss, {}, tensor(N, T), Net(T)),
    "L1": (nn.L1Loss, {}, tensor(N, T), Net(T)),
    "SmoothL1": (nn.SmoothL1Loss, {"beta": 0.5}, tensor(N, T), Net(T)),
    "Huber": (nn.HuberLoss, {"delta": 0.5}, tensor(N, T), Net(T)),
    "BCE": (nn.BCELoss, {}, tensor(N, T).sigmoid(), Net(T, after=torch.sigmoid)),
    "BCE, weight": (nn.BCELoss, {"weight": WEIGHT[:T]}, tensor(N, T).sigmoid(), Net(T, after=torch.sigmoid)),
    "BCEWithLogits": (nn.BCEWithLogitsLoss, {}, tensor(N, T).sigmoid(), Net(T)),
    "BCEWithLogits, weight, pos_weight": (
        nn.BCEWithLogitsLoss,
        {"weight": WEIGHT[:T], "pos_weight": WEIGHT[1:]},
        tensor(N, T).sigmoid(),
        Net(T),
    ),
    "PoissonNLL": (nn.PoissonNLLLoss, {"full": True}, tensor(N, T).exp().round(), Net(T)),
    "GaussianNLL": (nn.GaussianNLLLoss, {}, tensor(N, T), Net(2, T, after=lambda o: (o[:, 0], o[:, 1].exp()))),
    "SoftMargin": (nn.SoftMarginLoss, {}, signs(N, T), Net(T)),
    "HingeEmbedding": (nn.HingeEmbeddingLoss, {"margin": 2.0}, signs(N, T), Net(T)),
    "KLDiv": (nn.KLDivLoss, {}, probabilities(N, C), Net(C, after=log)),
    "KLDiv, log_target": (nn.KLDivLoss, {"log_target": True}, probabilities(N, C).log(), Net(C, after=log)),
    "CTC": (
        nn.CTCLoss,
        {},
        (
            torch.randint(1, C, (N, 3), generator=torch.Generator().manual_seed(2)),
            torch.tensor([8, 8, 7, 8, 6, 8, 8, 7, 8]),
            torch.tensor([3, 1, 2, 3, 1, 2, 3, 1, 1]),
        ),
        Net(8, C, after=lambda o: o.log_softmax(2).transpose(0, 1)),
    ),
    "MultiMargin": (nn.MultiMarginLoss, {}, classes(N, ignored=0), Net(C)),
    "MultiMargin, weight": (nn.MultiMarginLoss, {"weight": WEIGHT, "p": 2}, classes(N, ignored=0), Net(C)),
    "MultiLabelMargin": (
        nn.MultiLabelMarginLoss,
        {},
        torch.tensor([[3, 0, -1, 1, 2], [1, -1, 0, 2, 3], [-1, 0, 1, 2, 3]]).repeat(3, 1),
        Net(C),
    ),
    "MultiLabelSoftMargin": (nn.MultiLabelSoftMarginLoss, {}, (signs(N, C) + 1) / 2, Net(C)),
    "MultiLabelSoftMargin, weight": (
        nn.MultiLabelSoftMarginLoss,
        {"weight": WEIGHT},
        (signs(N, C) + 1) / 2,
        Net(C),
    ),
    "CosineEmbedding": (
        nn.CosineEmbeddingLoss,
        {"margin": 0.1},
        signs(N),
        Net(2, C, after=lambda o: (o[:, 0], o[:, 1])),
    ),
    "MarginRanking": (
        nn.MarginRankingLoss,
        {"margin": 1.0},
        signs(N, T),
        Net(2, T, after=lambda o: (o[:, 0], o[:, 1])),
    ),
    "TripletMargin": (nn.TripletMarginLoss, {"margin": 3.0}, torch.zeros(N), Net(3, T, after=lambda o: o.unbind(1))),
    "TripletMarginWithDistance": (
        nn.TripletMarginWithDistanceLoss,
        {"margin": 3.0, "distance_function": lambda a, b: (a - b).abs().sum(-1)},
        torch.zeros(N),
        Net(3, T, after=lambda o: o.unbind(1)),
    ),
}

# How the losses that take more than (outputs, targets) are called by hand.
BY_HAND = {
    "GaussianNLL": lambda loss, o, y: loss(o[0], y, o[1]),
    "CTC": lambda loss, o, y: loss(o, *y),
    "CosineEmbedding": lambda loss, o, y: loss(o[0], o[1], y),
    "MarginRanking": lambda loss, o, y: loss(o[0], o[1], y),
    "TripletMargin": lambda loss, o, y: loss(*o),
    "TripletMarginWithDistance": lambda loss, o, y: loss(*o),
}

FUNCTIONS = {
    nn.CrossEntropyLoss: functional.cross_entropy,
    nn.NLLLoss: functional.nll_loss,
    nn.MSELoss: functional.mse_loss,
    nn.L1Loss: functional.l1_loss,
    nn.SmoothL1Loss: functional.smooth_l1_loss,
    nn.HuberLoss: functional.huber_loss,
    nn.BCELoss: functional.binary_cross_entropy,
    nn.BCEWithLogitsLoss: functional.binary_cross_entropy_with_logits,
    nn.PoissonNLLLoss: functional.poisson_nll_loss,
    nn.GaussianNLLLoss: functional.gaussian_nll_loss,
    nn.SoftMarginLoss: functional.soft_margin_loss,
    nn.HingeEmbeddingLoss: functional.hinge_embedding_loss,
    nn.KLDivLoss: functional.kl_div,
    nn.CTCLoss: functional.ctc_loss,
    nn.MultiMarginLoss: functional.multi_margin_loss,
    nn.MultiLabelMarginLoss: functional.multilabel_margin_loss,
    nn.MultiLabelSoftMarginLoss: functional.multilabel_soft_margin_loss,
    nn.CosineEmbeddingLoss: functional.cosine_embedding_loss,
    nn.MarginRankingLoss: functional.margin_ranking_loss,
    nn.TripletMarginLoss: functional.triplet_margin_loss,
    nn.TripletMarginWithDistanceLoss: functional.triplet_margin_with_distance_loss,
}


def test_every_loss_of_torch_is_in_the_table():
    ours = {kind for kind, _, _, _ in TABLE.values()}
    theirs = {getattr(nn, name) for name in dir(nn) if name.endswith("Loss")}
    # Apart: one returns a pair, the other is newer than the oldest torch and has a test of its own.
    apart = {nn.AdaptiveLogSoftmaxWithLoss, getattr(nn, "LinearCrossEntropyLoss", None)}
    assert theirs - ours - apart == set()


def by_hand(name, loss, model, targets):
    call = BY_HAND.get(name, lambda loss, o, y: loss(o, y))
    result = call(loss, model(X), targets)
    return result.mean() if result.dim() else result


CASES = [(name, reduction) for name in TABLE for reduction in (*REDUCTIONS, *["batchmean"] * name.startswith("KLDiv"))]


@pytest.mark.parametrize(("name", "reduction"), CASES, ids=[f"{n}, {r}" for n, r in CASES])
@pytest.mark.parametrize("form", ["module", "function", "subclass"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
def test_weighted_shares_of_ragged_micro_batches_are_the_whole_batchs_gradient(name, reduction, form):
    kind, settings, targets, model = TABLE[name]
    settings = {**settings, "reduction": reduction}
    if form == "function":
        loss = functools.partial(FUNCTIONS[kind], **settings)
    else:
        loss = (kind if form == "module" else type(f"My{kind.__name__}", (kind,), {}))(**settings)
    objective = Objective(model, loss=loss)
    assert error(objective, (X, targets), lambda: by_hand(name, loss, model, targets)) <= 1e-10


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="this torch has no LinearCrossEntropyLoss")
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_linear_cross_entropy_counts_as_cross_entropy_does(weight):
    loss = nn.LinearCrossEntropyLoss(D, C, weight=weight, dtype=torch.float64)
    model, y = Net(D), classes(N)
    objective = Objective(model, loss=loss)
    assert error(objective, (X, y), lambda: loss(model(X), y)) <= 1e-10


def test_functions_partials_and_compiled_modules_are_recognised_as_what_they_are():
    module = nn.CrossEntropyLoss(ignore_index=2)
    found = [
        functional.cross_entropy,
        functools.partial(functools.partial(functional.cross_entropy, ignore_index=2), label_smoothing=0.1),
        torch.compile(module),
        module,
    ]
    assert [ignored_by(GivenLoss(loss, None).settings) for loss in found] == [-100, 2, 2, 2]
    for loss in (lambda o, y: 0, functools.partial(functional.cross_entropy, X), SimpleNamespace(), print):
        assert not GivenLoss(loss, None).kind


def test_a_reduction_hidden_in_deprecated_settings_is_refused():
    with pytest.raises(SetupError, match=r"size_average=False is deprecated.*reduction='mean'"):
        Objective(Net(C), loss=functools.partial(functional.mse_loss, size_average=False))
    assert GivenLoss(nn.MSELoss(size_average=False), None).reduction == "sum"


def test_settings_are_read_at_each_call_class_weights_too():
    loss = nn.CrossEntropyLoss(weight=WEIGHT.float())
    objective, batch = Objective(Net(C), loss=loss), (X[:2], torch.tensor([0, 2]))
    assert objective.denominators(batch) == {"loss": pytest.approx(3.2)}
    loss.weight[2] = 5.0
    assert objective.denominators(batch) == {"loss": pytest.approx(5.2)}
    loss.ignore_index = 2
    assert objective.denominators(batch) == {"loss": pytest.approx(0.2)}
    loss.reduction = "sum"
    with pytest.raises(SetupError, match="reduction='sum' now, and had 'mean'"):
        objective.terms(batch)


@pytest.mark.parametrize(
    ("name", "reduction", "expected"),
    [
        ("CrossEntropy, probabilities, weight", "mean", N),
        ("CrossEntropy, probabilities, places, weight, smoothing", "mean", N * T),
        ("CrossEntropy", "none", N * T),
        ("MSE", "mean", N * T),
        ("KLDiv", "mean", N * C),
        ("KLDiv", "batchmean", N),
        ("CTC", "mean", N),
        ("MultiMargin, weight", "mean", N),
        ("MultiLabelMargin", "mean", N),
        ("MultiLabelSoftMargin, weight", "mean", N),
        ("CosineEmbedding", "mean", N),
        ("TripletMargin", "mean", N),
    ],
)
def test_the_denominator_is_the_number_that_torch_divides_by(name, reduction, expected):
    kind, settings, targets, model = TABLE[name]
    objective = Objective(model, loss=kind(**settings, reduction=reduction))
    assert objective.denominators((X, targets)) == {"loss": float(expected)}


def test_a_micro_batch_in_which_every_target_is_ignored_contributes_nothing():
    model, y = Net(C, T), classes(N, T)
    objective = Objective(model, loss=nn.CrossEntropyLoss())
    nothing = (X[4:5], y[4:5])
    assert objective.denominators(nothing) == {"loss": 0.0}
    term = objective.terms(nothing)["loss"]
    assert torch.isnan(term.value)
    assert term.numerator == 0


def test_an_all_ignored_term_adds_nothing_to_a_term_that_counts():
    model, y = Net(C, T), classes(N, T)

    def step(model, batch):
        outputs = model(batch["x"])
        return {"main": functional.cross_entropy(outputs, batch["y"]), "penalty": outputs.square().mean()}

    objective = Objective(
        model, step=step, reduction={"main": lambda b: (b["y"] != -100).sum(), "penalty": "sample_mean"}
    )

    def reference():
        outputs = model(X)
        return functional.cross_entropy(outputs, y) + outputs.square().mean()

    assert error(objective, {"x": X, "y": y}, reference) <= 1e-10


def test_a_subclass_with_a_forward_of_its_own_is_read():
    class Shifted(nn.CrossEntropyLoss):
        def forward(self, outputs, targets):
            return super().forward(outputs[..., :-1], targets[:, 1:])

    model, y = Net(C, T), classes(N, T, ignored=3)
    loss = Shifted(ignore_index=3, weight=WEIGHT)
    objective = Objective(model, loss=loss)
    assert error(objective, (X, y), lambda: loss(model(X), y)) <= 1e-10
    assert "the total weight of its targets, as its graph says" in objective.reason


# Means.


def test_a_mean_keeps_its_parts_and_gives_its_share():
    mean = Mean(torch.tensor(6.0), 3)
    assert (mean.numerator, mean.denominator, mean.value, share_of(mean, 12)) == (6, 3.0, 2, 0.5)
    mean = Mean.of(torch.tensor(2.0), 3)
    assert (mean.numerator, mean.denominator, mean.value, share_of(mean, 12)) == (6, 3.0, 2, 0.5)
    added = Sum(torch.tensor(6.0), 3)
    assert (added.numerator, added.value, share_of(added, 12)) == (6, 6, 6)
    assert Mean(2, 4).value == 0.5
    assert "Mean(" in repr(mean)


def test_a_mean_in_half_precision_forms_no_raw_sum_in_it():
    mean = Mean.of(torch.tensor(9.0, dtype=torch.float16), 65536)
    assert share_of(mean, 131072) == 4.5
    assert mean.numerator == 9 * 65536


def test_a_denominator_on_a_device_stays_there_and_carries_no_graph():
    loss = torch.ones((), device="meta", requires_grad=True)
    mean = Mean(loss, torch.ones(1, device="meta", requires_grad=True) * 3)
    assert mean.denominator.shape == ()
    assert not mean.denominator.requires_grad
    assert share_of(mean, 9.0).requires_grad


def test_torchs_own_rule_is_held_against_the_graph_in_the_first_micro_batches(monkeypatch):
    model = nn.Linear(D, C)
    objective = Objective(model, loss=nn.CrossEntropyLoss(ignore_index=0))
    batches = [(torch.randn(4, D), torch.tensor(targets)) for targets in ([1, 2, 3, 4], [1, 0, 0, 2])]
    for batch, known in list(zip(batches, objective.prepare(batches, rehearses=True))) * 20:  # trials of a probe
        objective.terms(batch, known, batch)
    objective.prepare(batches)
    monkeypatch.setattr("autoaccum.loss.reduction.tokens", lambda targets, ignored: float(targets.numel()))
    with pytest.raises(LossError, match="its graph says that it divides by"):
        objective.terms(batches[1])


def test_a_mean_over_nothing_known_only_to_the_device_adds_nothing():
    mean = Mean.of(torch.tensor(float("nan"), requires_grad=True), 0)
    mean.denominator = torch.tensor(0)  # as on a device, where it is not read
    assert share_of(mean, 5.0) == 0


@pytest.mark.parametrize(
    ("numerator", "denominator", "words"),
    [
        ("3", 1, "str"),
        (torch.ones(2), 1, r"\(2,\)"),
        (torch.ones(()), -1, "-1"),
        (torch.ones(()), float("nan"), "nan"),
        (torch.ones(()), torch.ones(2), r"\(2,\)"),
        (torch.ones(()), "1", "str"),
    ],
)
def test_a_mean_of_parts_that_are_no_numbers_is_refused(numerator, denominator, words):
    with pytest.raises(LossError, match=words):
        Mean(numerator, denominator)


# What the objective gives besides.


def test_outputs_and_targets_are_given_to_metrics_in_the_models_own_call():
    model, y = Net(C), classes(N)
    for batch in ({"x": X, "label": y}, (X, y)):
        terms, outputs, targets = Objective(model, loss=functional.cross_entropy).evaluate(batch)
        assert torch.equal(outputs, model(X))
        assert targets is y
        assert terms["loss"].value == functional.cross_entropy(outputs, y)


def test_a_bare_forward_runs_a_step_too():
    seen = []
    Objective(Net(C), step=lambda model, batch: seen.append(model(batch))).forward(X)
    assert seen[0].shape == (N, C)
    model = Net(C)
    model.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs))
    Objective(model, loss=functional.mse_loss).forward((X, X))
    assert len(seen) == 2


def test_with_known_denominators_no_value_is_read_from_the_device():
    """A meta tensor has no values: reading one raises, where on a GPU it would wait."""
    model = Net(C, T).to("meta")
    objective = Objective(model, loss=nn.CrossEntropyLoss(weight=WEIGHT.to("meta")))
    batch = (X.to("meta"), classes(N, T).to("meta"))
    share_of(objective.terms(batch, {"loss": 9.0})["loss"], 30.0).backward()
    assert model.weight.grad.shape == model.weight.shape


def test_known_denominators_are_not_counted_again():
    counted = []
    objective = Objective(Net(C), loss=functional.mse_loss, reduction=lambda batch: counted.append(1) or 3)
    objective.terms((X, tensor(N, C)), {"loss": 3.0})
    assert counted == []


def test_the_reason_is_one_line_that_names_the_denominator_and_the_loss():
    def reason(**settings):
        text = Objective(Net(C), **settings).reason
        assert "\n" not in text
        return text

    assert reason(loss=nn.CrossEntropyLoss()) == "divides by the targets other than -100, as CrossEntropyLoss does"
    assert "class weights of the targets other than 0" in reason(loss=nn.NLLLoss(WEIGHT, ignore_index=0))
    assert "adds up, as mse_loss" in reason(loss=functools.partial(functional.mse_loss, reduction="sum"))
    assert reason(loss=nn.KLDivLoss(reduction="batchmean")).startswith("divides by the samples")
    assert "as declared by reduction='element_mean'" in reason(loss=print, reduction="element_mean")
    assert "read at each micro-batch" in reason(step=print)
    assert "divides by print(batch), as declared" in reason(loss=nn.MSELoss(), reduction=print)

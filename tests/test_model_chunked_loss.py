"""A loss in chunks: torch's own to rounding, never all logits at once, and its divisor read by a window."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import LossError, SetupError
from autoaccum.loss.objective import Objective
from autoaccum.memory.device import open_device
from autoaccum.memory.forecast import Forecast
from autoaccum.memory.trace import record
from autoaccum.model.chunked_loss import chunked_cross_entropy
from tests.test_loss_objective import accumulated, whole

CPU = open_device("cpu")
WIDE, CLASSES = 8, 50


def chance(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=chance(seed), dtype=dtype)


def labelled(*shape, ignored=0.0, classes=CLASSES):
    labels = torch.randint(classes, shape, generator=chance(3))
    return torch.where(torch.rand(shape, generator=chance(4)) < ignored, -100, labels)


def with_gradients(loss, *given):
    """(the loss's value, the gradients of 1.7 times it)."""
    leaves = [each.clone().requires_grad_() for each in given]
    made = loss(*leaves)
    (made * 1.7).backward()
    return made.detach(), [leaf.grad for leaf in leaves]


def off(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))


KINDS = list(itertools.product([False, True], [False, True], [0.0, 0.1], [False, True], ["mean", "sum"]))


@pytest.mark.parametrize("ignored", [0.0, 0.6])
@pytest.mark.parametrize(("biased", "weighted", "smoothing", "shift", "reduction"), KINDS)
def test_loss_and_gradients_are_those_of_all_logits(biased, weighted, smoothing, shift, reduction, ignored):
    given = [drawn(3, 20, WIDE), drawn(CLASSES, WIDE, seed=1), *([drawn(CLASSES, seed=2)] if biased else [])]
    weights = drawn(CLASSES, seed=5).abs() if weighted else None
    labels = labelled(3, 20, ignored=ignored)

    def plain(hidden, weight, bias=None):
        logits, targets = F.linear(hidden, weight, bias), labels
        if shift:
            logits, targets = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.reshape(-1, CLASSES), targets.reshape(-1), weight=weights,
                               label_smoothing=smoothing, reduction=reduction)  # fmt: skip

    def in_chunks(hidden, weight, bias=None):
        return chunked_cross_entropy(hidden, weight, labels, bias=bias, class_weights=weights, shift=shift,
                                     label_smoothing=smoothing, reduction=reduction, chunk=7)  # fmt: skip

    expected, found = with_gradients(plain, *given), with_gradients(in_chunks, *given)
    assert off(found[0], expected[0]) < 1e-12
    for own, other in zip(found[1], expected[1], strict=True):
        assert off(own, other) < 1e-12


def test_where_nothing_counts_the_mean_is_nan_and_its_gradient_0_as_in_torch():
    labels = torch.full((4,), -100)
    loss, gradients = with_gradients(
        lambda hidden, weight: chunked_cross_entropy(hidden, weight, labels), drawn(4, WIDE), drawn(CLASSES, WIDE)
    )
    assert loss.isnan()
    assert not any(gradient.any() or gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["autocast", "bf16"])
def test_half_precision_is_as_near_as_with_all_logits(kind):
    given = drawn(64, WIDE), drawn(CLASSES, WIDE, seed=1)
    labels = labelled(64, ignored=0.3)

    def half(loss):
        def computed(hidden, weight):
            if kind == "bf16":
                return loss(hidden.bfloat16(), weight.bfloat16())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(hidden.float(), weight.float())

        return with_gradients(computed, *given)

    def plain(hidden, weight):
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    exact = with_gradients(plain, *given)
    all_at_once = half(plain)
    in_chunks = half(lambda hidden, weight: chunked_cross_entropy(hidden, weight, labels, chunk=16))
    assert in_chunks[0].dtype == torch.float32
    for own, other, reference in zip(in_chunks[1], all_at_once[1], exact[1], strict=True):
        assert off(own, reference) < 1.5 * off(other, reference)


def test_gradients_are_kept_for_as_long_as_somebody_may_ask_again():
    hidden, weight = drawn(9, WIDE).requires_grad_(), drawn(CLASSES, WIDE, seed=1).requires_grad_()
    loss = chunked_cross_entropy(hidden, weight, labelled(9))
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)
    with pytest.raises(LossError, match=r"ran a second time.*retain_graph=True"):
        loss.backward()


def test_a_second_derivative_is_refused_by_name():
    hidden, weight = drawn(9, WIDE).requires_grad_(), drawn(CLASSES, WIDE)
    with pytest.raises(LossError, match=r"second derivative.*functional\.cross_entropy"):
        torch.autograd.grad(chunked_cross_entropy(hidden, weight, labelled(9)), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": torch.zeros(3, WIDE, dtype=torch.int64)}, "hidden is torch.int64"),
        ({"weight": torch.zeros(CLASSES, 3)}, r"weight has the shape \(50, 3\): give \(50, 8\)"),
        ({"labels": torch.zeros(4, dtype=torch.int64)}, r"labels has the shape \(4,\): give \(3,\)"),
        ({"labels": torch.zeros(3)}, "labels are torch.float32"),
        ({"bias": torch.zeros(3)}, r"bias has the shape \(3,\): give \(50,\)"),
        ({"class_weights": torch.zeros(3)}, "class_weights has the shape"),
        ({"label_smoothing": 2.0}, "label_smoothing=2.0: give a number from 0 to 1"),
        ({"chunk": 0}, "chunk=0: give 1 row or more"),
    ],
)
def test_what_does_not_fit_together_is_named(change, text):
    given = {"hidden": torch.zeros(3, WIDE), "weight": torch.zeros(CLASSES, WIDE), "labels": labelled(3), **change}
    with pytest.raises(LossError, match=text):
        chunked_cross_entropy(**given)


def test_other_reductions_are_refused():
    with pytest.raises(SetupError, match="reduction='none': choose 'mean', 'sum'"):
        chunked_cross_entropy(torch.zeros(3, WIDE), torch.zeros(CLASSES, WIDE), labelled(3), reduction="none")


# --- memory


MANY, ROWS = 4000, 16


def traced(rows):
    hidden, weight = drawn(rows, WIDE, dtype=torch.float32).requires_grad_(), drawn(MANY, WIDE, dtype=torch.float32)
    labels = labelled(rows, ignored=0.5, classes=MANY)
    with record(CPU) as recording:
        chunked_cross_entropy(hidden, weight.requires_grad_(), labels, chunk=ROWS).backward()
    return recording.trace


def test_all_logits_are_never_held_and_the_forecast_is_exact_whatever_the_number_of_chunks():
    traced(8)
    sizes = (ROWS, 2 * ROWS, 3 * ROWS)
    forecast = Forecast.fit([traced(rows) for rows in sizes], [(rows,) for rows in sizes])
    assert forecast.unaligned == 0
    for rows in (200, 1001):
        peak = traced(rows).peak
        assert forecast.peak(rows) == peak
        assert peak < rows * MANY * 4 / 2


# --- in a window


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside = nn.Parameter(drawn(WIDE, WIDE, seed=8))
        self.head = nn.Parameter(drawn(CLASSES, WIDE, seed=9))

    def forward(self, x):
        return torch.tanh(x @ self.inside)


@pytest.mark.parametrize(("weighted", "smoothing"), [(False, 0.0), (True, 0.0), (False, 0.2)])
def test_a_window_reads_what_it_divides_by(weighted, smoothing):
    weights = drawn(CLASSES, seed=5).abs() if weighted else None

    def step(model, batch):
        return chunked_cross_entropy(model(batch["x"]), model.head, batch["y"], class_weights=weights,
                                     label_smoothing=smoothing, chunk=4)  # fmt: skip

    def plain(model, batch):
        logits = model(batch["x"]) @ model.head.T
        return F.cross_entropy(logits.flatten(0, 1), batch["y"].flatten(), weight=weights, label_smoothing=smoothing)

    model = Head()
    labels = labelled(9, 6, ignored=0.4)
    labels[4] = -100
    batch = {"x": drawn(9, 6, WIDE), "y": labels}
    objective = Objective(model, step=step)
    assert off(accumulated(objective, batch), whole(model, lambda: plain(model, batch))) < 1e-10
    assert objective.reason.startswith("divides by")


def test_two_losses_in_one_step_are_each_divided_by_their_own():
    def terms(loss):
        def step(model, batch):
            hidden = model(batch["x"])
            return loss(hidden, model.head, batch["y"]) + 0.5 * loss(hidden, model.head, batch["z"])

        return step

    def plain(hidden, weight, labels):
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())

    model = Head()
    batch = {"x": drawn(9, 6, WIDE), "y": labelled(9, 6, ignored=0.4), "z": labelled(9, 6, ignored=0.7).flip(0)}
    objective = Objective(model, step=terms(chunked_cross_entropy))
    assert off(accumulated(objective, batch), whole(model, lambda: terms(plain)(model, batch))) < 1e-10


def test_it_is_public():
    assert autoaccum.chunked_cross_entropy is chunked_cross_entropy
    assert isinstance(chunked_cross_entropy(drawn(2, WIDE), drawn(CLASSES, WIDE), labelled(2)), Tensor)

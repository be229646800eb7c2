"""The commonest mistakes: our words come first and name the remedy, torch's own stand behind them."""

import pytest
import torch
from torch import nn

import autoaccum
from autoaccum.errors import AutoaccumError, DataError, LossError, SetupError

X, Y = torch.randn(24, 6), torch.randint(0, 4, (24,))
TOKENS, WORDS = torch.randint(0, 9, (24, 2)), torch.randint(0, 8, (24,))
LOSS = nn.CrossEntropyLoss()


class OwnLoss(nn.Module):
    """A model that computes its loss from the labels it is given."""

    def __init__(self, optional: bool = False):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        if optional:
            self.forward = self.lenient

    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": LOSS(logits, labels), "logits": logits}

    def lenient(self, x, labels=None):
        logits = self.layer(x)
        return {"loss": None if labels is None else LOSS(logits, labels), "logits": logits}


def embedding(sparse: bool = False) -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten())


CASES = {
    "loss forgotten": (nn.Linear(6, 4), (X, Y), {}, SetupError, "pass loss=f(outputs, targets)", "but 3 were given"),
    "loss forgotten, dict": (
        nn.Linear(6, 4), {"input": X, "labels": Y}, {}, SetupError, "pass loss=f(outputs, targets)", "unexpected",
    ),
    "loss forgotten, one tensor": (nn.Linear(6, 4), X, {}, LossError, "pass loss=f(outputs, targets)", ""),
    "loss beside the model's own": (
        OwnLoss(), {"x": X, "labels": Y}, {"loss": LOSS}, SetupError, "leave loss= out", "missing 1 required",
    ),
    "loss beside the model's own, tuple": (
        OwnLoss(), (X, Y), {"loss": LOSS}, SetupError, "leave loss= out", "missing 1 required",
    ),
    "loss beside the model's own, optional": (
        OwnLoss(True), {"x": X, "labels": Y}, {"loss": LOSS}, SetupError, "leave loss= out", "not dict",
    ),
    "float64 data": (
        nn.Linear(6, 4), (X.double(), Y), {"loss": LOSS}, DataError, "batch[0] is torch.float64", "same dtype",
    ),
    "whole numbers": (nn.Linear(6, 4), (X.long(), Y), {"loss": LOSS}, DataError, "whole numbers", "Long and Float"),
    "int32 labels": (nn.Linear(6, 4), (X, Y.int()), {"loss": LOSS}, DataError, "targets.long()", "Int"),
    "int64 targets": (
        nn.Linear(6, 4), (X, torch.ones(24, 4).long()), {"loss": nn.BCEWithLogitsLoss()}, DataError,
        "targets.to(torch.float32)", "result type Float",
    ),
    "label too large": (nn.Linear(6, 4), (X, Y.clone().fill_(4)), {"loss": LOSS}, SetupError, "a label is 4", ""),
    "label too small": (nn.Linear(6, 4), (X, Y.clone().fill_(-1)), {"loss": LOSS}, SetupError, "a label is -1", ""),
    "classes in the last dimension": (
        nn.Linear(6, 4), (torch.ones(24, 5, 6), torch.zeros(24, 5).long()), {"loss": LOSS}, DataError,
        "takes outputs (samples, classes, ...)", "target size",
    ),
    "another shape": (
        nn.Linear(6, 4), (X, torch.ones(24, 3)), {"loss": nn.BCEWithLogitsLoss()}, DataError, "equal shapes", "size",
    ),
    "token too large": (embedding(), (TOKENS + 9, WORDS), {"loss": LOSS}, DataError, "have 9 rows", "out of range"),
    "AdamW on sparse": (embedding(True), (TOKENS, WORDS), {"loss": LOSS}, SetupError, "sparse=False", ""),
    "SparseAdam on dense": (
        nn.Linear(6, 4), (X, Y), {"loss": LOSS, "optimizer": "sparseadam"}, SetupError, "weight, bias are not", "",
    ),
    "a class that is no optimizer": (
        nn.Linear(6, 4), (X, Y), {"loss": LOSS, "optimizer": nn.ReLU}, SetupError, "f(params, lr=lr)", "'lr'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", ["fit", "micro_batch", "probe"])
@pytest.mark.parametrize("case", CASES)
def test_a_common_mistake_is_named_with_its_remedy(case, way):
    model, data, settings, kind, ours, torchs = CASES[case]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    common = {"target_batch": 8, "device": "cpu", "cache": False, **settings}
    with pytest.raises(AutoaccumError) as caught:
        if way == "probe":
            autoaccum.probe(model, data, **common)
        else:
            autoaccum.fit(model, data, **common, **({"micro_batch": 4} if way == "micro_batch" else {}))
    text = str(caught.value)
    assert isinstance(caught.value, kind)
    assert ours in text
    assert torchs in text
    assert "\n" not in text
    assert text.index(ours) < (text.index(torchs) if torchs else len(text))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda opt: [opt], "a list of 1, as configure_optimizers returns it.*: pass that itself"),
        (lambda opt: {"optimizer": opt, "lr_scheduler": None}, "a dict of 2, .* its schedule as schedule=f"),
        (lambda opt: ([opt], []), "a tuple of 2, as configure_optimizers returns it"),
        (lambda opt: [opt, opt], r"a list of 2, .* several with what each steps as phases=\[Phase"),
    ],
)
def test_what_configure_optimizers_returns_is_taken_apart_in_words(wrap, message):
    model = nn.Linear(6, 4)
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(SetupError, match=message):
        autoaccum.fit(model, (X, Y), loss=LOSS, optimizer=optimizer, target_batch=8, device="cpu")


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 4}, {"micro_batch": 4, "check": False}])
@pytest.mark.parametrize("zeroes", [True, False])
def test_an_optimizer_stepped_inside_backward_is_refused_and_nothing_is_trained(settings, zeroes):
    model = nn.Linear(6, 4)
    inner = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
    before = [p.detach().clone() for p in model.parameters()]

    def stepped(parameter):
        inner[parameter].step()
        if zeroes:
            inner[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(stepped)
    with pytest.raises(SetupError, match="a hook steps an optimizer there"):
        autoaccum.fit(model, (X, Y), loss=LOSS, target_batch=8, device="cpu", cache=False, **settings)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_hooks_that_only_look_at_gradients_are_left_alone():
    model, seen = nn.Linear(6, 4), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(float(p.grad.norm())))
    result = autoaccum.fit(model, (X, Y), loss=LOSS, target_batch=8, device="cpu", cache=False)
    assert len(result.history) == 3
    assert seen


def test_a_steps_outputs_beside_its_loss_are_no_terms():
    def step(model, batch):
        logits = model(batch[0])
        loss = LOSS(logits, batch[1])
        right = (logits.argmax(-1) == batch[1]).float().mean()
        return {"loss": loss, "logits": logits, "accuracy": right, "loss_value": loss.item()}

    torch.manual_seed(0)
    model, twin = nn.Linear(6, 4), nn.Linear(6, 4)
    twin.load_state_dict(model.state_dict())
    common = {"target_batch": 8, "micro_batch": 4, "device": "cpu", "seed": 1, "val_data": (X, Y)}
    result = autoaccum.fit(model, (X, Y), step=step, **common)
    alone = autoaccum.fit(twin, (X, Y), step=lambda model, batch: LOSS(model(batch[0]), batch[1]), **common)
    assert [record.loss for record in result.history] == [record.loss for record in alone.history]
    assert result.evaluations == alone.evaluations


def test_a_loss_term_whose_mean_was_forgotten_is_not_left_out():
    def step(model, batch):
        logits = model(batch[0])
        return {"loss": LOSS(logits, batch[1]), "aux_loss": logits.square()}

    with pytest.raises(LossError, match="'aux_loss'"):
        autoaccum.fit(nn.Linear(6, 4), (X, Y), step=step, target_batch=8, device="cpu", cache=False)

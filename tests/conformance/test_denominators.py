"""What a mean is divided by: the rows of the table where micro-batches weigh unequally, or a trainer divides twice."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from tests.conformance.heads import SINGLE, head, labelled
from tests.conformance.models import (
    CLASSES,
    IGNORED,
    WORDS,
    CausalLM,
    MaskedLM,
    Shifting,
    classifier,
    seeded,
    tagged,
    tokens,
    vectors,
)
from tests.conformance.problems import Problem


def counted(batch):
    """The labels that count."""
    return (batch["labels"] != IGNORED).sum()


def titled(name, within):
    """A head's name, and whether it computes in float32 whatever its dtype is."""
    return f"{name} (float32 inside)" if within == SINGLE else name


def causal(**more):
    return Problem(
        model=lambda: seeded(CausalLM),
        denominator=counted,
        summed=lambda outputs, labels: F.cross_entropy(outputs, labels, reduction="sum"),
        **{"samples": tokens(16), "loss": nn.CrossEntropyLoss(), **more},
    )


@pytest.mark.case(1, "equal micro-batches, mean loss")
@pytest.mark.parametrize("k", [2, 4, 8])
def test_equal_micro_batches_give_the_whole_batchs_gradient(trainer, figures, k):
    """At stake: the least that accumulation promises. Divided by k once, not never and not twice."""
    problem = Problem(model=classifier, samples=vectors(4 * k), k=k, loss=nn.CrossEntropyLoss())
    figures.gradients(f"classifier, k = {k}", problem)


@pytest.mark.case(1, "equal micro-batches, mean loss")
@pytest.mark.parametrize(
    ("name", "kind", "within"),
    [
        ("BertForSequenceClassification", "class", 1e-10),
        ("RobertaForSequenceClassification", "class", 1e-10),
        ("DistilBertForSequenceClassification", "class", 1e-10),
        ("LlamaForSequenceClassification", "class", SINGLE),
        ("T5ForConditionalGeneration", "even", SINGLE),
    ],
)
def test_a_head_that_takes_keywords_is_still_divided_by_k(trainer, figures, name, kind, within):
    """At stake: a head whose forward takes **kwargs, but whose loss ignores the count it is offered through them. A
    trainer that trusts the signature divides by nothing, and the gradient is k times too large."""
    pytest.importorskip("transformers")
    problem = Problem(model=lambda: head(name), samples=labelled(16, kind), k=4)
    figures.gradients(f"{titled(name, within)}, k = 4", problem, within=within)


@pytest.mark.case(2, "mean over tokens, unequally many")
@pytest.mark.parametrize("model", ["causal", "masked"])
def test_tokens_weigh_alike_wherever_they_stand(trainer, figures, model):
    """At stake: a mean of means gives a token in a short sequence more weight than one in a long one."""
    if model == "causal":
        problem = causal()
    else:
        problem = Problem(model=lambda: seeded(MaskedLM), samples=tokens(16), denominator=counted)
    figures.gradients(f"{model} language model", problem)


@pytest.mark.case(2, "mean over tokens, unequally many")
@pytest.mark.parametrize(
    ("name", "within"),
    [("LlamaForCausalLM", SINGLE), ("T5ForConditionalGeneration", SINGLE), ("BertForMaskedLM", 1e-10)],
)
def test_heads_that_count_tokens_themselves(trainer, figures, name, within):
    """At stake: the same, where the model owns its loss and some heads accept a count from outside and some do not."""
    pytest.importorskip("transformers")
    first = 1 if name.startswith("Llama") else 0
    problem = Problem(
        model=lambda: head(name),
        samples=labelled(16, "ragged"),
        denominator=lambda batch: counted({"labels": batch["labels"][:, first:]}),
    )
    figures.gradients(titled(name, within), problem, within=within)


@pytest.mark.case(3, "a head that shifts its labels")
def test_a_head_that_shifts_counts_the_shifted_labels(trainer, figures):
    """At stake: place t predicts label t + 1, so the first label of each sequence never counts. Counting it makes the
    gradient (T − 1) / T of what it should be, and unequal lengths make it wrong in direction too."""
    shifted = lambda batch: counted({"labels": batch["labels"][:, 1:]})  # noqa: E731
    problem = Problem(model=lambda: seeded(Shifting), samples=tokens(16), denominator=shifted)
    figures.gradients("own head", problem)


@pytest.mark.case(3, "a head that shifts its labels")
@pytest.mark.parametrize("kind", ["even", "ragged"])
def test_gpt2_counts_the_shifted_labels(trainer, figures, kind):
    """At stake: the same with the head that most people mean."""
    pytest.importorskip("transformers")
    shifted = lambda batch: counted({"labels": batch["labels"][:, 1:]})  # noqa: E731
    problem = Problem(model=lambda: head("GPT2LMHeadModel"), samples=labelled(16, kind), denominator=shifted)
    figures.gradients(f"{titled('GPT2LMHeadModel', SINGLE)}, {kind} labels", problem, within=SINGLE)


WEIGHTS = torch.tensor([0.05, 1.0, 4.0, 20.0, 0.5], dtype=torch.float64)


@pytest.mark.case(7, "cross-entropy with class weights")
@pytest.mark.parametrize("tail", [False, True], ids=["full windows", "short tail"])
def test_class_weights_enter_the_denominator(trainer, figures, tail):
    """At stake: the mean divides by the sum of the targets' weights, so a micro-batch of rare classes weighs more."""
    problem = Problem(
        model=classifier,
        samples=vectors(13 if tail else 16),
        loss=nn.CrossEntropyLoss(weight=WEIGHTS),
        denominator=lambda batch: WEIGHTS[batch["labels"]].sum(),
    )
    figures.gradients("short tail" if tail else "full windows", problem)


def floats(count, make, seed=7):
    """Samples with other labels: `make(generator)`."""
    chance = torch.Generator().manual_seed(seed)
    return [{**sample, "labels": make(chance)} for sample in vectors(count)]


def random(*shape):
    return lambda chance: torch.randn(*shape, dtype=torch.float64, generator=chance)


TOKEN_WEIGHTS = torch.linspace(0.1, 3.0, WORDS, dtype=torch.float64)


class Logarithms(nn.Module):
    """Log probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = classifier()

    def forward(self, x):
        return self.inner(x).log_softmax(-1)


class Speech(nn.Module):
    """Log probabilities of shape (time, samples, symbols), as CTC takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, CLASSES + 1)

    def forward(self, x):
        return self.inner(x).log_softmax(-1).transpose(0, 1)


def spoken(count, seed=9):
    """Samples of 9 moments; transcripts of 2 to 4 symbols; labels are (targets, input length, target length)."""
    chance = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(9, 6, dtype=torch.float64, generator=chance),
            "labels": (torch.randint(1, CLASSES, (4,), generator=chance), torch.tensor(9), torch.tensor(2 + i % 3)),
        }
        for i in range(count)
    ]


def simplex(chance):
    return torch.rand(CLASSES, dtype=torch.float64, generator=chance).softmax(-1)


RAGGED = 15
TORCH_LOSSES = {
    "label smoothing, weights, ignore_index": lambda: Problem(
        model=lambda: seeded(CausalLM),
        samples=tokens(RAGGED),
        loss=nn.CrossEntropyLoss(weight=TOKEN_WEIGHTS, label_smoothing=0.1),
        denominator=lambda batch: TOKEN_WEIGHTS[batch["labels"][batch["labels"] != IGNORED]].sum(),
    ),
    "BCE with logits, pos_weight": lambda: Problem(
        model=classifier,
        samples=floats(RAGGED, lambda chance: torch.rand(CLASSES, dtype=torch.float64, generator=chance).round()),
        loss=nn.BCEWithLogitsLoss(pos_weight=WEIGHTS),
    ),
    "NLL": lambda: Problem(
        model=lambda: seeded(Logarithms),
        samples=vectors(RAGGED),
        loss=nn.NLLLoss(weight=WEIGHTS),
        denominator=lambda batch: WEIGHTS[batch["labels"]].sum(),
    ),
    "MSE": lambda: Problem(model=classifier, samples=floats(RAGGED, random(CLASSES)), loss=nn.MSELoss()),
    "L1": lambda: Problem(model=classifier, samples=floats(RAGGED, random(CLASSES)), loss=nn.L1Loss()),
    "Huber": lambda: Problem(model=classifier, samples=floats(RAGGED, random(CLASSES)), loss=nn.HuberLoss(delta=0.3)),
    "KL divergence, batchmean": lambda: Problem(
        model=lambda: seeded(Logarithms),
        samples=floats(RAGGED, simplex),
        loss=nn.KLDivLoss(reduction="batchmean"),
    ),
    "CTC": lambda: Problem(model=lambda: seeded(Speech), samples=spoken(RAGGED), loss=nn.CTCLoss()),
}


@pytest.mark.case(8, "torch's other losses, last micro-batch smaller")
@pytest.mark.parametrize("name", TORCH_LOSSES)
def test_each_of_torchs_losses_has_its_own_denominator(trainer, figures, name):
    """At stake: elements, samples, weights, transcripts: each loss divides by something else, and its documentation
    is where one has to look it up."""
    figures.gradients(name, TORCH_LOSSES[name]())


def masked_by_hand(outputs, labels):
    """The sum of what counts over how much counts, as many write it: NaN where nothing does."""
    mask = labels != IGNORED
    losses = F.cross_entropy(outputs, labels.clamp(min=0), reduction="none")
    return (losses * mask).sum() / mask.sum()


@pytest.mark.case(9, "a micro-batch in which every target is ignored")
@pytest.mark.parametrize("name", ["cross-entropy", "masked by hand"])
def test_a_micro_batch_that_does_not_count_leaves_the_window_whole(trainer, figures, name):
    """At stake: its mean is 0 / 0. With a mask of one's own one such micro-batch makes the window's gradient NaN;
    torch's cross-entropy keeps the gradient at 0, and the micro-batch takes a share of the mean all the same."""
    samples = tokens(16)
    for index in (2, 3, 12, 13):
        samples[index] = {**samples[index], "labels": torch.full_like(samples[index]["labels"], IGNORED)}
    by_hand = {"loss": masked_by_hand, "reduction": counted} if name == "masked by hand" else {}
    figures.gradients(name, causal(samples=samples, **by_hand))


class TwoTerms(CausalLM):
    """Token cross-entropy, and an auxiliary mean over the samples that are flagged; returns their weighted sum."""

    def sums(self, x, labels, flag):
        logits = super().forward(x)
        return F.cross_entropy(logits, labels, reduction="sum"), (logits.square().mean((1, 2)) * flag).sum()

    def forward(self, x, labels, flag):
        main, auxiliary = self.sums(x, labels, flag)
        return {"loss": main / (labels != IGNORED).sum() + 0.5 * auxiliary / flag.sum().clamp(min=1)}


def two_terms(model, batch):
    main, auxiliary = model.sums(**batch)
    flagged = batch["flag"].sum()
    return {"main": autoaccum.Mean(main, counted(batch)), "auxiliary": autoaccum.Mean(0.5 * auxiliary, flagged)}


@pytest.mark.case(10, "two terms with different denominators")
def test_each_term_is_divided_by_its_own_denominator(trainer, figures):
    """At stake: a main loss over tokens and an auxiliary one over some samples cannot share one divisor."""
    if trainer.name == "Accumulator":
        pytest.skip("one backward call has one denominator: several terms are a `step` of fit's")
    samples = tagged(tokens(16), flag=lambda index: torch.tensor(float(index % 5 in (0, 1, 4)), dtype=torch.float64))
    problem = Problem(
        model=lambda: seeded(TwoTerms),
        samples=samples,
        step=two_terms,
        reduction={"main": counted, "auxiliary": lambda batch: batch["flag"].sum()},
    )
    figures.gradients("tokens and flagged samples", problem)


@pytest.mark.case(11, "reduction='sum'")
def test_a_sum_is_added_up_and_never_divided(trainer, figures):
    """At stake: a trainer that divides every loss by k divides a sum too."""
    if trainer.name == "Accumulator":
        pytest.skip("the Accumulator adds up means: a sum is for `fit`, or divided by hand")
    figures.gradients(
        "classifier", Problem(model=classifier, samples=vectors(14), loss=nn.CrossEntropyLoss(reduction="sum"))
    )

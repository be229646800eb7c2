"""Models and losses for the check of accumulation: right ones, and ones with a planted fault."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from autoaccum.checking.diagnosis import Cause
from autoaccum.loss.mean import Mean


def mlp(classes=5):
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, classes))


def pairs(classes=5):
    return torch.randn(8, 6), torch.randint(0, classes, (8,))


def tokens(ignored=-100):
    """Sequences whose labels count in 3 to 10 of 11 places."""
    inputs = torch.randint(1, 30, (8, 11))
    labels = inputs.clone()
    for row in range(8):
        labels[row, 3 + row :] = ignored
    return inputs, labels


def images():
    return torch.randn(8, 3, 8, 8), torch.randint(0, 5, (8,))


class Tagger(nn.Module):
    """Logits (samples, classes, places), as torch's losses want them."""

    def __init__(self, middle=None):
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(30, 16), middle or nn.Identity(), nn.Linear(16, 30)

    def forward(self, inputs):
        hidden = self.middle(self.embedding(inputs))
        return self.head(hidden[0] if isinstance(hidden, tuple) else hidden).transpose(1, 2)


class Residual(nn.Module):
    """Two blocks with BatchNorm, each left out at random for single samples."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, images):
        hidden = self.stem(images)
        for block in self.blocks:
            hidden = hidden + block(hidden) * hidden.new_empty(len(hidden), 1, 1, 1).bernoulli_(0.6)
        return self.head(F.dropout(hidden.mean((2, 3)), 0.2, self.training))


class Autoencoder(nn.Module):
    """Returns its loss; its noise is drawn for each sample, inside a checkpoint too."""

    def __init__(self, reentrant=False):
        super().__init__()
        self.encoder, self.decoder, self.reentrant = nn.Linear(6, 8), nn.Linear(4, 6), reentrant

    def forward(self, inputs):
        mean, log_variance = self.encoder(inputs).chunk(2, -1)

        def decode(mean):
            sampled = torch.distributions.Normal(mean + torch.randn_like(mean), torch.ones_like(mean)).rsample()
            return self.decoder(F.dropout(sampled, 0.5)) + torch.rand(())

        decoded = checkpoint(decode, mean, use_reentrant=self.reentrant)
        return F.mse_loss(decoded, inputs) - (1 + log_variance - mean**2 - log_variance.exp()).mean()


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.times, self.denoise = nn.Embedding(10, 6), nn.Linear(6, 6)

    def forward(self, inputs):
        time, noise = torch.randint(0, 10, (len(inputs),)), torch.randn(inputs.shape)
        return F.mse_loss(self.denoise(inputs + noise + self.times(time)), noise)


def masked_mean(model, batch):
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    counts = (targets > 0).float()
    return Mean((losses * counts).sum(), counts.sum())


def two_terms(model, batch):
    outputs = model(batch[0])
    return {"main": masked_mean(model, batch), "size": outputs.pow(2).mean()}


def two_means(model, batch):
    outputs = model(batch[0])
    return {"main": masked_mean(model, batch), "size": Mean(outputs.pow(2).sum(), float(outputs.numel()))}


ENCODER = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.2, batch_first=True)
RIGHT = {
    "mlp with dropout": lambda: (mlp(), pairs(), {"loss": nn.CrossEntropyLoss()}),
    "class weights": lambda: (mlp(), pairs(), {"loss": nn.CrossEntropyLoss(weight=torch.rand(5) + 0.1)}),
    "sum": lambda: (mlp(), pairs(), {"loss": nn.CrossEntropyLoss(reduction="sum")}),
    "elements": lambda: (mlp(3), (torch.randn(8, 6), torch.randn(8, 3)), {"loss": nn.MSELoss()}),
    "residual net": lambda: (Residual(), images(), {"loss": F.cross_entropy}),
    "lstm": lambda: (
        Tagger(nn.LSTM(16, 16, 2, dropout=0.4, batch_first=True)),
        tokens(),
        {"loss": nn.CrossEntropyLoss()},
    ),
    "transformer": lambda: (
        Tagger(nn.TransformerEncoder(ENCODER, 2)),
        tokens(),
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    ),
    "autoencoder": lambda: (Autoencoder(), torch.randn(8, 6), {}),
    "reentrant checkpoint": lambda: (Autoencoder(reentrant=True), torch.randn(8, 6), {}),
    "diffusion": lambda: (Diffusion(), torch.randn(8, 6), {}),
    "spectral norm": lambda: (nn.utils.spectral_norm(nn.Linear(6, 5)), pairs(), {"loss": F.cross_entropy}),
    "sparse": lambda: (
        nn.Sequential(nn.EmbeddingBag(30, 6, sparse=True), mlp()),
        (tokens()[0], pairs()[1]),
        {"loss": F.cross_entropy},
    ),
    "late mean": lambda: (mlp(), pairs(), {"step": masked_mean}),
    "two terms": lambda: (
        mlp(),
        pairs(),
        {"step": two_terms, "reduction": {"main": lambda batch: (batch[1] > 0).sum(), "size": "sample_mean"}},
    ),
}


# --- planted faults: how it is made, its cause, words of the report --------------------------------------------------


def info_nce(outputs, targets):
    return F.cross_entropy(
        F.normalize(outputs, dim=-1) @ F.normalize(targets, dim=-1).T / 0.1, torch.arange(len(outputs))
    )


def hardest_triplets(outputs, targets):
    distance = torch.cdist(outputs, outputs)
    same = targets[:, None] == targets[None]
    return F.relu((distance * same).amax(1) - (distance + 1e3 * same).amin(1) + 1).mean()


class Experts(nn.Module):
    """A mixture whose loss wants the experts used evenly."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 5) for _ in range(3))

    def forward(self, inputs, targets):
        shares = self.router(inputs).softmax(-1)
        outputs = (torch.stack([expert(inputs) for expert in self.experts], 1) * shares[..., None]).sum(1)
        used = F.one_hot(shares.argmax(-1), 3).float().mean(0)
        return F.cross_entropy(outputs, targets) + (used * shares.mean(0)).sum()


class MaskedTagger(Tagger):
    def forward(self, inputs, mask):
        losses = F.cross_entropy(super().forward(inputs), inputs, reduction="none")
        return (losses * mask).sum() / mask.sum()


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, inputs):
        return self.inner(inputs.view(8, 6))


class BatchIsTime(nn.Module):
    """An RNN that was not told batch_first=True."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8), nn.Linear(8, 5)

    def forward(self, inputs):
        return self.head(self.rnn(inputs[:, None].expand(-1, 3, -1))[0][:, -1])


def mean(outputs, targets):
    return F.cross_entropy(outputs, targets)


def total(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="sum")


def places(outputs, targets):
    """A mean over all places, ignored ones included."""
    return F.cross_entropy(outputs, targets, reduction="none").mean()


def shifted(model, batch):
    return F.cross_entropy(model(batch["x"])[:, :, :-1], batch["labels"][:, 1:])


def masked_batch():
    inputs, labels = tokens()
    return {"inputs": inputs, "mask": (labels != -100).float()}


def labelled():
    inputs, labels = tokens()
    return {"x": inputs, "labels": labels}


CLASS_WEIGHTS = torch.tensor([0.1, 0.4, 1.0, 2.0, 0.7])
# Nothing is declared: what each divides by stands in its graph.
READ = {
    "a sum": lambda: (mlp(), pairs(), {"loss": total}),
    "grows with the batch": lambda: (mlp(), pairs(), {"loss": lambda o, t: mean(o, t) * len(o)}),
    "a token mean": lambda: (Tagger(), tokens(), {"loss": mean}),
    "another label is ignored": lambda: (
        Tagger(),
        tokens(0),
        {"loss": lambda o, t: F.cross_entropy(o, t, ignore_index=0)},
    ),
    "a mask": lambda: (MaskedTagger(), masked_batch(), {}),
    "class weights": lambda: (mlp(), pairs(), {"loss": lambda o, t: F.cross_entropy(o, t, CLASS_WEIGHTS)}),
    "a step's tensor": lambda: (Tagger(), tokens(), {"step": lambda m, b: mean(m(b[0]), b[1])}),
    "two terms": lambda: (Tagger(), tokens(), {"loss": lambda o, t: mean(o, t) + o.pow(2).mean()}),
    "a step's terms": lambda: (
        Tagger(),
        tokens(),
        {"step": lambda m, b: {"main": mean(m(b[0]), b[1]), "size": m(b[0]).pow(2).mean()}},
    ),
    "a step's Means": lambda: (mlp(), pairs(), {"step": two_means}),
}

FAULTS = {
    "a mean is declared a sum": (
        lambda: (mlp(), pairs(), {"loss": mean, "reduction": "sum"}),
        Cause.TOO_LARGE,
        "reduction='sample_mean'",
    ),
    "a sample mean weighted by tokens": (
        lambda: (Tagger(), tokens(), {"loss": places, "reduction": "token_mean"}),
        Cause.UNEVEN,
        "reduction='sample_mean'",
    ),
    "the first label is counted though it is shifted away": (
        lambda: (Tagger(), labelled(), {"step": shifted, "reduction": lambda batch: (batch["labels"] != -100).sum()}),
        Cause.UNEVEN,
        "(batch['labels'][:, 1:] != -100).sum()",
    ),
    "two terms are declared to be one": (
        lambda: (
            Tagger(),
            tokens(),
            {"loss": lambda o, t: mean(o, t) + o.pow(2).mean(), "reduction": "token_mean"},
        ),
        Cause.SEVERAL,
        "one divides by the samples",
    ),
    "a Mean of a mean": (
        lambda: (mlp(), pairs(), {"step": lambda m, b: Mean(mean(m(b[0]), b[1]), float(len(b[1])))}),
        Cause.COUPLED,
        "a mean is divided again",
    ),
    "a Mean over nothing": (
        lambda: (mlp(), pairs(), {"step": lambda m, b: Mean(total(m(b[0]), b[1]), 1.0)}),
        Cause.TOO_SMALL,
        "reduction='sum'",
    ),
    "a loss is divided by the batch size again": (
        lambda: (mlp(), pairs(), {"loss": lambda o, t: mean(o, t) / len(o)}),
        Cause.COUPLED,
        "a mean is divided again",
    ),
    "a loss reads the batch size": (
        lambda: (mlp(), pairs(), {"loss": lambda o, t: mean(o, t) * len(o) ** 0.5}),
        Cause.COUPLED,
        "which is no count",
    ),
    "a model knows the batch size": (lambda: (Fixed(), pairs(), {"loss": mean}), Cause.SIZE_BOUND, "invalid for input"),
    "info nce": (
        lambda: (mlp(4), (torch.randn(8, 6), torch.randn(8, 4)), {"loss": info_nce}),
        Cause.COUPLED,
        "contrastive",
    ),
    "hardest triplets": (
        lambda: (mlp(4), (torch.randn(8, 6), torch.tensor([0, 1, 0, 1, 2, 2, 0, 1])), {"loss": hardest_triplets}),
        Cause.COUPLED,
        "triplets",
    ),
    "experts in balance": (lambda: (Experts(), pairs(), {}), Cause.COUPLED, "experts"),
    "a statistic over the batch": (
        lambda: (mlp(), pairs(), {"loss": lambda o, t: mean(o, t) + o.std(0).mean()}),
        Cause.COUPLED,
        "statistics over the batch",
    ),
    "a root of a mean": (
        lambda: (mlp(1), (torch.randn(8, 6), torch.randn(8, 1)), {"loss": lambda o, t: F.mse_loss(o, t).sqrt()}),
        Cause.COUPLED,
        "MSE for RMSE",
    ),
    "samples run into each other": (
        lambda: (BatchIsTime(), pairs(), {"loss": mean}),
        Cause.COUPLED,
        "batch_first=True",
    ),
    "a part has a gradient that is not finite": (
        lambda: (mlp(), pairs(), {"loss": lambda o, t: mean(o, t) + ((o * 0).sum() + (len(o) == 8)).sqrt()}),
        Cause.NOT_FINITE,
        "the gradient is not finite at 5 + 3",
    ),
}

"""sentence-transformers: a cached loss, given a whole window of pairs, which it encodes in micro-batches, twice."""

from typing import Any

from torch import nn
from torch.utils.data import default_collate

from tests.conformance.problems import Problem, Run
from tests.conformance.trainers.base import Trainer

__all__ = ["SentenceTransformers"]


class SentenceTransformers(Trainer):
    """CachedMultipleNegativesRankingLoss, over a `models.Pairs`."""

    name = distribution = "sentence-transformers"
    package, of_pairs = "sentence_transformers", True

    def train(self, problem: Problem) -> Run:
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        model = problem.model()
        optimizer = problem.optimizer(model)
        loss = CachedMultipleNegativesRankingLoss(
            Encoder(model), scale=model.scale, mini_batch_size=problem.micro_batch
        )
        for samples in problem.windows():
            batch = default_collate(samples)
            sides = [{"input_ids": side, "attention_mask": side.new_ones(len(side), 1)} for side in batch.values()]
            loss(sides, None).backward()
            optimizer.step()
            optimizer.zero_grad()
        return Run(optimizer.gradients, model)


class Encoder(nn.Sequential):
    """What the library takes for a model: features in a dict become an embedding in it."""

    def __init__(self, model: Any) -> None:
        super().__init__(model.net)

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return {**features, "sentence_embedding": self[0](features["input_ids"])}

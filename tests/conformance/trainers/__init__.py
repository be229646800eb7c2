"""One small adapter a trainer: a Problem in, a Run out, each trainer used as its documentation says."""

from tests.conformance.trainers.accelerate import Accelerate, AccelerateRecipe
from tests.conformance.trainers.base import NotOffered, Trainer
from tests.conformance.trainers.ignite import Ignite
from tests.conformance.trainers.lightning import Lightning, LightningAttached
from tests.conformance.trainers.ours import Fit, OwnLoop
from tests.conformance.trainers.sentence_transformers import SentenceTransformers
from tests.conformance.trainers.transformers import Transformers, TransformersAttached

__all__ = ["TRAINERS", "NotOffered", "Trainer"]

TRAINERS: tuple[Trainer, ...] = (
    Fit(),
    OwnLoop(),
    Transformers(),
    Accelerate(),
    AccelerateRecipe(),
    Lightning(),
    Ignite(),
    SentenceTransformers(),
    TransformersAttached(),
    LightningAttached(),
)

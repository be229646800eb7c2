"""Samples by their indices, fetched and collated into one micro-batch: in workers or in this process.

An error of the dataset or of its collate function becomes a DataError that names the index, with the original as its
cause. From a worker it travels as a value, with the original's traceback as text.
"""

import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data._utils.collate import collate as torchs_collate

from autoaccum.data.base import Read
from autoaccum.data.draws import mix
from autoaccum.data.sample_lengths import ByLength, cut
from autoaccum.errors import DataError
from autoaccum.memory.oom import Verdict, out_of_memory
from autoaccum.random_state import seed_everything

__all__ = ["Ask", "Failure", "Fetcher", "WorkerDataset"]

_TORCHS_COLLATE = torchs_collate.__code__  # what default_collate calls
_FOR_WANT_OF_MEMORY = (
    "the host's memory ran out, in which all samples of a step wait: lower target_batch, or keep samples in a smaller "
    "format (uint8 images) until they are on the device"
)
_PAD = (
    "give a DataLoader with a collate_fn that pads them (a list is read as a dataset of samples; tensors that belong "
    "together go into a tuple or a dict)"
)
_NONE_LEFT = "a collate_fn that drops samples may be left with none: let it return None then"


class Ask(NamedTuple):
    """One micro-batch that is wanted; or a window's part, to be cut by length."""

    indices: Sequence[Any]
    position: int
    """Of the first index in the epoch's order."""
    base: int | None
    """The epoch's base, where every sample is to be seeded from it."""
    by_length: ByLength | None = None


class Failure(NamedTuple):
    """A DataError on its way out of a worker."""

    message: str
    traceback: str
    """Of its cause, as text: an error of the user's own class need not survive the way."""


class Fetcher:
    """A dataset and its collate function."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self._dataset, self._collate = dataset, collate

    def fetch(self, ask: Ask) -> Read:
        """The micro-batch, or those of a window's part that is cut by length, with their padding.

        A DataError where the dataset or the collate function failed; or a sample is too long.
        """
        samples = self._asked_for(ask)
        pieces, padding = cut(samples, [len(samples)], ask.by_length, self.collated, ask.indices)
        batches, names = [], [[ask.indices[place] for place in places] for places in pieces]
        for places, own in zip(pieces, names):
            if ask.base is not None:  # a collate function may draw too, as for masked words
                seed_everything(mix(ask.base, ask.position + places[0], 1), cpu_only=True)
            batches.append(self.collated([samples[place] for place in places], own))
        # Of a worker's each tensor would be sent, and pinned, by itself.
        plain = [index.tolist() if isinstance(index, Tensor) else index for own in names for index in own]
        return Read(len(samples), batches, padding, plain)

    def samples(self, indices: Sequence[Any], seeds: Sequence[int] | None = None) -> list[Any]:
        """The samples, each after its seed is set, where there are seeds; a DataError names the index that failed."""
        dataset, samples = self._dataset, []
        try:
            for place, index in enumerate(indices):
                if seeds is not None:
                    seed_everything(seeds[place], cpu_only=True)
                samples.append(dataset[index])  # their number tells which one failed
        except Exception as error:
            scarce = out_of_memory(error) is Verdict.SURELY
            remedy = _FOR_WANT_OF_MEMORY if scarce else "repair it, or leave its index out with a Subset"
            raise DataError(
                f"sample {indices[len(samples)]!r} of the dataset ({type(dataset).__name__}) could not be read: "
                f"{type(error).__name__}: {error}; {remedy}"
            ) from error
        return samples

    def collated(self, samples: list[Any], indices: Sequence[Any] | None = None) -> Any:
        """The samples as one batch; None where the collate function dropped them all, a DataError where it failed."""
        try:
            return self._collate(samples)
        except DataError:
            raise
        except Exception as error:
            if _was_left_empty(error):
                return None
            which = f"samples {', '.join(map(repr, indices[:8]))}" if indices else f"{len(samples)} samples"
            which += ", ..." if indices and len(indices) > 8 else ""
            dropped = "empty" in str(error) or "got 0" in str(error)
            remedy = _FOR_WANT_OF_MEMORY if out_of_memory(error) is Verdict.SURELY else _NONE_LEFT if dropped else _PAD
            raise DataError(
                f"{which} could not be made into one batch: {type(error).__name__}: {error}; {remedy}"
            ) from error

    def _asked_for(self, ask: Ask) -> list[Any]:
        indices, fetch_all = list(ask.indices), getattr(self._dataset, "__getitems__", None)
        form, base = getattr(self._dataset, "format", None), ask.base
        # Fetching may draw random numbers; of a Hugging Face dataset, only where it has a transform.
        draws = not isinstance(form, dict) or form.get("type") == "custom"
        if not callable(fetch_all) or (base is not None and draws):
            seeds = None if base is None else [mix(base, ask.position + offset) for offset in range(len(indices))]
            return self.samples(indices, seeds)
        try:
            return list(fetch_all(indices))
        except Exception as error:
            self.samples(indices)  # the one at fault fails again, and is named
            raise DataError(
                f"samples {indices[0]!r} to {indices[-1]!r} of the dataset ({type(self._dataset).__name__}) could not "
                f"be read together: {type(error).__name__}: {error}; repair its __getitems__"
            ) from error


class WorkerDataset:
    """What a DataLoader's workers are given for a dataset: it answers each Ask with a whole batch, or with a Failure.

    Its attributes are those of the user's dataset, so that a `worker_init_fn` finds and sets them where it always did.
    """

    def __init__(self, dataset: Any, fetcher: Fetcher) -> None:
        vars(self).update(_autoaccum=(dataset, fetcher))

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_autoaccum"][0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_autoaccum"][0], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return WorkerDataset, vars(self)["_autoaccum"]

    def __len__(self) -> int:
        return len(vars(self)["_autoaccum"][0])

    def __getitems__(self, ask: Ask) -> Any:
        """What was asked for, or what went wrong."""
        fetcher: Fetcher = vars(self)["_autoaccum"][1]
        try:
            return fetcher.fetch(ask)
        except DataError as error:
            return Failure(str(error), "".join(traceback.format_exception(error.__cause__ or error)))


def _was_left_empty(error: Exception) -> bool:
    """Whether torch's collate function was called with no samples, by one that drops some of those it is given."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, IndexError):
        return False
    return trace.tb_frame.f_code is _TORCHS_COLLATE and not trace.tb_frame.f_locals["batch"]

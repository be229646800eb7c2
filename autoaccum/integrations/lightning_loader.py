"""The training loader of a Lightning Trainer, made to yield windows: samples, not collated."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from autoaccum.data.mapped import rebuilt
from autoaccum.errors import SetupError
from autoaccum.integrations.attachment import Attachment
from autoaccum.integrations.heldback import Held, Shares, refuse_dealt_streams
from autoaccum.ranks import here

__all__ = ["Windows"]


class Windows:
    """Where the trainer gets its training loader from, which yields windows."""

    def __init__(self, source: Any, attachment: Attachment, place: Callable[[], int]) -> None:
        self.source, self._attachment, self._place = source, attachment, place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def dataloader(self) -> Any:
        """The user's loader with the target batch, whose samples are not collated."""
        loader = self.source.dataloader()
        if not isinstance(loader, DataLoader):
            raise SetupError(
                f"the training loader is a {type(loader).__name__}: TargetBatch makes the batches of one DataLoader"
            )
        target, held = self._attachment.target_batch, Held(loader.collate_fn)
        ranks = here().size
        refuse_dealt_streams(loader.dataset)
        if isinstance(loader.dataset, IterableDataset):
            return rebuilt(
                loader, loader.dataset, batch_size=target, drop_last=loader.drop_last, collate_fn=held,
                generator=loader.generator,
            )  # fmt: skip
        if loader.batch_size is None:
            raise SetupError(
                "the training loader's batches are given by its own batch_sampler, or are ready: give a DataLoader "
                "with batch_size=, whose batching can be redone"
            )
        sampler: Any = loader.sampler
        if ranks > 1:
            sampler = DistributedSampler(
                loader.dataset, 1, 0, shuffle=isinstance(sampler, RandomSampler),
                seed=int(os.environ.get("PL_GLOBAL_SEED", "0")),
            )  # fmt: skip
        batches: Any = BatchSampler(sampler, target, loader.drop_last)
        if ranks > 1:
            batches = Shares(batches, self._attachment)
        made = rebuilt(loader, loader.dataset, batch_sampler=batches, collate_fn=held, generator=loader.generator)
        return _Resumable(made, self._place, alone=ranks == 1)


class _Resumable:
    """A loader that goes on in mid-epoch from where a checkpoint was written, in the order that was drawn then.

    Lightning saves and loads the state of whatever has `state_dict` and `load_state_dict`. As it is no DataLoader,
    Lightning deals it to the ranks no second time.
    """

    def __init__(self, loader: DataLoader[Any], place: Callable[[], int], alone: bool) -> None:
        """Keeps references only.

        Args:
            loader: of windows.
            place: windows of the epoch that were trained already, asked when the first of the others is fetched.
            alone: one rank, whose random generators are kept; of several Lightning saves only the first one's state.
        """
        self._loader, self._place = loader, place
        self._kept: dict[str, Any] = {}
        drawn = (torch.default_generator, loader.generator, getattr(loader.sampler, "generator", None))
        self._generators = list(dict.fromkeys(each for each in drawn if each is not None)) if alone else []
        self._began: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_loader"], name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        kept, self._kept = self._kept, {}
        place = self._place() if kept else 0
        self._set(kept.get("began" if place else "now", ()))
        self._began = self._states()
        windows = iter(self._loader)
        for _ in islice(windows, place):
            pass
        if place:
            self._set(kept["now"])
        yield from windows

    def state_dict(self) -> dict[str, Any]:
        """The random generators: when the epoch began, from which its order follows, and now."""
        return {"began": self._began, "now": self._states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._kept = dict(state_dict)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _set(self, states: Sequence[Tensor]) -> None:
        for generator, state in zip(self._generators, states):
            generator.set_state(state)

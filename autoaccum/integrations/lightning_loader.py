"""The training loader of a Lightning Trainer, made to yield windows: samples, not collated."""

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, RandomSampler

from autoaccum.data.mapped import rebuilt
from autoaccum.errors import SetupError
from autoaccum.integrations.attachment import Attachment
from autoaccum.integrations.heldback import Held, Shares
from autoaccum.ranks import here

__all__ = ["Windows"]


class Windows:
    """Where the trainer gets its training loader from, which yields windows."""

    def __init__(self, source: Any, attachment: Attachment) -> None:
        self.source, self._attachment = source, attachment

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
        if isinstance(loader.dataset, IterableDataset):
            if ranks > 1:
                raise SetupError(
                    f"an IterableDataset on {ranks} ranks gives each the same samples: give a dataset with indices"
                )
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
        return made if ranks == 1 else _Dealt(made)


class _Dealt:
    """A loader that deals the ranks their parts already; as it is no DataLoader, Lightning deals it no second time."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_loader"], name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

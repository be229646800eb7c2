"""Samples whose lengths differ: how long each is, and a window of them as micro-batches that go together.

Choices made here:

- A sample is as long as the batch that the collate function makes of it alone: the one size beyond the batch dimension
  that varies. That holds for whatever the collate function does, tokenising included, and costs one more call of it
  for each sample. Where no size varies so, nothing is measured and windows are cut as they always were.
- Several sizes may vary together (ids, mask, labels), as long as all follow from one. Where they vary on their own, as
  the height and the width of images do, or a text and its translation, one number does not tell the memory: trials take
  the largest samples looked at, and all micro-batches are as small as those need.
- Measuring leaves the generators alone: a collate function may draw, to mask words for example.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

from autoaccum.data import tree
from autoaccum.data.draws import preserved
from autoaccum.errors import DataError
from autoaccum.planning.length_rule import LengthRule
from autoaccum.planning.split import even_split

__all__ = ["ByLength", "Padding", "Ruler", "cut", "find_ruler"]

Collate = Callable[[list[Any]], Any]
_FEWEST_LENGTHS = 3  # below that there is no forecast over lengths


class Ruler(NamedTuple):
    """Where in a batch its length is: a dimension of one of its tensors."""

    tensor: int
    """Its number, as `tree.tensors` counts."""
    dimension: int
    name: str
    """For a person."""

    def of(self, batch: Any) -> int:
        """The length of a batch."""
        _, tensor = next(islice(tree.tensors(batch), self.tensor, None))
        return int(tensor.shape[self.dimension])


class ByLength(NamedTuple):
    """All that cutting a window by length takes; it travels to workers."""

    rule: LengthRule
    ruler: Ruler

    def limit(self, batch: Any) -> int:
        """The most samples of a ready batch that fit at once; a DataError where it is too long for even the fewest."""
        length = self.ruler.of(batch)
        if length > self.rule.longest:
            raise self.too_long("a ready batch", length)
        return self.rule.limit(length)

    def too_long(self, what: str, length: int) -> DataError:
        """What to tell a person whose sample cannot be run."""
        alone = "even alone" if self.rule.minimum == 1 else f"in a micro-batch of {self.rule.minimum}"
        return DataError(
            f"{what} has a length of {length} ({self.ruler.name}), and is forecast not to fit {alone}: the longest "
            f"that does has {self.rule.longest}. Shorten it or leave it out, or give more memory="
        )


class Padding(NamedTuple):
    """What a window on this rank was padded to, in tokens: units of the length that varies."""

    tokens: int
    """The samples' own."""
    padded: int
    """With their padding, as they run."""
    unsorted: int
    """With their padding, had they run in the order they came, in micro-batches that fit the longest samples seen."""


def cut(
    samples: Sequence[Any],
    sizes: Sequence[int],
    by_length: ByLength | None,
    collate: Collate,
    names: Sequence[Any] | None = None,
) -> tuple[Sequence[Sequence[int]], Padding | None]:
    """The places of a window's samples on this rank in each micro-batch: of `sizes` in their order, or by length.

    By length also what that costs in padding. `names` are the samples' indices in the dataset, where they have some. A
    DataError where a sample is too long to be run even alone, a PlanError where they cannot be cut with the plan's
    minimum.
    """
    if by_length is None:
        return tree.spans(sizes), None
    rule = by_length.rule
    with preserved():
        lengths = [by_length.ruler.of(collate([tree.copied(sample)])) for sample in samples]
    longest = max(lengths, default=0)
    if longest > rule.longest:
        place = lengths.index(longest)
        which = f"sample {names[place]!r} of the dataset" if names is not None else f"sample {place} of the window"
        raise by_length.too_long(which, longest)
    pieces = rule.split(lengths)
    padded = sum(len(piece) * lengths[piece[0]] for piece in pieces)
    unsorted = tree.spans(even_split(len(lengths), max(rule.even, 1)))
    return pieces, Padding(sum(lengths), padded, sum(len(s) * max(lengths[s.start : s.stop]) for s in unsorted))


def find_ruler(samples: Sequence[Any], collate: Collate) -> tuple[Ruler | None, list[int], str | None]:
    """How samples are measured, and how long each is, where a batch's size follows from them; else perhaps why not."""
    nothing: tuple[None, list[int], None] = (None, [], None)
    try:
        batches = [collate([tree.copied(sample)]) for sample in samples]
    except DataError:
        return nothing  # reading on will say what is wrong
    alone = [[(path, tuple(tensor.shape)) for path, tensor in tree.tensors(batch)] for batch in batches]
    if len({tuple((path, len(shape)) for path, shape in each) for each in alone}) != 1:
        return nothing
    # By (tensor, dimension): its size in each sample, where that varies.
    columns = {
        (number, dimension): [each[number][1][dimension] for each in alone]
        for number, (_, shape) in enumerate(alone[0])
        for dimension in range(len(shape))
    }
    varying = {at: sizes for at, sizes in columns.items() if len(set(sizes)) > 1}
    if not varying:
        return nothing
    rulers = {at: Ruler(*at, f"dimension {at[1]} of {alone[0][at[0]][0] or 'the batch'}") for at in varying}
    longest = max(varying, key=lambda at: max(varying[at]))
    ruler, lengths = rulers[longest], varying[longest]
    for at, sizes in varying.items():
        if not _follows(sizes, lengths):
            second = rulers[at].name
            return None, [], f"{ruler.name} and {second} vary on their own, so that no one length tells the memory"
    if len(set(lengths)) < _FEWEST_LENGTHS or not ruler.dimension or not _pads(samples, lengths, collate, ruler):
        return nothing
    return ruler, lengths, None


def _follows(sizes: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether the sizes are a rising line over the lengths."""
    low, high = lengths.index(min(lengths)), lengths.index(max(lengths))
    rise, run = sizes[high] - sizes[low], lengths[high] - lengths[low]
    return rise > 0 and all(
        (size - sizes[low]) * run == rise * (length - lengths[low]) for size, length in zip(sizes, lengths)
    )


def _pads(samples: Sequence[Any], lengths: Sequence[int], collate: Collate, ruler: Ruler) -> bool:
    """Whether a short and a long sample together become as long as the long one."""
    short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
    try:
        batch = collate([tree.copied(samples[place]) for place in (short, long)])
        return tree.batch_size(batch) == 2 and ruler.of(batch) == lengths[long]
    except DataError:
        return False

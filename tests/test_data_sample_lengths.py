"""How long samples are, and windows cut by that: from loaders whose collate functions pad, in workers, in streams."""

import random

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset

from autoaccum.data.sample_lengths import Ruler, find_ruler
from autoaccum.data.source import open_source
from autoaccum.data.windows import windows
from autoaccum.errors import DataError
from autoaccum.planning.plan import plan
from tests.texts import loader, pad, sentences

ROOM = ((20, 32), (60, 8), (120, 4), (400, 1))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(sentences())


def planned(samples=None, room=ROOM, **keywords):
    return plan(4, 32, by_length=room, samples=samples, **keywords)


def read(data, made=None, *, epoch=0, start=0, **keywords):
    made = made or planned()
    source = open_source(data, **{"seed": 3, **keywords})
    return list(windows(source, lambda: made, epoch, start=start))


def rows(batch):
    """The samples of a batch without their padding."""
    return [tuple(row[row > 0].tolist()) for row in batch["input_ids"]]


def of(*found):
    """All samples of the windows, sorted."""
    return sorted(row for window in found for batch in window.batches for row in rows(batch))


def same(a, b):
    return len(a) == len(b) and all(
        x.sizes == y.sizes and all(map(torch.equal, (one["input_ids"] for one in x.batches),
                                       (one["input_ids"] for one in y.batches)))
        for x, y in zip(a, b)
    )  # fmt: skip


# --- measuring -------------------------------------------------------------------------------------------------------


def test_the_length_is_the_size_that_follows_from_the_samples():
    source = open_source(loader())
    lengths = source.lengths()
    assert list(lengths) == sorted(set(lengths))
    assert set(lengths) <= {len(sample) for sample in sentences()}
    made = planned()
    assert source.by_length(made).ruler == Ruler(0, 1, "dimension 1 of ['input_ids']")
    assert source.trial(3, lengths[1])["labels"].shape == (3, lengths[1])


def test_samples_that_are_alike_have_no_length():
    for data in (DataLoader([torch.zeros(7) for _ in range(40)]), torch.zeros(40, 7), [torch.zeros(7)] * 40):
        source = open_source(data)
        assert source.lengths() == ()
        assert source.by_length(planned()) is None


def test_a_collate_function_that_pads_everything_alike_makes_samples_alike():
    def fixed(samples):
        ids = torch.zeros(len(samples), 200, dtype=torch.long)
        for row, sample in zip(ids, samples, strict=True):
            row[: len(sample)] = sample
        return ids

    assert open_source(DataLoader(sentences(), collate_fn=fixed)).lengths() == ()


def test_a_collate_function_that_does_not_pad_gives_no_length():
    source = open_source(DataLoader(sentences(), collate_fn=lambda samples: {"ids": samples}))
    assert source.lengths() == ()
    assert open_source(sentences()).lengths() == ()  # torch's own stacks, which fails later with its own words


def test_two_sizes_that_vary_on_their_own_are_told_and_not_measured():
    chance = random.Random(0)
    images = [torch.zeros(3, chance.randint(8, 30), chance.randint(8, 30)) for _ in range(40)]

    def pad_images(samples):
        height, width = (max(image.shape[side] for image in samples) for side in (1, 2))
        return torch.stack([torch.nn.functional.pad(x, (0, width - x.size(2), 0, height - x.size(1))) for x in samples])

    source = open_source(DataLoader(images, collate_fn=pad_images))
    assert source.lengths() == ()
    assert "dimension 3 of the batch and dimension 2 of the batch vary on their own" in source.mixed or (
        "dimension 2 of the batch and dimension 3 of the batch vary on their own" in source.mixed
    )
    assert source.trial(2).shape[0] == 2


def test_square_images_have_their_side_as_length():
    images = [torch.zeros(1, side, side) for side in (8, 12, 20, 9, 16, 30) * 4]

    def pad_squares(samples):
        side = max(image.size(1) for image in samples)
        return torch.stack([torch.nn.functional.pad(x, (0, side - x.size(2), 0, side - x.size(1))) for x in samples])

    assert open_source(DataLoader(images, collate_fn=pad_squares)).lengths() == (8, 9, 12, 16, 20, 30)


def test_sizes_that_follow_the_length_along_a_line_are_one_length():
    ruler, lengths, why_not = find_ruler(
        [torch.ones(n) for n in (3, 5, 9)],
        lambda samples: (pad_sequence([s[:-1] for s in samples], batch_first=True),
                         pad_sequence([s[1:].repeat(2) for s in samples], batch_first=True)),
    )  # fmt: skip
    assert (ruler, lengths) == (Ruler(1, 1, "dimension 1 of [1]"), [4, 8, 16])
    assert why_not is None


def test_measuring_leaves_generators_and_samples_alone():
    seen = []

    def masking(samples):
        batch = pad(samples)
        seen.append(random.random())
        batch["labels"][torch.rand(batch["labels"].shape) < 0.1] = -100
        for sample in samples:
            sample.pop("extra") if isinstance(sample, dict) else None
        return batch

    state, python = torch.get_rng_state(), random.getstate()
    source = open_source(DataLoader(sentences(), collate_fn=masking), seed=1)
    assert source.lengths()
    source.trial(2, source.lengths()[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert seen


def test_a_worst_case_is_what_is_probed():
    assert open_source(loader(), worst_case=pad(sentences()[:2])).lengths() == ()


# --- windows ---------------------------------------------------------------------------------------------------------


def test_each_sample_of_an_epoch_runs_once_where_it_fits():
    found = read(loader())
    assert [window.total for window in found] == [32, 32, 32]
    assert of(*found) == sorted(tuple(sample.tolist()) for sample in sentences())
    for window in found:
        assert sum(window.sizes) == window.samples == 32
        for size, batch in zip(window.sizes, window.batches, strict=True):
            assert batch["input_ids"].size(0) == size
            assert size <= planned().length_rule.limit(batch["input_ids"].size(1))


def test_a_window_has_the_samples_it_would_have_had_without_a_look_at_lengths():
    plain = plan(4, 32)
    for window, other in zip(read(loader()), read(loader(), plain), strict=True):
        assert of(window) == of(other)
        assert other.padding is None


def test_padding_is_counted():
    for window in read(loader()):
        lengths = [len(row) for batch in window.batches for row in rows(batch)]
        assert window.padding.tokens == sum(lengths)
        assert window.padding.padded == sum(batch["input_ids"].numel() for batch in window.batches)
        assert window.padding.tokens <= window.padding.padded < window.padding.unsorted


def test_workers_cut_as_this_process_does():
    here, there, given = read(loader()), read(loader(num_workers=2)), sentences()
    assert same(here, there)
    for window in [*here, *there]:  # sorted, and still named by their own indices
        own = [row for batch in window.batches for row in rows(batch)]
        assert own == [tuple(given[index].tolist()) for index in window.indices]


def test_a_stream_is_cut_too():
    found = read(DataLoader(Stream(), batch_size=4, collate_fn=pad))
    assert of(*found) == sorted(tuple(sample.tolist()) for sample in sentences())
    assert all(window.padding is not None for window in found)


def test_a_one_time_stream_loses_nothing_to_a_look_at_its_lengths():
    source = open_source(DataLoader(OneTime(), batch_size=4, collate_fn=pad), seed=1)
    assert source.lengths()
    made = planned()
    assert sum(window.samples for window in windows(source, lambda: made, 0)) == 96


class OneTime(IterableDataset):
    def __init__(self):
        self.samples = iter(sentences())

    def __iter__(self):
        return self.samples


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plan_that_changes_cuts_the_windows_that_follow(workers):
    plans = [planned(), planned(room=((20, 16), (60, 4), (120, 2), (400, 1)))]
    source, found = open_source(loader(num_workers=workers), seed=3), []
    for window in windows(source, lambda: plans[bool(found)], 0):
        found.append(window)
    assert same(found[:1], read(loader())[:1])
    assert same(found[1:], read(loader(), plans[1])[1:])


class Buckets:
    """A batch sampler that puts samples of like length together."""

    def __iter__(self):
        order = sorted(range(96), key=lambda at: len(sentences()[at]))
        return iter([order[at : at + 16] for at in range(0, 96, 16)])

    def __len__(self):
        return 6


def test_ready_batches_stay_as_they_are_and_are_cut_where_they_do_not_fit_at_their_length():
    data = DataLoader(sentences(), batch_sampler=Buckets(), collate_fn=pad)
    found = read(data)
    assert of(*found) == sorted(tuple(sample.tolist()) for sample in sentences())
    sizes = [size for window in found for size in window.sizes]
    assert sizes[0] == 16  # all of the shortest, up to 20, at once
    assert sizes[-1] == 1  # the longest, beyond 120, alone
    with pytest.raises(DataError, match=r"a ready batch has a length of \d+ .*forecast not to fit even alone"):
        read(data, planned(room=((20, 32),)))


def test_reading_from_the_middle_gives_the_same_windows():
    assert same(read(loader(), start=1), read(loader())[1:])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_too_long_to_run_alone_is_named(workers):
    samples = [*sentences(), torch.ones(500, dtype=torch.long)]
    with pytest.raises(
        DataError, match=r"sample 96 of the dataset has a length of 500 .*the longest that does has 400"
    ):
        read(loader(samples, num_workers=workers, shuffle=False))


def test_a_sample_of_a_stream_that_is_too_long_is_named_by_its_place():
    with pytest.raises(DataError, match=r"sample \d+ of the window has a length of \d+ .*the longest that does has 20"):
        read(DataLoader(Stream(), batch_size=4, collate_fn=pad), planned(room=((20, 32),)))

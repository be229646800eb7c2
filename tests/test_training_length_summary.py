"""Training on text of mixed length: the same gradients as ever, whatever length, restart or lack of memory comes."""

import dataclasses
import json
import random
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

import autoaccum
from autoaccum.data.source import open_source
from autoaccum.errors import DataError, NothingFitsError
from autoaccum.planning.length_rule import scaled
from autoaccum.planning.plan import Plan, plan
from autoaccum.training.events import TrainingWarning
from autoaccum.training.fit_result import LengthSummary
from autoaccum.training.smaller import cut_in_half
from tests.ranks_started import started
from tests.texts import Reader, loader, pad, sentences

ROOM = ((20, 32), (60, 8), (120, 4), (400, 1))
EXACT = 1e-10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOACCUM_CACHE", str(tmp_path / "cache"))


def by_length(**keywords):
    return plan(4, 32, by_length=ROOM, samples=96, **keywords)


def prepared(model=None, data=None, **keywords):
    model = model or Reader()
    torch.manual_seed(random.SystemRandom().getrandbits(31))
    given = {
        "plan": by_length(),
        "seed": 3,
        "check": False,
        "device": "cpu",
        "epochs": 2,
        "lr_rule": "none",
        **keywords,
    }
    if "optimizer" not in given:
        given["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return autoaccum.prepare(model, data if data is not None else loader(), **given)


def off(model, reference):
    """‖a − b‖ / ‖b‖ of what both have moved to."""
    a, b = (torch.cat([p.detach().flatten() for p in each.parameters()]) for each in (model, reference))
    return float((a - b).norm() / b.norm())


def at_once(**keywords):
    """The same training with each window as a whole, padded to its longest."""
    model = Reader()
    prepared(model, plan=None, target_batch=32, micro_batch=32, **keywords).run()
    return model


# --- gradients -------------------------------------------------------------------------------------------------------


def test_the_gradient_of_a_window_is_that_of_the_whole_window_at_once():
    moved = {}
    for name, how in {"by length": {}, "at once": {"plan": None, "target_batch": 32, "micro_batch": 32}}.items():
        model = Reader()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        prepared(model, optimizer=optimizer, max_steps=1, **how).run()
        moved[name] = before - torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((moved["by length"] - moved["at once"]).norm() / moved["at once"].norm()) <= EXACT


def test_fit_sees_that_lengths_vary_and_trains_to_where_whole_windows_would_have():
    model = Reader()
    result = autoaccum.fit(
        model, loader(), target_batch=32, memory="5MiB", optimizer=torch.optim.SGD(model.parameters(), lr=0.1,
        momentum=0.9), lr_rule="none", seed=3, epochs=2, device="cpu",
    )  # fmt: skip
    assert off(model, at_once()) <= EXACT
    assert [record.samples for record in result.history] == [32] * 6
    assert len({record.micro_batches for record in result.history}) > 1
    assert result.plan.by_length
    assert max(batch for batch, _ in model.shapes) > result.plan.micro_batch
    assert json.loads(json.dumps(result.to_dict()))["lengths"]["tokens"] == result.lengths.tokens
    assert all(record.noise_scale is None for record in result.history)


def test_what_is_summed_up_is_what_the_windows_said():
    loop = prepared()
    result = loop.run()
    found = result.lengths
    assert found.tokens == 2 * sum(len(sample) for sample in sentences())
    assert found.tokens < found.padded < found.unsorted
    assert sum(found.micro_batches.values()) == len(result.history) == 6
    assert 0 < found.padding < found.padding_unsorted < 1
    assert found.tokens_per_second > 0
    assert LengthSummary.of(record for record in result.history if record.tokens is None) is None


def test_a_training_without_lengths_says_nothing_of_them():
    result = prepared(plan=None, target_batch=32, micro_batch=8).run()
    assert result.lengths is None
    assert result.history[0].tokens is None


# --- lengths nobody has seen -----------------------------------------------------------------------------------------


def test_a_length_never_seen_is_trained_on_where_it_is_forecast_to_fit_and_refused_where_not():
    few = [sample[:60] for sample in sentences()]
    probe = autoaccum.probe(Reader(), loader(few), target_batch=32, memory="5MiB", device="cpu")
    longest = probe.by_length[-1][0]
    assert longest > 60
    assert probe.forecast(1, longest) <= 5 * 2**20 < probe.forecast(1, longest + 1)

    model = Reader()
    fits = [*few, torch.full((longest,), 65)]
    prepared(model, loader(fits), plan=probe.plan, epochs=1).run()
    assert (1, longest) in model.shapes
    assert all(probe.forecast(*shape) <= 5 * 2**20 for shape in set(model.shapes))

    model = Reader()
    too_long = [*few, torch.full((longest + 1,), 65)]
    with pytest.raises(DataError, match=rf"sample 96 of the dataset has a length of {longest + 1} .* has {longest}\."):
        prepared(model, loader(too_long), plan=probe.plan, epochs=1).run()
    assert max(length for _, length in model.shapes) <= 60


# --- lack of memory --------------------------------------------------------------------------------------------------


def test_after_running_out_of_memory_each_micro_batch_runs_in_two_and_the_update_is_the_same():
    model = Reader()
    model.tight = lambda batch, length: batch * length > 300 and len(model.shapes) < 30
    loop = prepared(model)
    with pytest.warns(TrainingWarning, match="each micro-batch in two"):
        loop.run()
    assert loop.plan.by_length == scaled(ROOM, 1, 2, 1)
    assert loop.plan.limits == (2,)
    assert off(model, at_once()) <= EXACT


def test_every_sample_of_a_window_is_still_there_in_halves():
    batch = torch.arange(15).view(5, 3)
    pieces = cut_in_half([batch, batch[:1]], 1)
    assert [len(piece) for piece in pieces] == [3, 2, 1]
    assert torch.equal(torch.cat(pieces[:2]), batch)
    with pytest.raises(NothingFitsError, match="cannot be cut smaller"):
        cut_in_half([batch[:1]], 1)


def test_where_single_samples_do_not_fit_the_training_ends():
    model = Reader()
    model.tight = lambda batch, length: True
    with pytest.warns(TrainingWarning), pytest.raises(NothingFitsError, match="micro-batch of 1"):
        prepared(model).run()


def test_windows_grow_again_as_they_were():
    model = Reader()

    def listen(event):
        if event.name == "step" and event.record.step == 1:
            first = len(model.shapes)
            model.tight = lambda batch, length: len(model.shapes) < first + 3

    loop = prepared(model, regrow_after=2, callbacks=[listen])
    with pytest.warns(TrainingWarning):
        loop.run()
    assert loop.plan == by_length()


# --- restarts --------------------------------------------------------------------------------------------------------


class Interruption(Exception):
    pass


@pytest.mark.parametrize(
    ("tight", "workers"),
    [(False, 1), *[pytest.param(*case, marks=pytest.mark.slow) for case in ((False, 0), (True, 0), (True, 1))]],
)
def test_a_training_that_was_interrupted_ends_bit_for_bit_where_the_other_does(tmp_path, tight, workers):
    """Dropout, shuffling, and the smaller windows after memory ran out in the second one."""

    def train(folder, until=None):
        def listen(event):
            if event.name == "step" and event.record.step == until:
                raise Interruption

        model = Reader(dropout=0.2)
        if tight and not (folder / "plan.json").exists():
            model.tight = lambda batch, length: 12 < len(model.shapes) < 15
        loop = prepared(model, loader(num_workers=workers), checkpoint=folder, checkpoint_every=1, callbacks=[listen])
        try:
            loop.run()
        except Interruption:
            return None
        records = [{**record.to_dict(), "seconds": 0, "samples_per_second": 0} for record in loop.history]
        return records, [p.detach().clone() for p in model.parameters()], loop.plan

    with pytest.warns(TrainingWarning) if tight else nullcontext():
        whole = train(tmp_path / "whole")
        train(tmp_path / "cut", until=4)
    again = train(tmp_path / "cut")
    assert again[0] == whole[0]
    assert all(map(torch.equal, again[1], whole[1]))
    assert again[2] == whole[2]
    assert (whole[2].by_length == ROOM) is not tight


def test_a_plan_from_a_file_cuts_by_length_without_a_probe(tmp_path):
    by_length().save(tmp_path / "plan.json")
    loop = prepared(plan=tmp_path / "plan.json", epochs=1)
    result = loop.run()
    assert loop.probe is None
    assert result.lengths.padded < result.lengths.unsorted


def test_a_plan_over_lengths_for_data_that_is_alike_cuts_evenly():
    alike = [torch.full((40,), 65)] * 96
    result = prepared(Reader(), loader(alike), epochs=1).run()
    assert [record.micro_batches for record in result.history] == [8, 8, 8]
    assert result.lengths is None


# --- ranks -----------------------------------------------------------------------------------------------------------


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = Reader()
    loop = prepared(model, plan=by_length(world_size=2).on_rank(rank))
    result = loop.run()
    shares = [(record.tokens, record.micro_batches, record.samples) for record in result.history]
    torch.save((list(model.parameters()), shares), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_each_cut_their_own_share_by_length(tmp_path):
    started(work, 2, tmp_path)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    reference = at_once()
    for parameters, _ in found:
        for own, expected in zip(parameters, reference.parameters(), strict=True):
            assert torch.allclose(own, expected, rtol=1e-10, atol=1e-12)
    (_, first), (_, second) = found
    assert all(samples == 32 for _, _, samples in first)
    assert sum(tokens for tokens, _, _ in first + second) == 2 * sum(len(sample) for sample in sentences())
    assert [k for _, k, _ in first] != [k for _, k, _ in second]


def test_a_plan_over_lengths_is_the_same_on_every_rank():
    first = by_length(world_size=2)
    assert dataclasses.replace(Plan.from_dict(first.to_dict()).on_rank(1), rank=0).by_length == first.by_length


# --- padding that counts ---------------------------------------------------------------------------------------------


class Bag(torch.nn.Module):
    """The mean over all places, those of padding included unless they are masked."""

    def __init__(self, masked):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head, self.masked = torch.nn.Embedding(256, 8), torch.nn.Linear(8, 2), masked

    def forward(self, input_ids, labels):
        inside = (input_ids > 0)[..., None].float() if self.masked else torch.ones(*input_ids.shape, 1)
        mean = (self.words(input_ids) * inside).sum(1) / inside.sum(1)
        return torch.nn.functional.cross_entropy(self.head(mean), labels[:, 0] % 2)


@pytest.mark.parametrize("masked", [True, False])
def test_a_loss_that_depends_on_padding_is_told(masked, recwarn):
    model = Bag(masked)
    prepared(model, check="warn", reduction="sample_mean", epochs=1)
    told = [str(warning.message) for warning in recwarn if issubclass(warning.category, TrainingWarning)]
    assert [text.startswith("padding changes a sample's loss") for text in told] == ([] if masked else [True])
    assert model.training


def test_a_collate_function_that_draws_is_not_judged_by_its_draws():
    def masking(samples):
        batch = pad(samples)
        batch["labels"] = batch["labels"].masked_fill(torch.rand(batch["labels"].shape) < 0.5, -100)
        return batch

    source = open_source(torch.utils.data.DataLoader(sentences(), batch_size=4, collate_fn=masking))
    assert source.short_and_long() is None
    assert open_source(loader()).short_and_long() is not None
    assert open_source([torch.zeros(3)] * 8).short_and_long() is None

"""prefer="fastest" over memory savers: which pairs are worth timing, and what is taken and said of it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoaccum
from autoaccum.errors import NothingFitsError
from autoaccum.memory.device import CpuDevice
from autoaccum.probing import fastest
from autoaccum.probing.fastest import Pair, chosen, pairs, to_gain
from autoaccum.probing.report import ProbeReport
from autoaccum.probing.trial import Bench


def named(made):
    return [(pair.saver, pair.size, pair.count) for pair in made]


def test_where_a_window_fits_at_once_savers_can_only_cost_time():
    assert named(pairs(64, [(None, 100), ("checkpointing", 300)])) == [
        (None, 64, 1), (None, 32, 2), (None, 16, 4), (None, 8, 8),
    ]  # fmt: skip


def test_a_saver_is_timed_where_it_makes_fewer_micro_batches_than_all_that_cost_less():
    limits = [(None, 20), ("checkpointing/4", 21), ("checkpointing/2", 32), ("checkpointing", 40), ("both", 70)]
    first = [pair for pair in named(pairs(64, limits)) if pair[1] > 10]
    assert first == [(None, 16, 4), ("checkpointing/2", 32, 2), ("both", 64, 1)]


def test_a_chunked_loss_is_timed_in_any_case_and_sizes_are_whole():
    made = named(pairs(64, [(None, 64), ("chunked_loss", 64)], floor=2))
    assert made[:2] == [(None, 64, 1), ("chunked_loss", 64, 1)]
    assert all(size * count >= 64 and size >= 2 for _, size, count in made)


def test_what_cannot_be_cut_is_left_out():
    assert named(pairs(3, [(None, 3), ("checkpointing", 1)], floor=2)) == [(None, 3, 1), (None, 2, 2)]


def test_the_soonest_is_taken_and_within_noise_the_first():
    made = [Pair(None, 8, 4, [4.0]), Pair("chunked_loss", 32, 1, [3.0, 2.9, 5.0]), Pair(None, 4, 8, [2.96])]
    assert chosen(made) is made[1]  # its least is 2.9: what else runs on the machine only adds
    made[2].seconds.append(2.88)  # no better by more than noise
    assert chosen(made) is made[1]
    assert chosen([Pair(None, 8, 1, [1.01]), Pair("chunked_loss", 8, 1, [1.0])]).saver is None
    assert chosen([Pair(None, 8, 1, [1.1]), Pair("chunked_loss", 8, 1, [1.0]), Pair("other", 8, 1)]).size == 8


def test_more_micro_batches_show_the_most_that_fewer_can_save():
    # 2 a second's work and 0.5 for each micro-batch: one alone would take 2.5 where four take 4
    made = [Pair(None, 8, 4, [4.0]), Pair(None, 4, 8, [6.5, 6.0]), Pair(None, 2, 16, [10.0])]
    assert to_gain(made) == pytest.approx(1.5 / 4.0)
    assert to_gain([Pair(None, 32, 1, [2.5]), made[0]]) == 0.0
    assert to_gain(made[:1]) is None  # of one size nobody can tell


CLASSES, WIDE, PLACES = 2100, 16, 64


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(CLASSES, WIDE), nn.Linear(WIDE, WIDE), nn.Linear(WIDE, CLASSES)

    def forward(self, tokens, labels):
        logits = self.head(torch.tanh(self.mix(self.embed(tokens))))
        return {"loss": F.cross_entropy(logits.view(-1, CLASSES), labels.view(-1))}


def asked(**more):
    torch.manual_seed(0)
    tokens = torch.randint(CLASSES, (64, PLACES))
    return {"model": Language(), "data": {"tokens": tokens, "labels": tokens}, "target_batch": 32, "device": "cpu",
            "optimizer": "sgd", "memory": "6MiB", "cache": False, "prefer": "fastest", **more}  # fmt: skip


def test_savers_stand_in_the_report_with_what_they_fit_and_what_is_taken_is_trained_with():
    report = autoaccum.probe(**asked())
    table = {row["saver"]: row for row in report.savers}
    assert list(table)[:2] == [None, "chunked_loss"]
    assert table["chunked_loss"]["limit"] > 2 * table[None]["limit"]
    assert all(row["same_result"] and row["peak_bytes"] <= report.budget_bytes for row in table.values())
    rates = [rate for row in table.values() for _, rate in row["throughput"]]
    assert 1.03 * dict(report.throughput)[report.micro_batch] >= max(rates)
    assert report.plan.ladder == report.ladder
    again = ProbeReport.from_dict(report.to_dict())
    assert again.savers == report.savers
    assert "chunked_loss" in str(report)


def setup():
    return {name: value for name, value in asked().items() if name in ("model", "data", "optimizer")}


@pytest.mark.slow
def test_a_child_looks_at_savers_too_and_what_it_takes_is_trained_with():
    report = autoaccum.probe(**asked(), isolate=setup)
    assert [row["saver"] for row in report.savers][:2] == [None, "chunked_loss"]
    assert report.plan.ladder == report.ladder


def test_false_and_a_name_leave_no_choice():
    assert [row["saver"] for row in autoaccum.probe(**asked(ladder=False)).savers] == [None]
    named = autoaccum.probe(**asked(ladder="chunked_loss"))
    assert named.ladder == "chunked_loss"
    assert [row["saver"] for row in named.savers] == [None]  # the step as it was asked for


def deep(**more):
    """Blocks that can be checkpointed, and a window of which some fit at once."""
    made = asked(memory="400KiB", loss=nn.CrossEntropyLoss(), **more)
    blocks = (nn.Sequential(nn.Linear(WIDE, WIDE), nn.Tanh()) for _ in range(4))
    made["model"] = nn.Sequential(nn.Embedding(50, WIDE), *blocks, nn.Flatten(), nn.Linear(PLACES * WIDE, 5))
    made["data"] = torch.randint(50, (64, PLACES)), torch.randint(5, (64,))
    return made


@pytest.mark.parametrize("slow_moments", [1, 1000])
def test_one_slow_moment_is_timed_again_before_savers_are_looked_at(monkeypatch, slow_moments):
    left = [slow_moments]

    def timed(bench, size, micro_batches=1, peak=None):
        slow = size < largest and left[0] > 0
        left[0] -= slow
        return (10.0 if slow else 1.0) / -(-32 // size), 0.0  # but for such moments any split takes the same time

    largest = autoaccum.probe(**deep(prefer="fewest")).micro_batch
    monkeypatch.setattr(fastest, "FIRST", 1000.0)
    monkeypatch.setattr(fastest, "MOST_ROUNDS", 1)
    monkeypatch.setattr(Bench, "time", timed)
    savers = {row["saver"] for row in autoaccum.probe(**deep()).savers}
    assert ("checkpointing" in savers) == (slow_moments > 1)


def test_where_windows_are_short_nothing_that_takes_longer_than_three_of_them_is_looked_at(monkeypatch):
    monkeypatch.setattr(fastest, "WORTH_IT", -math.inf)
    monkeypatch.setattr(Bench, "time", lambda bench, size, micro_batches=1, peak=None: (1e-9, 0.0))
    rows = {row["saver"]: row for row in autoaccum.probe(**deep()).savers}
    assert rows["checkpointing"]["limit"] is None
    assert "longer than the 3 windows" in rows["checkpointing"]["obstacle"]
    assert rows[None]["limit"] is not None


class Once(nn.Module):
    """Does not bear to run in a backward pass."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(WIDE, WIDE)

    def forward(self, x):
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError("called again")
        return torch.tanh(self.inside(x))


def test_a_saver_that_the_models_code_does_not_bear_is_left_out_with_its_error(monkeypatch):
    monkeypatch.setattr(fastest, "WORTH_IT", -math.inf)
    monkeypatch.setattr(fastest, "IN_ALL", math.inf)
    given = asked(memory="400KiB", loss=nn.CrossEntropyLoss())
    given["model"] = nn.Sequential(nn.Embedding(50, WIDE), *(Once() for _ in range(4)), nn.Flatten(), nn.LazyLinear(5))
    given["data"] = torch.randint(50, (64, PLACES)), torch.randint(5, (64,))
    report = autoaccum.probe(**given)
    assert report.ladder is None
    left = {row["saver"]: row["obstacle"] for row in report.savers if row["limit"] is None}
    assert left["checkpointing"] == "cannot be run, RuntimeError: called again"
    assert "called again" in " ".join(str(report).split())  # where the table is narrow it goes on in the next line


def test_what_changes_the_result_is_named_with_what_it_frees():
    with pytest.raises(NothingFitsError) as caught:
        autoaccum.probe(**asked(memory="600KiB", optimizer="adamw", prefer="fewest"))
    text = str(caught.value)
    assert "never taken: 8-bit optimizer states (frees up to " in text
    assert "LoRA (frees up to" in text
    assert "The result is the plain step's but for bf16" in text


def test_where_blocks_are_kept_a_size_is_timed_with_those_of_a_window_before_it(monkeypatch):
    ran = []

    class Counted(Language):
        def forward(self, tokens, labels):
            ran.append(len(tokens))
            return super().forward(tokens, labels)

    ran_by_turn, time = [], Bench.time

    def counted(self, *size, **peak):
        before = len(ran)
        seconds = time(self, *size, **peak)
        ran_by_turn.append(len(ran) - before)
        return seconds

    def windows(keeps):
        ran_by_turn.clear()
        monkeypatch.setattr(
            CpuDevice, "expect", lambda self, _, peak: setattr(self, "keeps", keeps and peak is not None)
        )
        autoaccum.probe(**asked(model=Counted(), ladder=False, memory="60MiB", max_batch=8))
        return list(ran_by_turn)

    monkeypatch.setattr(Bench, "time", counted)
    assert windows(keeps=True)[0] == 2, "once more, before the first of those that are timed in turn"
    assert set(windows(keeps=False)) == {1}

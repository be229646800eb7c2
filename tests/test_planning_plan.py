"""The Plan: exact over all ranks for every target, explained, and the same after a trip through JSON."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autoaccum.errors import PlanError
from autoaccum.planning.plan import Plan, plan
from autoaccum.planning.split import can_split
from tests.strategies import limits, minimums, plans, rank_limits, tails, targets, world_sizes

# --- sizes


@given(targets, limits, world_sizes)
def test_over_all_ranks_the_sizes_sum_to_the_target_fit_and_are_the_fewest(target, limit, world_size):
    made = [plan(limit, target, world_size=world_size, rank=rank) for rank in range(world_size)]
    sizes = [size for one in made for size in one.micro_batches]
    assert sum(sizes) == target
    assert 1 <= min(sizes) <= max(sizes) <= limit
    assert max(one.accumulation_steps for one in made) == -(-target // (limit * world_size))
    for one in made:
        assert one.accumulation_steps == len(one.micro_batches) == -(-sum(one.micro_batches) // limit)
        assert one.micro_batch == max(one.micro_batches, default=0)
        assert not one.micro_batches or max(one.micro_batches) - min(one.micro_batches) <= 1


@given(st.data(), minimums, targets)
def test_a_target_has_a_plan_on_every_rank_or_an_error_on_every_rank(data, minimum, target):
    allowed = data.draw(rank_limits(minimum))
    ranks = range(len(allowed))
    if can_split(target, max(allowed), minimum):
        made = [plan(allowed, target, world_size=len(allowed), rank=rank, minimum=minimum) for rank in ranks]
        assert sum(sum(one.micro_batches) for one in made) == target
        for one, limit in zip(made, allowed, strict=True):
            assert all(minimum <= size <= limit for size in one.micro_batches)
    else:
        for rank in ranks:
            with pytest.raises(PlanError, match="the nearest target batch"):
                plan(allowed, target, world_size=len(allowed), rank=rank, minimum=minimum)


@given(plans(), st.integers(0, 4000))
def test_the_ranks_shares_tile_any_window_and_are_cut_exactly(made, samples):
    assume(can_split(samples, max(made.limits), made.minimum))
    ranks = [made.on_rank(rank) for rank in range(made.world_size)]
    slices = [one.share(samples) for one in ranks]
    assert slices[0][0] == 0
    assert slices[-1][1] == samples
    assert all(before[1] == after[0] for before, after in itertools.pairwise(slices))
    for one, (start, stop) in zip(ranks, slices, strict=True):
        assert sum(one.split(samples)) == stop - start
        assert all(one.minimum <= size <= one.limits[one.rank] for size in one.split(samples))


@given(plans())
def test_another_rank_sees_the_same_plan_as_if_it_had_made_it(made):
    assert made.on_rank(made.rank).micro_batches == made.micro_batches
    other = made.on_rank(made.world_size - 1)
    assert other.split(made.usual_window) == other.micro_batches
    assert (other.lr, other.limits, other.target_batch) == (made.lr, made.limits, made.target_batch)


def test_more_ranks_than_samples_leave_ranks_idle_that_still_join():
    made = [plan(4, 3, world_size=5, rank=rank) for rank in range(5)]
    assert [one.micro_batches for one in made] == [(1,), (1,), (1,), (), ()]
    assert (made[4].micro_batch, made[4].accumulation_steps) == (0, 0)
    assert "2 idle ranks join every vote and sum" in made[0].reasons["share"]
    assert "joins every vote and every sum" in made[4].reasons["accumulation_steps"]


def test_the_scale_goes_by_the_target_and_never_by_the_micro_batches():
    on_small, on_large = plan(8, 256, lr=0.1, lr_batch=64), plan(256, 256, lr=0.1, lr_batch=64)
    assert on_small.accumulation_steps != on_large.accumulation_steps
    assert (on_small.lr, on_small.lr_scale) == (on_large.lr, on_large.lr_scale) == (0.2, 2)
    alone, among_four = plan(8, 256, lr=0.1, lr_batch=64), plan(8, 256, lr=0.1, lr_batch=64, world_size=4)
    assert alone.lr == among_four.lr


# --- reasons


def test_every_value_that_is_decided_has_one_line():
    made = plan(100, 256, lr=0.001, lr_batch=64, optimizer="sgd", samples=1000, batch_norm_layers=3)
    assert made.reasons == {
        "target_batch": "256 samples an optimizer step, exactly as asked",
        "micro_batch": "86: the largest of the 3 micro-batches; at most 100 samples fit at once",
        "accumulation_steps": (
            "3 micro-batches of 86, 85, 85: the fewest that fit, since at most 100 samples fit at once"
        ),
        "tail": "step: 1000 samples an epoch are 3 windows of 256 and one of 232, which has its own denominator",
        "bn_momentum": (
            "0.03451 = 1 − (1 − 0.1)^(1/3), so that 3 updates forget as much as one: for loops that cannot pool the "
            "statistics"
        ),
        "batch_norm": (
            "pooled: running statistics are updated once a window, from all of its 256 samples; a forward still "
            "normalises by its own micro-batch (Ghost BatchNorm, Hoffer 2017)"
        ),
        "lr": "0.004 = 0.001 × 4 (linear, Goyal 2017: κ = 256/64)",
        "lr_rule": "linear: auto, since the optimizer is sgd",
    }


@given(plans())
def test_reasons_are_single_lines(made):
    assert {"target_batch", "micro_batch", "accumulation_steps", "tail", "lr", "lr_rule"} <= set(made.reasons)
    own = {name: line for name, line in made.reasons.items() if name not in ("limit", "note", "tail")}
    assert all(line.strip() and "\n" not in line for line in own.values())


@pytest.mark.parametrize(
    ("samples", "more", "text"),
    [
        (1000, {"tail": "drop"}, "3 windows of 256; a tail of 232, short of a window, is dropped"),
        (
            513,
            {"minimum": 2},
            "1 window of 256 and one of 257; a tail of 1, too few for a micro-batch (minimum=2),",
        ),
        (100, {}, "100 samples an epoch are one window of 100, short of the target"),
        (512, {}, "512 samples an epoch are 2 windows of 256"),
        (
            257,
            {"minimum": 2, "limit": 2},
            "1 window of 256; a tail of 1, too few for a micro-batch (minimum=2), is",
        ),
    ],
)
def test_the_line_on_the_tail_says_what_becomes_of_it(samples, more, text):
    assert text in plan(**{"limit": 64, "target_batch": 256, "samples": samples, **more}).reasons["tail"]


@given(st.integers(5, 30), st.integers(5, 60), st.integers(0, 200), minimums, tails)
def test_the_line_on_the_tail_agrees_with_the_windows(limit, target, more, minimum, tail):
    assume(can_split(target, limit, minimum))
    made = plan(limit, target, samples=target + more, minimum=minimum, tail=tail)
    sizes = list(made.windows.sizes(made.samples))
    full, line = sizes.count(target), made.reasons["tail"]
    assert line.startswith(f"{tail}: {made.samples} samples an epoch are ")
    assert f"{full} window" in line or not full
    assert ("dropped" in line) == (sum(sizes) < made.samples)
    assert ("joins" in line) == (sizes[-1] > target)
    assert (f"one of {sizes[-1]}, which" in line) == (sizes[-1] < target)


def test_an_epoch_without_a_window_is_refused_with_the_remedy():
    with pytest.raises(PlanError, match='use tail="step", a target batch of at most 100'):
        plan(64, 256, samples=100, tail="drop")
    with pytest.raises(PlanError, match="samples=1 is an epoch without a window"):
        plan(64, 256, samples=1, minimum=2)


def test_a_model_without_batch_norm_has_no_word_on_it():
    made = plan(8, 32, batch_norm_layers=0)
    assert made.bn_momentum is None
    assert not {"bn_momentum", "batch_norm"} & set(made.reasons)


def test_small_micro_batches_before_batch_norm_are_warned_of():
    assert "Caution: 8 samples are few" in plan(8, 32, batch_norm_layers=1).reasons["batch_norm"]


def test_callers_lines_stand_beside_the_plans_own_and_replace_them_by_name():
    made = plan(8, 32, reasons={"limit": "8: as asked for", "budget": "1 GiB", "tail": "mine"})
    assert made.reasons["limit"] == "8: as asked for"
    assert made.reasons["budget"] == "1 GiB"
    assert made.reasons["tail"] == "mine"
    assert made.reasons["accumulation_steps"] == "4 micro-batches of 8: the fewest within the limit of 8"


# --- another limit


@given(plans(), st.integers(1, 80))
def test_a_new_limit_keeps_the_target_and_binds_every_rank(made, limit):
    assume(limit >= made.minimum and can_split(made.target_batch, limit, made.minimum))
    lower = made.with_limit(limit, "out of memory")
    assert lower.target_batch == made.target_batch
    assert max(lower.limits) == limit
    assert all(new <= max(old, limit) for new, old in zip(lower.limits, made.limits, strict=True))
    assert lower.reasons["limit"] == "out of memory"
    assert (lower.lr, lower.lr_scale, lower.optimizer_overrides) == (made.lr, made.lr_scale, made.optimizer_overrides)
    every = [lower.on_rank(rank).micro_batches for rank in range(made.world_size)]
    assert sum(map(sum, every)) == lower.usual_window
    short = made.samples is not None and made.samples < 2 * made.target_batch  # an epoch is one window, of all it has
    assert lower.usual_window == made.target_batch or short


def test_a_limit_that_rises_lets_an_epochs_last_sample_join_its_only_window():
    made = plan(2, 2, samples=3, minimum=2)
    assert made.micro_batches == (2,)
    higher = made.with_limit(3, "grown")
    assert higher.micro_batches == (3,)
    assert "where 2 were asked for: an epoch has 3" in higher.reasons["target_batch"]


def test_a_lower_limit_follows_through_to_the_momentum_and_its_line():
    made = plan(64, 128, batch_norm_layers=1).with_limit(32, "out of memory in step 7")
    assert made.micro_batches == (32, 32, 32, 32)
    assert made.bn_momentum == pytest.approx(1 - 0.9**0.25)
    assert "^(1/4)" in made.reasons["bn_momentum"]


def test_a_limit_may_rise_again_but_not_for_ranks_that_were_smaller():
    made = plan([64, 16], 128, world_size=2)
    lower = made.with_limit(8, "out of memory")
    assert lower.limits == (8, 8)
    assert made.with_limit(32, "out of memory").limits == (32, 16)
    assert made.with_limit(32, "out of memory").with_limit(64, "it went well").limits == (64, 16)
    assert plan(8, 64).with_limit(16, "it went well").micro_batches == (16, 16, 16, 16)


def test_a_limit_that_no_longer_cuts_the_target_is_refused():
    with pytest.raises(PlanError, match="nearest target batch that can be cut is 4 or 6"):
        plan(3, 5, minimum=2).with_limit(2, "out of memory")


# --- streams and parameter groups


def test_a_single_sample_left_joins_the_window_before_it_where_batch_norm_needs_two():
    assert list(plan(8, 16, minimum=2).windows.sizes(33)) == [16, 17]


def test_the_plan_sets_every_parameter_group():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    made = plan(8, 256, optimizer=optimizer, lr_batch=64)
    assert made.lr == optimizer.param_groups[0]["lr"] * made.lr_scale
    assert made.group_settings(optimizer.param_groups[0]) == {"lr": made.lr}


# --- values out of range


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_batch": True}, "target_batch=True is a bool"),
        ({"target_batch": 256.0}, "target_batch=256.0 is a float"),
        ({"target_batch": "256"}, "target_batch='256' is a str"),
        ({"target_batch": 0}, "target_batch=0 is too small"),
        ({"target_batch": -4}, "target_batch=-4 is too small"),
        ({"limit": 0}, "limit=0 is too small"),
        ({"limit": 2.5}, "limit=2.5 is a float"),
        ({"limit": "8"}, "limit='8' is a str"),
        ({"limit": [8, 8]}, "2 limits for world_size=1"),
        ({"limit": [8, True], "world_size": 2}, r"limit\[1\]=True is a bool"),
        ({"limit": 1, "minimum": 2}, "limit=1 is less than minimum=2"),
        ({"world_size": 0}, "world_size=0 is too small"),
        ({"rank": 1}, "rank=1 is not one of 1"),
        ({"rank": -1}, "rank=-1 is too small"),
        ({"samples": 0}, "samples=0 is too small"),
        ({"lr": 0.0}, "lr=0.0 cannot be trained with"),
        ({"lr": float("nan")}, "lr=nan cannot be trained with"),
        ({"lr_batch": 0}, "lr_batch=0 is too small"),
        ({"lr_batch": 64.0}, "lr_batch=64.0 is a float"),
        ({"lr_rule": "cubic"}, "lr_rule='cubic': choose 'auto', 'linear'"),
        ({"bn_momentum": 2.0}, "bn_momentum=2.0 is not a momentum"),
        ({"batch_norm": "frozen"}, "batch_norm='frozen': choose 'pooled'"),
        ({"batch_norm_layers": -1}, "batch_norm_layers=-1 is too small"),
        ({"minimum": 0}, "minimum=0 is too small"),
        ({"multiple_of": 0}, "multiple_of=0 is too small"),
        ({"tail": "merge"}, "tail='merge': choose 'step', 'drop'"),
        ({"reasons": 3}, "reasons=3: give a dict of lines"),
        ({"reasons": ["measured"]}, r"reasons=\['measured'\]: give a dict"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_and_value(values, message):
    with pytest.raises(PlanError, match=message):
        plan(**{"limit": 8, "target_batch": 32, **values})


# --- JSON


@given(plans())
def test_a_plan_is_equal_after_a_trip_through_json(made):
    read = Plan.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    assert read == made
    assert all(type(getattr(read, f.name)) is type(getattr(made, f.name)) for f in dataclasses.fields(Plan))


@given(st.floats(1e-8, 1.0), st.integers(1, 10**5), st.integers(1, 10**5))
def test_overrides_come_back_as_the_tuples_and_floats_they_were(lr, target, lr_batch):
    made = plan(8, target, lr=lr, lr_batch=lr_batch, lr_rule="adam-sde")
    read = Plan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert read.optimizer_overrides == made.optimizer_overrides
    assert isinstance(read.optimizer_overrides["betas"], tuple)


@settings(max_examples=20)
@given(plans())
def test_a_plan_is_equal_after_a_trip_through_a_file(tmp_path_factory, made):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    made.save(path)
    assert Plan.load(path) == made
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_holds_the_plan_among_other_things_loads_too(tmp_path):
    made = plan(8, 32)
    path = tmp_path / "best.json"
    path.write_text(json.dumps({"params": {"width": 3}, "value": 0.5, "plan": made.to_dict()}))
    assert Plan.load(path) == made
    path.write_text(json.dumps({"budget_bytes": 1, **made.to_dict()}))  # keys of a report beside the plan's
    assert Plan.load(str(path)) == made


def test_saving_replaces_the_file_at_once_or_leaves_it_alone(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan(8, 32).save(path)
    before = path.read_text()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(PlanError, match="No space left on device"):
        plan(4, 32).save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_keeps_all_of_it(tmp_path):
    path, opened = tmp_path / "plan.json", tmp_path / "opened.json"
    plan(8, 32).save(path)
    opened.hardlink_to(path)  # stands for a process that has the file open
    plan(4, 32).save(path)
    assert Plan.load(opened) == plan(8, 32)
    assert Plan.load(path) == plan(4, 32)


def test_a_folder_that_is_not_there_is_named_on_saving(tmp_path):
    with pytest.raises(PlanError, match=r"missing/plan\.json': No such file"):
        plan(8, 32).save(tmp_path / "missing" / "plan.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is damaged"),
        (b'{"schema": 1, "target_ba', "is damaged"),
        (b"\xff\xfe\x00", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        (b"[1, 2]", "is a JSON object, and this is a list"),
        (b"{}", "has schema None"),
        (b'{"schema": 2}', "has schema 2, and this version of autoaccum reads schema 1"),
        (b'{"schema": true}', "has schema True"),
        (b'{"schema": 1}', "lacks target_batch"),
    ],
)
def test_a_file_that_is_not_a_plan_is_refused_with_its_path(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere\.json cannot be read: No such file"):
        Plan.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target_batch": "256"}, "target_batch is '256', not an integer"),
        ({"target_batch": True}, "target_batch is True, not an integer"),
        ({"lr": float("nan")}, "lr is nan, not a finite number"),
        ({"lr_scale": None}, "lr_scale is None, not a finite number"),
        ({"lr_scale": 10**400}, "lr_scale"),
        ({"reasons": ["a"]}, "not an object"),
        ({"reasons": {"lr": 1}}, "not a text"),
        ({"optimizer_overrides": []}, "not an object"),
        ({"micro_batches": 4}, "not a list"),
        ({"limits": [0]}, r"limit\[0\]=0 is too small"),
        ({"limits": [8, 8]}, "2 limits for world_size=1"),
        ({"rank": 3}, "rank=3 is not one of 1"),
        ({"lr_rule": "auto"}, "lr_rule='auto': choose"),
        ({"tail": "x"}, "tail='x': choose"),
        ({"micro_batches": [16, 16]}, r"micro_batches is \(16, 16\), and its target, limits and rule make it"),
        ({"target_batch": 40}, "micro_batches is .* target, limits and rule make it"),
    ],
)
def test_a_plan_whose_values_are_wrong_or_do_not_fit_together_is_refused(changed, message):
    with pytest.raises(PlanError, match=message):
        Plan.from_dict({**plan(8, 32).to_dict(), **changed})


@pytest.mark.parametrize("path", [3, None, b"plan.json"])
def test_what_is_no_path_is_not_loaded(path):
    with pytest.raises(PlanError, match=r"plan=.* is of type \w+: give a Plan, or the path of its file"):
        Plan.load(path)


def test_planning_imports_no_torch():
    code = "import sys, autoaccum.planning.plan; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- a plan's file, at the door


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr_scale": 0}, "lr_scale is 0.0, and its .* make it 1.0"),
        ({"lr_scale": -1.0}, "lr_scale is -1.0"),
        ({"lr_scale": 2.0}, "lr_scale is 2.0, and its .* make it 1.0"),
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr_batch": 0}, "lr_batch=0 is too small"),
        ({"target_batch": 10**18}, "target_batch is 10+, not an integer from 0 to"),
        ({"target_batch": 10**12}, "is 125000000000 of them"),
        ({"limits": [0]}, r"limit\[0\]=0 is too small"),
        ({"minimum": 0}, "minimum=0 is too small"),
        ({"multiple_of": 0}, "multiple_of=0 is too small"),
        ({"world_size": 10**12}, "world_size=1000000000000 is too large"),
        (
            {"micro_batches": [8] * 3},
            r"micro_batches is \(8, 8, 8\), and its target, limits and rule make it \(8, 8, 8, 8\)",
        ),
        ({"layer_momentum": 7.0}, "bn_momentum=7.0 is not a momentum"),
        ({"bn_momentum": 0.5}, "bn_momentum is 0.5, and its target, limits and rule make it 0.025"),
        ({"reasons": None}, "reasons is None, not an object"),
        ({"optimizer_overrides": {"eps": 1e-6}}, "have 'eps', which lr_rule='none' leaves as the optimizer has it"),
    ],
)
def test_values_of_a_plan_that_cannot_be_are_refused_where_it_is_read(changed, message):
    with pytest.raises(PlanError, match=message) as caught:
        Plan.from_dict({**plan(8, 32, lr=1e-3).to_dict(), **changed})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("value", ["1e999", "NaN", "null", "[" * 30 + "]" * 30, "1" * 400, "[" * 10**5])
def test_a_plans_file_with_any_value_anywhere_is_one_clear_line(tmp_path, value):
    path = tmp_path / "plan.json"
    for name in ("target_batch", "lr", "lr_scale", "limits", "reasons", "by_length", "schema"):
        values = {**plan(8, 32, lr=1e-3).to_dict(), name: "HERE"}
        path.write_text(json.dumps(values).replace('"HERE"', value))
        if (name, value) == ("lr", "null"):
            continue  # none was given
        with pytest.raises(PlanError, match=str(path)) as caught:
            Plan.load(path)
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)


def test_a_plans_file_carries_its_checksum(tmp_path):
    path = tmp_path / "plan.json"
    plan(8, 32, lr=1e-3).save(path)
    text = path.read_text()
    path.write_text(text.replace('"lr": 0.001', '"lr": 0.1'))
    with pytest.raises(PlanError, match=r"checksum is not that of its values .*delete the line"):
        Plan.load(path)
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "checksum"}))
    assert Plan.load(path).lr == 0.1

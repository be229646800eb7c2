"""A plan in another trainer's words: names that the trainer knows, and nothing claimed that it cannot express."""

import inspect
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import autoaccum
from autoaccum.errors import PlanError
from autoaccum.planning.trainer_config import TRAINERS


def lines(plan, name):
    """(the comments as one text, the lines to put)."""
    text = plan.as_config(name).splitlines()
    comments = " ".join(line.lstrip("# ") for line in text if line.startswith("#"))
    return comments, [line for line in text if not line.startswith("#")]


def numbers(name, put):
    """(size, steps or None, total or None) as the trainer would read them."""
    text = "\n".join(put)
    size = re.search(
        r"(?:batch_size(?:_per_gpu)?\"?)\s*[=:]\s*(\d+)",
        text.replace('"train_batch_size"', "total").replace("global_batch_size", "total"),
    )
    steps = re.search(r"(?:gradient_accumulation_steps|accumulate_grad_batches)\"?\s*[=:]\s*(\d+)", text)
    total = re.search(r"(?:\"train_batch_size\"|global_batch_size)\s*[=:]\s*(\d+)", text)
    return tuple(None if found is None else int(found.group(1)) for found in (size, steps, total))


def test_an_even_split_is_expressed_exactly():
    plan = autoaccum.plan(64, 256, lr=1e-3, lr_batch=64)
    for name in TRAINERS:
        said, put = lines(plan, name)
        assert "4 × 64, exactly as planned" in said, name
        _, steps, total = numbers(name, put)
        assert steps in (4, None)
        assert total in (256, None)


def test_a_ragged_split_becomes_the_largest_equal_one_and_that_is_said():
    said, put = lines(autoaccum.plan(100, 256), "axolotl")
    assert put == ["micro_batch_size: 64", "gradient_accumulation_steps: 4"]
    assert "3 micro-batches of 86, 85, 85 cannot be expressed" in said


def test_a_target_that_ranks_cannot_share_evenly_becomes_the_nearest_and_that_is_said():
    said, put = lines(autoaccum.plan(100, 255, world_size=2), "torchtitan")
    assert put[:3] == ["[training]", "local_batch_size = 64", "global_batch_size = 256"]
    assert "255 cannot be expressed" in said


def test_a_target_that_divides_badly_says_which_would_not():
    said, put = lines(autoaccum.plan(100, 257), "trl")
    assert "    gradient_accumulation_steps=257," in put
    assert "a target of 258 would take 3 × 86" in said


def test_deepspeeds_lines_are_json_of_three_numbers_that_agree():
    _, put = lines(autoaccum.plan(10, 120, world_size=4), "deepspeed")
    values = json.loads("\n".join(put))
    product = values["train_micro_batch_size_per_gpu"] * values["gradient_accumulation_steps"] * 4
    assert values["train_batch_size"] == product == 120


@given(st.integers(1, 200), st.integers(1, 3000), st.integers(1, 8))
def test_what_is_told_fits_on_every_rank_and_is_what_the_comment_says(limit, target, ranks):
    plan = autoaccum.plan(limit, target, world_size=ranks)
    said, put = lines(plan, "transformers")
    size, steps, _ = numbers("transformers", put)
    assert 1 <= size <= limit
    assert said.startswith(f"{size * steps * ranks} samples a step: {steps} × {size}")
    assert target % ranks or size * steps * ranks == target


@pytest.mark.parametrize("name", ["keras", "", None, 3, "x" * 10**5])
def test_a_trainer_that_is_not_known_is_refused_with_those_that_are(name):
    with pytest.raises(PlanError, match="choose 'transformers'"):
        autoaccum.plan(8, 16).as_config(name)


@pytest.mark.parametrize(
    ("package", "kind", "name"),
    [
        ("transformers", "TrainingArguments", "transformers"),
        ("trl", "SFTConfig", "trl"),
        ("lightning", "Trainer", "lightning"),
        ("accelerate", "Accelerator", "accelerate"),
    ],
)
def test_the_names_are_those_of_the_trainer_that_is_installed(package, kind, name):
    trainer = pytest.importorskip(package)
    known = inspect.signature(getattr(trainer, kind)).parameters
    _, put = lines(autoaccum.plan(8, 16, lr=0.1), name)
    call = "\n".join(put).partition(f"{kind}(")[2]
    for word in re.findall(r"(\w+)=", call.partition(")")[0]):
        assert word in known

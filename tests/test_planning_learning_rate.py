"""Rules for the learning rate, against the papers' formulas and on real optimizers."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoaccum.errors import PlanError
from autoaccum.planning.learning_rate import (
    RULES,
    choose_rule,
    decide,
    family,
    group_settings,
    lr_factor,
    sde_settings,
)
from autoaccum.planning.plan import plan

batches = st.integers(1, 100_000)
betas = st.floats(0, 0.9999)


def parameters():
    return [torch.nn.Parameter(torch.zeros(2))]


# --- the formulas


def test_linear_gives_the_rates_of_goyal_2017():
    """§5.1 of the paper: 0.1 for a batch of 256, so 0.1 · kn/256 for a batch of kn; 3.2 for 8192."""
    for batch, rate in [(256, 0.1), (512, 0.2), (1024, 0.4), (8192, 3.2)]:
        assert 0.1 * lr_factor("linear", batch, 256) == pytest.approx(rate, rel=1e-15)


@given(batches, batches)
def test_sqrt_is_the_root_of_the_batches_ratio(target, tuned_at):
    """Krizhevsky 2014, §5: k times the batch, √k times the rate, to keep the variance of the update."""
    assert lr_factor("sqrt", target, tuned_at) ** 2 * tuned_at == pytest.approx(target, rel=1e-12)


def test_adam_sde_gives_the_settings_of_malladi_2022():
    """The square root scaling rule for Adam: η' = η√κ, β' = 1 − κ(1 − β), ε' = ε/√κ, here with κ = 4."""
    assert lr_factor("adam-sde", 1024, 256) == 2
    settings = sde_settings(4, (0.9, 0.999), 1e-8)
    assert settings["betas"] == pytest.approx((1 - 4 * 0.1, 1 - 4 * 0.001), rel=1e-15)
    assert settings["eps"] == pytest.approx(1e-8 / 2, rel=1e-15)


@given(batches, batches, betas, betas)
def test_adam_sde_keeps_betas_a_momentum_for_any_ratio(target, tuned_at, beta1, beta2):
    kappa = target / tuned_at
    for beta, scaled in zip((beta1, beta2), sde_settings(kappa, (beta1, beta2), 1e-8)["betas"]):
        assert 0 <= scaled < 1 or (scaled == 1 and kappa * (1 - beta) < 1e-15)
        formula = 1 - kappa * (1 - beta)
        assert scaled == (formula if formula > 0 else beta**kappa)


def test_where_the_formula_leaves_its_range_beta_to_the_kappa_is_taken():
    assert sde_settings(40, (0.9, 0.999), 1e-8)["betas"] == pytest.approx((0.9**40, 0.96))


def test_both_forms_of_beta_agree_for_betas_near_one():
    scaled = sde_settings(2, (0.9999,), 1e-8)["betas"]
    assert scaled[0] == pytest.approx(0.9999**2, abs=2e-8)


@given(batches)
def test_a_batch_as_tuned_changes_nothing(batch):
    assert all(lr_factor(rule, batch, batch) == 1 for rule in RULES[1:])
    assert sde_settings(1, (0.9, 0.999), 1e-8) == {
        "betas": pytest.approx((0.9, 0.999), rel=1e-15),
        "eps": 1e-8,
    }


# --- which rule


class MyAdam(torch.optim.AdamW):
    pass


class LaterMyAdam(MyAdam):
    pass


class Muon(torch.optim.AdamW):
    """Stands for an optimizer that falls back to AdamW for some parameters, with a rule of its own for the others."""


class AdamWScheduleFree(torch.optim.Optimizer):
    pass


class Adafactor(torch.optim.Optimizer):
    pass


class PagedAdamW8bit(torch.optim.Optimizer):
    pass


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("sgd", "sgd"),
        ("SGD", "sgd"),
        (torch.optim.SGD, "sgd"),
        ("adamw", "adam"),
        (torch.optim.Adam, "adam"),
        (torch.optim.NAdam, "adam"),
        (torch.optim.RAdam, "adam"),
        (torch.optim.Adamax, "adam"),
        (torch.optim.SparseAdam, "adam"),
        (functools.partial(torch.optim.AdamW, betas=(0.8, 0.9)), "adam"),
        (functools.partial(functools.partial(torch.optim.SGD, momentum=0.9), nesterov=True), "sgd"),
        (LaterMyAdam, "adam"),
        (PagedAdamW8bit, "adam"),
        ("FusedAdam", "adam"),
        ("DeepSpeedCPUAdam", "adam"),
        (Muon, "other"),
        (AdamWScheduleFree, "other"),
        (Adafactor, "other"),
        (torch.optim.RMSprop, "other"),
        ("lion", "other"),
        ("LAMB", "other"),
        (lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9), "other"),
    ],
)
def test_the_family_is_read_from_the_class_its_bases_or_the_name(optimizer, expected):
    assert family(optimizer)[0] == expected


def test_an_instance_is_of_its_class_family():
    assert family(torch.optim.SGD(parameters(), 0.1))[0] == "sgd"
    assert family(LaterMyAdam(parameters())) == ("adam", "AdamW")


def test_auto_takes_linear_for_sgd_sqrt_for_adam_and_leaves_the_others_and_says_why():
    assert choose_rule("auto", torch.optim.SGD) == ("linear", "linear: auto, since the optimizer is SGD")
    assert choose_rule("auto", LaterMyAdam) == ("sqrt", "sqrt: auto, since LaterMyAdam is AdamW's subclass")
    rule, why = choose_rule("auto", Adafactor)
    assert rule == "none"
    assert "no established rule for Adafactor" in why
    made = decide(256, 64, optimizer=Adafactor, lr=0.01)
    assert (made["lr"], made["lr_scale"], made["lr_rule"], made["optimizer_overrides"]) == (0.01, 1, "none", {})
    assert made["reasons"]["lr"] == "0.01, not scaled: auto knows no established rule for Adafactor"


def test_a_rule_that_is_asked_for_is_applied_to_any_optimizer():
    assert decide(256, 64, rule="linear", optimizer=Adafactor, lr=0.01)["lr"] == pytest.approx(0.04)
    assert decide(256, 64, rule="none", optimizer="sgd", lr=0.01)["lr"] == 0.01


@pytest.mark.parametrize("rule", ["cubic", "", None, "AUTO"])
def test_an_unknown_rule_is_refused_with_the_known_ones(rule):
    with pytest.raises(PlanError, match="choose 'auto', 'linear', 'sqrt', 'adam-sde', 'none'"):
        choose_rule(rule, "sgd")


# --- the decision


def test_the_reason_shows_the_whole_sum():
    made = decide(256, 64, optimizer="sgd", lr=0.001)
    assert made["reasons"]["lr"] == "0.004 = 0.001 × 4 (linear, Goyal 2017: κ = 256/64)"
    assert made["lr"] == 0.004


def test_without_an_lr_batch_nothing_is_scaled_and_the_reason_says_so():
    made = decide(256, None, optimizer="sgd", lr=0.001, rule="linear")
    assert (made["lr"], made["lr_scale"], made["lr_rule"]) == (0.001, 1, "none")
    assert made["reasons"]["lr"] == "0.001, not scaled: no lr_batch says at which batch it was tuned"


def test_a_linear_scale_above_8_advises_a_warm_up_with_its_length():
    assert "warmup_steps" not in decide(512, 64, optimizer="sgd")["reasons"]
    assert "warmup_steps" not in decide(1024, 64, optimizer="adamw")["reasons"]
    line = decide(1024, 64, optimizer="sgd", samples=10_000)["reasons"]["warmup_steps"]
    assert "κ = 16 is above 8" in line
    assert "the first 5 epochs, here 50 steps" in line


def test_an_instance_gives_its_own_rates_betas_and_eps():
    optimizer = torch.optim.AdamW(parameters(), lr=3e-4, betas=(0.95, 0.99), eps=1e-6)
    made = decide(256, 64, rule="adam-sde", optimizer=optimizer)
    assert made["lr"] == pytest.approx(6e-4)
    assert made["optimizer_overrides"]["betas"] == pytest.approx((0.8, 0.96))
    assert made["optimizer_overrides"]["eps"] == pytest.approx(5e-7)
    assert made["reasons"]["eps"].startswith("5e-07 = 1e-06 / √κ")
    assert made["reasons"]["betas"].startswith("0.8 = 1 − κ(1 − 0.95); 0.96 = 1 − κ(1 − 0.99)")


def test_betas_out_of_the_formulas_range_are_explained():
    assert "0.0147809 = 0.9^κ, as 1 − κ(1 − 0.9) ≤ 0" in decide(2560, 64, rule="adam-sde")["reasons"]["betas"]


def test_betas_come_from_a_partial_or_from_the_call_before_the_defaults():
    partial = functools.partial(torch.optim.AdamW, betas=(0.8, 0.9))
    assert decide(8, 8, rule="adam-sde", optimizer=partial)["optimizer_overrides"]["betas"] == pytest.approx((0.8, 0.9))
    given_in_call = decide(8, 8, rule="adam-sde", optimizer=partial, betas=(0.5, 0.6), eps=1e-3)
    assert given_in_call["optimizer_overrides"]["betas"] == pytest.approx((0.5, 0.6))
    assert given_in_call["optimizer_overrides"]["eps"] == 1e-3


def test_a_rate_as_tuned_is_read_behind_a_schedule_that_is_attached_already():
    optimizer = torch.optim.SGD(parameters(), lr=0.5)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 10))  # its first rate is 0
    assert decide(128, 64, optimizer=optimizer)["lr"] == 1


def test_groups_of_several_rates_have_no_single_one_and_the_reason_says_so():
    optimizer = torch.optim.SGD([{"params": parameters(), "lr": 0.1}, {"params": parameters(), "lr": 0.2}], lr=0.3)
    made = decide(128, 64, optimizer=optimizer)
    assert made["lr"] is None
    assert made["reasons"]["lr"].startswith("each parameter group's own × 2 (linear")


@pytest.mark.parametrize("lr", [0, -1e-3, math.nan, math.inf, "0.1", True])
def test_a_rate_that_is_not_a_finite_positive_number_is_refused_by_value(lr):
    with pytest.raises(PlanError, match="lr="):
        decide(256, None, lr=lr)


@pytest.mark.parametrize(
    ("optimizer", "settings", "message"),
    [
        ("sgd", {}, "which sgd does not have"),
        ("lion", {}, "those of lion are not known"),
        ("adamw", {"betas": (0.9, 1.0)}, "betas="),
        ("adamw", {"betas": (-0.1, 0.9)}, "betas="),
        ("adamw", {"eps": -1e-8}, "eps="),
        ("adamw", {"eps": math.nan}, "eps="),
    ],
)
def test_adam_sde_is_refused_without_betas_and_eps_to_change(optimizer, settings, message):
    with pytest.raises(PlanError, match=message):
        decide(256, 64, rule="adam-sde", optimizer=optimizer, **settings)


# --- parameter groups


def test_all_parameter_groups_are_scaled_alike_and_keep_their_own_betas():
    optimizer = torch.optim.AdamW(
        [{"params": parameters(), "lr": 1e-3}, {"params": parameters(), "lr": 1e-4, "betas": (0.95, 0.99)}], lr=1.0
    )
    for group in optimizer.param_groups:
        group.update(group_settings(group, "adam-sde", 256, 64))
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"]) == pytest.approx((2e-3, 2e-4))
    assert first["betas"] == pytest.approx((0.6, 0.996))
    assert second["betas"] == pytest.approx((0.8, 0.96))
    assert first["eps"] == second["eps"] == pytest.approx(5e-9)
    optimizer.step()  # the optimizer takes what it was given


@pytest.mark.parametrize(("rule", "factor"), [("linear", 4), ("sqrt", 2)])
def test_the_rate_that_schedules_count_from_is_scaled_too(rule, factor):
    settings = group_settings({"lr": 0.1, "initial_lr": 0.3, "momentum": 0.9}, rule, 256, 64)
    assert settings == pytest.approx({"lr": 0.1 * factor, "initial_lr": 0.3 * factor})


def test_a_rate_held_in_a_tensor_stays_one():
    settings = group_settings({"lr": torch.tensor(0.5)}, "linear", 8, 4)
    assert torch.equal(settings["lr"], torch.tensor(1.0))


def test_nothing_is_set_where_nothing_is_scaled():
    assert group_settings({"lr": 0.1}, "none", 256, 64) == {}
    assert group_settings({"lr": 0.1}, "none", 256, None) == {}


def test_settings_that_a_group_does_not_have_are_not_added():
    assert set(group_settings({"lr": 0.1}, "adam-sde", 256, 64)) == {"lr"}


def test_a_rate_of_0_that_a_loop_of_ones_own_raises_later_is_planned_for():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.0)
    assert plan(8, 64, optimizer=optimizer, lr_batch=16).lr == 0.0

"""The learning rate for another batch: rules with their formulas, sources and reasons.

Choices made here:

- The scale is κ = target_batch / lr_batch, the batch trained with over the batch that the LR was tuned at. The number
  of micro-batches never enters: the same run on a larger device must train the same.
- "auto" goes by the optimizer's family, read from its class's name and from its bases' names, so that a subclass of
  AdamW is of Adam's family and a schedule-free AdamW is not. Where no rule is established, the LR is left alone, and
  the reason says so.
- All of an optimizer's parameter groups are scaled by the same factor. "adam-sde" changes each group's own betas and
  eps.

Sources. Goyal 2017: Goyal et al., "Accurate, Large Minibatch SGD", arXiv 1706.02677, §2.1 and §2.2. Krizhevsky 2014:
"One weird trick for parallelizing convolutional neural networks", arXiv 1404.5997, §5. Malladi 2022: Malladi et al.,
"On the SDEs and Scaling Rules for Adaptive Gradient Algorithms", arXiv 2205.10287, square root scaling rule for Adam.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from autoaccum.checks import one_of
from autoaccum.errors import PlanError, shown

__all__ = [
    "RULES",
    "choose_rule",
    "decide",
    "family",
    "group_settings",
    "lr_factor",
    "number",
    "one_micro_batch",
    "optimizer_name",
    "sde_settings",
]

RULES = ("auto", "linear", "sqrt", "adam-sde", "none")
_WARMUP_ABOVE = 8  # κ from which the linear rule is advised to be warmed up to

_SOURCES = {
    "linear": "linear, Goyal 2017: κ",
    "sqrt": "sqrt, Krizhevsky 2014 and Malladi 2022: √κ, κ",
    "adam-sde": "adam-sde, Malladi 2022: √κ, κ",
}
_SGD = {"sgd", "sgdw"}
_ADAM = {"adam", "adamw", "adamax", "nadam", "nadamw", "radam", "sparseadam"}
# A class of these names has rules of its own, whatever it is derived from.
_OTHERS = {"adafactor", "lamb", "lars", "lion", "muon"}
# The same algorithm in another's kernels or storage: FusedAdam, DeepSpeedCPUAdam, PagedAdamW8bit.
_WRAPPING = re.compile(r"^(paged|fused|deepspeedcpu|cpu)|((8|4|32)bit|fp8|legacy)$")


def lr_factor(rule: str, target_batch: int, lr_batch: int | None) -> float:
    """What every LR is multiplied by.

    - "linear": κ. κ small steps in nearly one direction are one step κ times as long (Goyal 2017, §2.1).
    - "sqrt", "adam-sde": √κ. It keeps the variance of the updates (Krizhevsky 2014), and for Adam follows from its SDE
      (Malladi 2022).
    - "none", or without an `lr_batch`: 1.
    """
    if rule == "none" or lr_batch is None:
        return 1.0
    kappa = target_batch / lr_batch
    return kappa if rule == "linear" else math.sqrt(kappa)


def sde_settings(kappa: float, betas: Sequence[float], eps: float) -> dict[str, float | tuple[float, ...]]:
    """β' = 1 − κ(1 − β) and ε' = ε/√κ (Malladi 2022): Adam follows the same SDE at the other batch size.

    Where 1 − κ(1 − β) is not positive the formula has left its range, and β^κ is taken: the same for a β near 1, and
    what κ steps of the small batch leave of the past.
    """
    return {"betas": tuple(_scaled_beta(beta, kappa) for beta in betas), "eps": eps / math.sqrt(kappa)}


def _scaled_beta(beta: float, kappa: float) -> float:
    scaled = 1 - kappa * (1 - beta)
    return float(scaled if scaled > 0 else beta**kappa)


# --- which rule ------------------------------------------------------------------------------------------------------


def _lineage(optimizer: object) -> list[str]:
    """The names that an optimizer goes by, the nearest first: of its class and all bases; of a factory, its own."""
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    if isinstance(optimizer, str):
        return [optimizer]
    if not isinstance(optimizer, type):
        name = getattr(optimizer, "__name__", None)  # functions have one, instances of optimizers do not
        if isinstance(name, str):
            return [name]
        optimizer = type(optimizer)
    return [base.__name__ for base in optimizer.__mro__ if base is not object]


def optimizer_name(optimizer: object) -> str:
    """What to call the optimizer in a sentence: its class's, factory's or own name."""
    return _lineage(optimizer)[0]


def family(optimizer: object) -> tuple[str, str]:
    """("sgd", "adam" or "other", the class whose name says so) of an optimizer, its class, a factory or a name."""
    lineage = _lineage(optimizer)
    for name in lineage:
        plain = _WRAPPING.sub("", _WRAPPING.sub("", re.sub(r"[^a-z0-9]", "", name.lower())))
        if plain in _OTHERS or "schedulefree" in plain:
            break
        if plain in _SGD:
            return "sgd", name
        if plain in _ADAM:
            return "adam", name
    return "other", lineage[0]


def choose_rule(rule: str, optimizer: object) -> tuple[str, str]:
    """The rule to apply, never "auto", and one line on why it is that one.

    A PlanError where `rule` is none of RULES, or "adam-sde" for an optimizer of SGD's family.
    """
    one_of("lr_rule", rule, RULES, PlanError)
    kind, known_by = family(optimizer)
    name = optimizer_name(optimizer)
    if rule == "adam-sde" and kind == "sgd":
        raise PlanError(f'lr_rule="adam-sde" changes betas and eps, which {name} does not have: use "linear" or "auto"')
    if rule != "auto":
        return rule, f"{rule}: as asked for"
    which = f"{name} is {known_by}'s subclass" if known_by != name else f"the optimizer is {name}"
    if kind == "sgd":
        return "linear", f"linear: auto, since {which}"
    if kind == "adam":
        return "sqrt", f"sqrt: auto, since {which}"
    return "none", f'none: auto knows no established rule for {name}; "linear" and "sqrt" can be asked for'


# --- the rule applied ------------------------------------------------------------------------------------------------


def decide(
    target_batch: int,
    lr_batch: int | None,
    *,
    rule: str = "auto",
    optimizer: object = "adamw",
    lr: float | None = None,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    samples: int | None = None,
) -> dict[str, Any]:
    """The LR for `target_batch`, where `lr` (or the optimizer's own) was tuned at `lr_batch`; without one it is left.

    As a plan has it: its `lr` (scaled), `lr_scale`, `lr_rule` and `optimizer_overrides`, and `reasons` for each. The
    arguments are those of `plan.plan`.

    Raises:
        PlanError: a rule that is not one, or not for this optimizer; an LR, betas or eps out of range.
    """
    rule, why = choose_rule(rule, optimizer)
    # As it was tuned, each group's own, which a schedule that is attached already keeps as `initial_lr`.
    groups = [float(group.get("initial_lr", group["lr"])) for group in _groups(optimizer) if "lr" in group]
    own = groups if lr is None else [_rate(lr)]
    lr = own[0] if len(set(own)) == 1 else None
    overrides: dict[str, float | tuple[float, ...]] = {}
    others: dict[str, str] = {}
    source = why.removeprefix("none: ").split(";")[0]
    if lr_batch is None:
        rule, why = "none", "none: without an lr_batch there is nothing to scale from"
        source = "no lr_batch says at which batch it was tuned"
    elif rule != "none":
        source = f"{_SOURCES[rule]} = {target_batch}/{lr_batch}"
    factor = lr_factor(rule, target_batch, lr_batch)
    if rule == "adam-sde" and lr_batch is not None:
        betas, eps = _adam_settings(optimizer, betas, eps)
        overrides = sde_settings(target_batch / lr_batch, betas, eps)
        others = _override_lines(target_batch / lr_batch, betas, eps)
    elif rule == "linear" and factor > _WARMUP_ABOVE:
        # 5 epochs from the unscaled LR (Goyal 2017, §2.2).
        steps = "" if samples is None else f", here {5 * math.ceil(samples / target_batch)} steps"
        others["warmup_steps"] = (
            f"a warm-up is advised, since κ = {number(factor)} is above {_WARMUP_ABOVE}: Goyal 2017 climbs from the "
            f"unscaled LR over the first 5 epochs{steps}"
        )
    reasons = {"lr": _lr_line(lr, len(own), rule, factor, source), "lr_rule": why, **others}
    # An optimizer's own rate may be 0, until a loop that warms up by hand raises it.
    lr = _rate(lr * factor) if lr else lr
    return {"lr": lr, "lr_scale": factor, "lr_rule": rule, "optimizer_overrides": overrides, "reasons": reasons}


def group_settings(
    group: Mapping[str, Any], rule: str, target_batch: int, lr_batch: int | None
) -> dict[str, float | tuple[float, ...]]:
    """New values for one parameter group: its own LR times the factor of all groups; by "adam-sde" also betas and eps.

    Empty where nothing is scaled. `initial_lr`, from which schedules count, is scaled where it is there.
    """
    if rule == "none" or lr_batch is None:
        return {}
    factor = lr_factor(rule, target_batch, lr_batch)
    settings = {key: group[key] * factor for key in ("lr", "initial_lr") if key in group}
    if rule == "adam-sde":
        betas = [float(beta) for beta in group.get("betas", ())]
        overrides = sde_settings(target_batch / lr_batch, betas, float(group.get("eps", 0)))
        settings |= {key: value for key, value in overrides.items() if key in group}
    return settings


def one_micro_batch(samples: int, target_batch: int, optimizer: Any) -> str:
    """What to train with where each micro-batch of so many samples becomes a step: lr by "auto", β₂ with its memory in
    samples.

    β₂' = β₂^κ, κ = samples / target_batch, keeps the half-life of Adam's second moment in samples (Marek 2025: Marek et
    al., "Small Batch Size Training for Language Models", arXiv 2507.07101, §3).
    """
    kappa, rule, group = samples / target_batch, choose_rule("auto", optimizer)[0], optimizer.param_groups[0]
    lr = group_settings(group, rule, samples, target_batch).get("lr", group["lr"])
    settings = [f"target_batch={samples}", f"lr={number(float(lr))}"]
    betas = group.get("betas")
    if betas is not None and len(betas) == 2:
        settings.append(f"betas=({number(float(betas[0]))}, {number(float(betas[1]) ** kappa)})")
    source = f"β₂^κ, κ = {samples}/{target_batch}, Marek 2025" if len(settings) > 2 else f"κ = {samples}/{target_batch}"
    return f"{', '.join(settings)} ({source})"


def number(value: float) -> str:
    """A figure for a sentence, six digits at most: 0.001, 4, 2.66667."""
    return f"{value:.6g}"


def _lr_line(lr: float | None, groups: int, rule: str, factor: float, source: str) -> str:
    if rule == "none":
        return f"{'as it is' if lr is None else number(lr)}, not scaled: {source}"
    product = f"{number(factor)} ({source})"
    if lr is None:
        return f"{'each parameter group' if groups > 1 else 'the optimizer'}'s own × {product}"
    return f"{number(lr * factor)} = {number(lr)} × {product}"


def _override_lines(kappa: float, betas: Sequence[float], eps: float) -> dict[str, str]:
    terms = []
    for beta in betas:
        formula = f"1 − κ(1 − {number(beta)})"
        if 1 - kappa * (1 - beta) <= 0:
            formula = f"{number(beta)}^κ, as {formula} ≤ 0"
        terms.append(f"{number(_scaled_beta(beta, kappa))} = {formula}")
    divided = f"{number(eps / math.sqrt(kappa))} = {number(eps)} / √κ"
    kappa_text = f"(adam-sde, Malladi 2022: κ = {number(kappa)})"
    return {"betas": f"{'; '.join(terms)} {kappa_text}", "eps": f"{divided} {kappa_text}"}


# --- what the user or the optimizer gives ----------------------------------------------------------------------------


def _groups(optimizer: object) -> Sequence[Mapping[str, Any]]:
    groups: Sequence[Mapping[str, Any]] = getattr(optimizer, "param_groups", ())
    return groups


def _adam_settings(
    optimizer: object, betas: Sequence[float] | None, eps: float | None
) -> tuple[tuple[float, ...], float]:
    """As given, as the optimizer has them (in its first group, or among a partial's keywords), or PyTorch's own."""
    known: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8} if family(optimizer)[0] == "adam" else {}
    known |= optimizer.keywords if isinstance(optimizer, functools.partial) else next(iter(_groups(optimizer)), {})
    betas, eps = known.get("betas") if betas is None else betas, known.get("eps") if eps is None else eps
    if betas is None or eps is None:
        raise PlanError(
            f'lr_rule="adam-sde" changes betas and eps, and those of {optimizer_name(optimizer)} are not known: '
            "give betas=(0.9, 0.999) and eps=1e-8 as they were tuned, or another lr_rule"
        )
    try:
        numbers = tuple(float(beta) for beta in betas), float(eps)
        if not (all(0 <= beta < 1 for beta in numbers[0]) and 0 <= numbers[1] < math.inf):
            raise ValueError
    except (OverflowError, RuntimeError, TypeError, ValueError):
        raise PlanError(
            f"betas={shown(betas)}, eps={shown(eps)}: give betas from 0 to less than 1, such as (0.9, 0.999), and a "
            "small eps, such as 1e-8"
        ) from None
    return numbers


def _rate(value: Any) -> float:
    """`value` as a float above 0, else a PlanError."""
    try:
        rate = math.nan if isinstance(value, (bool, str)) else float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        rate = math.nan
    if not 0 < rate < math.inf:
        raise PlanError(f"lr={shown(value)} cannot be trained with: give a finite number above 0, such as 1e-3")
    return rate

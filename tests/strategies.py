"""Hypothesis strategies that several test files share: sizes as people have them, and plans over them."""

from hypothesis import assume
from hypothesis import strategies as st

from autoaccum.planning.plan import Plan, plan
from autoaccum.planning.split import can_split

targets = st.one_of(st.integers(1, 40), st.integers(1, 5000))
limits = st.one_of(st.integers(1, 12), st.integers(1, 1500))
world_sizes = st.one_of(st.just(1), st.integers(1, 9))
minimums = st.sampled_from([1, 1, 2, 2, 3, 5])
multiples = st.sampled_from([1, 1, 2, 4, 8, 12])
tails = st.sampled_from(["step", "drop"])
rates = st.floats(1e-8, 10, allow_nan=False)
optimizers = st.sampled_from(["adamw", "sgd", "lion", "radam"])


@st.composite
def rank_limits(draw: st.DrawFn, minimum: int = 1) -> tuple[int, ...]:
    """One limit a rank, alike for half of the worlds drawn, none under `minimum`."""
    world_size = draw(world_sizes)
    if draw(st.booleans()):
        return (draw(st.integers(minimum, 60)),) * world_size
    return tuple(draw(st.lists(st.integers(minimum, 60), min_size=world_size, max_size=world_size)))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of all kinds, as seen by any of their ranks."""
    minimum = draw(minimums)
    allowed = draw(rank_limits(minimum))
    target = draw(st.integers(1, 3000))
    assume(can_split(target, max(allowed), minimum))
    return plan(
        allowed,
        target,
        world_size=len(allowed),
        rank=draw(st.integers(0, len(allowed) - 1)),
        samples=draw(st.none() | st.integers(target, 20 * target)),
        optimizer=draw(optimizers),
        lr=draw(st.none() | rates),
        lr_batch=draw(st.none() | st.integers(1, 10**4)),
        lr_rule=draw(st.sampled_from(["auto", "linear", "sqrt", "none"])),
        bn_momentum=draw(st.none() | st.floats(0, 1)),
        batch_norm=draw(st.sampled_from(["pooled", "momentum", "keep"])),
        batch_norm_layers=draw(st.none() | st.integers(0, 3)),
        minimum=minimum,
        multiple_of=draw(multiples),
        tail=draw(tails),
        reasons=draw(st.dictionaries(st.sampled_from(["limit", "note", "tail"]), st.text(max_size=12))),
    )

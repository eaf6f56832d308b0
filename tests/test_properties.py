"""Plans, recipes and weights of any values: what is said of them holds. (Networks: `random_networks`.)"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normconv.numerics import RowLayout, relative_l2, scale_rows, split_weight, true_weight
from normconv.plan import Plan, Recipe, Rule, Step

RUN = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)

names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
values = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), names)
steps = st.builds(
    Step,
    site=names,
    norm=names,
    target=names,
    action=st.sampled_from(["fold", "affine", "frozen", "keep", "drop"]),
    channels=st.integers(0, 4096),
    producers=st.lists(names, max_size=3).map(tuple),
    op=st.sampled_from(["none", "conv2d", "linear"]),
    aliases=st.lists(names, max_size=2).map(tuple),
    shape=st.one_of(st.none(), st.lists(st.integers(0, 64), min_size=2, max_size=5).map(tuple)),
    fidelity=st.sampled_from(["", "exact", "fresh"]),
    phase=st.sampled_from(["eval", "train", "none"]),
    reason=st.text(max_size=12),
    options=st.dictionaries(names, values, max_size=3),
)


@settings(RUN, max_examples=100)
@given(
    st.builds(
        Plan,
        steps=st.lists(steps, max_size=4).map(tuple),
        model=names,
        fingerprint=names,
        capture=names,
        targets=st.lists(names, max_size=3).map(tuple),
        notes=st.lists(st.text(max_size=9), max_size=3).map(tuple),
    )
)
def test_any_plan_survives_json(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan


@RUN
@given(
    st.lists(st.tuples(names, st.sampled_from(["wn", "plain", "keep"])), min_size=1, max_size=5),
    names,
)
def test_the_first_matching_rule_decides(rules: list[tuple[str, str]], site: str) -> None:
    recipe = Recipe(tuple(Rule(to, match=match) for match, to in rules))
    matching = [rule for rule in recipe.rules if rule.matches(site, "conv2d")]
    assert recipe.rule_for(site, "conv2d") == (matching[0] if matching else None)


@RUN
@given(
    st.sampled_from(
        [RowLayout(), RowLayout(transposed=True), RowLayout(transposed=True, groups=2)]
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.lists(st.integers(1, 3), max_size=3),
    st.integers(0, 2**16),
    st.floats(-12, 12),
)
def test_any_weight_splits_exactly(
    layout: RowLayout, first: int, second: int, kernel: list[int], seed: int, exponent: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (first * layout.groups, second, *kernel)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) * 10**exponent
    factor = torch.randn(layout.channels(weight), generator=generator, dtype=torch.float64)
    factor[torch.rand(factor.shape, generator=generator) < 0.2] = 0.0
    weight = scale_rows(
        weight, (torch.rand(factor.shape, generator=generator) > 0.2).double(), layout
    )
    g, v = split_weight(weight, factor, layout)
    back, repaired = true_weight(g, v, layout)
    assert not bool(repaired.any())
    assert relative_l2(back, scale_rows(weight, factor, layout)) <= 1e-14

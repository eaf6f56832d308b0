"""Random small networks from every family: whatever they are, the promises hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normconv.folding import fold
from normconv.graph import is_norm, survey
from normconv.layers import ChannelAffine
from normconv.numerics import RowLayout, relative_l2, scale_rows, split_weight, true_weight
from normconv.plan import Plan, Recipe, Rule, Step
from normconv.proof import evaluate, prove, randomise_norms_
from normconv.surgery import apply_plan, make_plan
from tests.zoo import HandFrozenNorm

FAMILIES = {
    "conv1d": (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, 1),
    "conv2d": (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, 2),
    "conv3d": (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, 3),
    "linear": (nn.Linear, nn.Linear, nn.BatchNorm1d, 0),
}
RUN = settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
SPACES = {0: (), 1: (6,), 2: (5, 4), 3: (3, 4, 3)}


@dataclass(frozen=True)
class Block:
    """What one block is made of."""

    channels: int
    transposed: bool
    grouped: bool
    bias: bool
    norm: str
    act: str
    wiring: str


blocks = st.builds(
    Block,
    channels=st.sampled_from([1, 2, 4, 6]),
    transposed=st.booleans(),
    grouped=st.booleans(),
    bias=st.booleans(),
    norm=st.sampled_from(["bn", "bn", "bn", "no affine", "sync", "frozen", "none"]),
    act=st.sampled_from(["relu", "relu in place", "tanh", "identity", "dropout"]),
    wiring=st.sampled_from(["plain", "plain", "plain", "pre", "residual", "sum", "gate", "twice"]),
)


class Net(nn.Module):
    """Blocks in a row; what each does with its conv and norm is its wiring."""

    def __init__(self, family: str, channels: int, plan: list[Block]) -> None:
        super().__init__()
        conv, transposed, norm, rank = FAMILIES[family]
        self.wirings = [block.wiring for block in plan]
        self.convs, self.norms, self.acts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for block in plan:
            keeps = block.wiring in ("residual", "twice")
            out = channels if keeps else block.channels
            if rank:
                groups = 2 if block.grouped and channels % 2 == 0 and out % 2 == 0 else 1
                kind = transposed if block.transposed else conv
                layer = kind(channels, out, 3, padding=1, groups=groups, bias=block.bias)
            else:
                layer = conv(channels, out, bias=block.bias)
            self.convs.append(layer)
            self.norms.append(
                self._norm(norm, block.norm, channels if block.wiring == "pre" else out)
            )
            self.acts.append(
                {
                    "relu": nn.ReLU(),
                    "relu in place": nn.ReLU(inplace=True),
                    "tanh": nn.Tanh(),
                    "identity": nn.Identity(),
                    "dropout": nn.Dropout(0.3),
                }[block.act]
            )
            channels = out

    @staticmethod
    def _norm(kind: Any, name: str, channels: int) -> nn.Module:
        if name == "none":
            return nn.Identity()
        if name == "sync":
            return nn.SyncBatchNorm(channels)
        if name == "frozen" and kind is nn.BatchNorm2d:
            return HandFrozenNorm(channels)
        return kind(channels, affine=name != "no affine")

    def forward(self, x: Tensor) -> Tensor:
        for wiring, conv, norm, act in zip(
            self.wirings, self.convs, self.norms, self.acts, strict=True
        ):
            if wiring == "pre":
                x = conv(act(norm(x)))
            elif wiring == "residual":
                x = x + act(norm(conv(x)))
            elif wiring == "sum":
                y = conv(x)
                x = act(norm(y + 1))
            elif wiring == "gate":
                y = conv(x)
                x = act(norm(y) * torch.sigmoid(y))
            elif wiring == "twice":
                x = act(norm(conv(act(norm(conv(x))))))
            else:
                x = act(norm(conv(x)))
        return x


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    family = draw(st.sampled_from(list(FAMILIES)))
    channels = draw(st.sampled_from([2, 3, 4]))
    plan = draw(st.lists(blocks, min_size=1, max_size=3))
    if all(block.norm == "none" for block in plan):
        plan[0] = replace(plan[0], norm="bn")
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = Net(family, channels, plan).double()
    x = torch.randn(4, channels, *SPACES[FAMILIES[family][3]], dtype=torch.float64)
    randomise_norms_(model, (x,), seed=draw(st.integers(0, 99)))
    return model.train(draw(st.booleans())), x


@RUN
@given(networks(), st.sampled_from(["wn", "plain", "frozen"]))
def test_conversion_keeps_the_function_and_its_argument(
    net: tuple[nn.Module, Tensor], target: str
) -> None:
    model, x = net
    state = {key: value.clone() for key, value in model.state_dict().items()}
    given_x = x.clone()
    plan = make_plan(model, target, example_inputs=(x,))
    assert Plan.from_json(plan.to_json()) == plan
    result = apply_plan(model, plan).model
    expected, got = evaluate(model, (x,))["output"], evaluate(result, (x,))["output"]
    assert relative_l2(got, expected) <= 1e-11
    assert not any(is_norm(module) for module in result.modules())
    assert result.training is model.training
    assert all(check.passed for check in prove(model, result, plan.steps, (x,)).checks)
    folded = fold(result, example_inputs=(x,)).model
    assert relative_l2(evaluate(folded, (x,))["output"], expected) <= 1e-11
    fresh = apply_plan(copy.deepcopy(model), plan).model
    fresh.load_state_dict(result.state_dict(), strict=True)
    assert torch.equal(x, given_x)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


@RUN
@given(networks())
def test_one_sample_never_sees_another_in_training(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    result = apply_plan(model, make_plan(model, "wn", example_inputs=(x,))).model.train()
    x.requires_grad_()
    result(x)[0].sum().backward()
    assert x.grad is not None
    assert not bool(x.grad[1:].any())


@RUN
@given(networks())
def test_both_captures_agree(net: tuple[nn.Module, Tensor]) -> None:
    model, x = net
    by_fx, by_export = (survey(model, (x,), methods=(method,)) for method in ("fx", "export"))
    assert [(s.name, s.producers, s.op, s.phase, s.shape) for s in by_fx.sites] == [
        (s.name, s.producers, s.op, s.phase, s.shape) for s in by_export.sites
    ]


@RUN
@given(networks(), st.data())
def test_a_moved_parameter_is_seen(net: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    """The proof of a conversion of which one parameter was moved by 1 % of its size fails."""
    model, x = net
    plan = make_plan(model, "wn", example_inputs=(x,))
    result = apply_plan(model, plan).model
    step = data.draw(st.sampled_from(plan.steps))
    places = step.producers or (step.site,)
    layer = result.get_submodule(data.draw(st.sampled_from(places)))
    parameter = layer.scale if isinstance(layer, ChannelAffine) else layer.weight_g
    if not bool((parameter.abs() > 1e-6).any()):
        return
    with torch.no_grad():
        parameter.mul_(1.01)
    # A site whose input is zero everywhere cannot be seen through its gain, by anybody.
    shift = layer.shift if isinstance(layer, ChannelAffine) else layer.bias
    with torch.no_grad():
        shift.add_(0.01)
    assert any(not check.passed for check in prove(model, result, plan.steps, (x,)).checks)


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

"""What lies between a norm and a layer: obstacles are told, and wrong spans do not pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn

import normconv as nc
from normconv.errors import PlanError
from normconv.graph import capture, survey
from normconv.graph.chains import Chain, Chains
from normconv.graph.passes import PlainPass, WeightNormPass
from normconv.proof import evaluate, prove, randomise_norms_
from normconv.surgery import apply_plan, make_plan
from tests.zoo import ZOO

OBSTACLES = {
    "after_padded_avg_pool": "mixes channels or adds values of its own",
    "after_channel_mean": "mixes channels or adds values of its own",
    "channel_shuffle_between": "no plain range",
    "flatten_between": "is several channels of the norm",
    "half_of_a_conv": "also used by getitem",
    "dropout_between": "follows drop (Dropout)",
    "functional_dropout_between": "follows dropout",
    "clamp_between": "follows clamp",
    "concat_with_input": "follows the model's input",
    "concat_reused": "also used by sum",
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacles_before(name: str) -> None:
    args, kwargs = ZOO[name].inputs()
    (site,) = survey(ZOO[name].build(), args, kwargs, methods=("fx",)).sites
    assert OBSTACLES[name] in site.obstacle


@pytest.mark.parametrize(
    ("name", "obstacle"),
    [
        ("forward_dropout", "is followed by drop (Dropout)"),
        ("forward_other_reader", "is followed by sigmoid"),
        ("forward_joined", "joins its output"),
    ],
)
def test_obstacles_after(name: str, obstacle: str) -> None:
    case = ZOO[name]
    model = case.build().eval()
    args, kwargs = case.inputs()
    graph = capture(model, args, kwargs)
    (call,) = graph.calls_of["bn"]
    found = Chains(model, graph).after(call, model.bn.num_features)
    assert not isinstance(found, Chain)
    assert obstacle in found


def wrong_spans() -> list[tuple[str, str]]:
    return [
        ("forward_flattened", "16*0:2"),
        ("forward_channels_last", "0:2*16"),
        ("features_to_maps", "9*0:4"),
    ]


@pytest.mark.parametrize(("name", "span"), wrong_spans())
@pytest.mark.parametrize("target", ["wn", "plain"])
def test_a_wrong_span_does_not_pass_the_proof(name: str, span: str, target: str) -> None:
    case = ZOO[name]
    model = case.build()
    args, kwargs = case.inputs()
    randomise_norms_(model, args, kwargs)
    plan = make_plan(model, target, example_inputs=args)
    assert all(
        c.passed for c in prove(model, apply_plan(model, plan).model, plan.steps, args).checks
    )
    edited = replace(plan, steps=(replace(plan.steps[0], spans=(span,)),))
    proof = prove(model, apply_plan(model, edited).model, edited.steps, args)
    failed = [check.name for check in proof.checks if not check.passed]
    assert failed == ["output", "site bn"]


@pytest.mark.parametrize("spans", [("0:2",), ("0:3*16",), ("nonsense",), ("0:2*16", "0:2*16")])
def test_spans_that_fit_no_layer_are_refused(spans: tuple[str, ...]) -> None:
    case = ZOO["forward_flattened"]
    model, (args, _) = case.build(), case.inputs()
    plan = make_plan(model, "wn", example_inputs=args)
    edited = replace(plan, steps=(replace(plan.steps[0], spans=spans),))
    with pytest.raises(PlanError):
        apply_plan(model, edited)


@pytest.mark.parametrize("kind", [PlainPass, WeightNormPass])
def test_passes_without_shapes_keep_the_function(kind: type[PlainPass]) -> None:
    # A bare GraphModule carries no shapes: only what needs none is folded, the rest is an affine map.
    net = nn.Sequential(nn.Tanh(), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)).eval()
    x = torch.randn(2, 4, 6, 6)
    randomise_norms_(net, (x,))
    expected = evaluate(net, (x,))["output"]
    gm = kind()(fx.symbolic_trace(net)).graph_module
    torch.testing.assert_close(gm(x), expected, rtol=1e-4, atol=1e-5)


def test_one_conv_between_two_norms_takes_both() -> None:
    case = ZOO["forward_and_back"]
    model, (args, _) = case.build().double(), case.inputs(torch.float64)
    randomise_norms_(model, args)
    result = apply_plan(model, make_plan(model, "wn", example_inputs=args)).model
    assert type(result.conv).__name__ == "WNConv2d"
    assert isinstance(result.bn, nn.Identity)
    assert isinstance(result.bn_out, nn.Identity)


@pytest.mark.parametrize(
    "name", ["forward_and_back", "levit_tokens", "concat_split", "forward_flattened"]
)
def test_graphs_fold_through_views_and_forward(name: str) -> None:
    case = ZOO[name]
    model, (args, _) = case.build(), case.inputs()
    randomise_norms_(model, args)
    result = nc.convert(model, "wn", example_inputs=args, output="graph")
    assert result.report.passed
    called = [n.target for n in result.model.graph.nodes if n.op == "call_module"]
    assert "bn" not in called

"""Which modules are norms, what is in them, and what the captures see."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from normconv.api import to_graph
from normconv.errors import CaptureError, PlanError
from normconv.graph import (
    Names,
    NormState,
    capture,
    is_norm,
    judge,
    norm_state,
    survey,
    trace,
    trailing_of,
)
from normconv.graph.calls import first_shape
from normconv.graph.passes import (
    DropIdentities,
    FrozenPass,
    FunctionalNormsToModules,
    PlainPass,
    WeightNormPass,
)
from normconv.graph.probe import absorbs_affine, is_affine_then_children
from normconv.layers import ChannelAffine, WeightNormed
from normconv.numerics import relative_l2
from normconv.proof import evaluate, randomise_norms_
from tests.zoo import ZOO, CircularConv, ConvRelu, HandFrozenNorm, OddEpsNorm, PlusOne, x

EACH = pytest.mark.parametrize("method", ["fx", "export", "hooks"])


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm1d(2), True),
        (nn.BatchNorm3d(2, affine=False, track_running_stats=False), True),
        (nn.SyncBatchNorm(2), True),
        (nn.LazyBatchNorm1d(), True),
        (nn.InstanceNorm1d(2), False),
        (nn.InstanceNorm1d(2, track_running_stats=True), True),
        (HandFrozenNorm(2), True),
        (nn.LayerNorm(2), False),
        (nn.GroupNorm(1, 2), False),
        (nn.LocalResponseNorm(2), False),
        (nn.RMSNorm(2), False),
        (ChannelAffine(2), False),
        (nn.Linear(2, 2), False),
    ],
)
def test_what_counts_as_a_norm(module: nn.Module, expected: bool) -> None:
    assert is_norm(module) is expected


def test_norm_state_reads_every_family() -> None:
    norm = nn.BatchNorm2d(3, eps=0.5)
    state = norm_state(norm)
    assert isinstance(state, NormState)
    assert (state.channels, state.eps, state.untrained, state.trainable) == (3, 0.5, True, True)
    assert state.mean is norm.running_mean
    frozen = norm_state(HandFrozenNorm(3))
    assert isinstance(frozen, NormState)
    assert not frozen.trainable
    bare = norm_state(nn.BatchNorm2d(3, affine=False))
    assert isinstance(bare, NormState)
    assert bare.bias_trainable is None
    affine = norm_state(ChannelAffine(3))
    assert isinstance(affine, NormState)
    assert affine.eps == 0.0
    assert not norm_state(nn.BatchNorm2d(3).to("meta")).untrained


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda n: n.running_var.fill_(float("inf")), "NaN or infinity"),
        (lambda n: n.running_mean.fill_(float("nan")), "running_mean holds NaN"),
        (lambda n: n.running_var.fill_(-1e-4), "positive"),
        (lambda n: setattr(n, "eps", "1e-5"), "no number `eps`"),
        (lambda n: setattr(n, "weight", nn.Parameter(torch.ones(1))), "weight is not one number"),
        (lambda n: setattr(n, "running_mean", None), "keeps no running statistics"),
    ],
)
def test_norm_state_says_why_it_cannot_read(edit: object, words: str) -> None:
    norm = nn.BatchNorm1d(3)
    edit(norm)
    found = norm_state(norm)
    assert isinstance(found, str)
    assert words in found


def test_norm_state_of_lazy_and_empty_norms() -> None:
    assert norm_state(nn.LazyBatchNorm2d()) == "it is lazy and has no parameters yet"
    assert norm_state(nn.BatchNorm2d(0)) == "it has zero channels"


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_probe_of_a_norm_in_every_rank(rank: int) -> None:
    assert is_affine_then_children(nn.SyncBatchNorm(3), rank) == ""


def test_probe_says_how_a_norm_differs() -> None:
    assert is_affine_then_children(HandFrozenNorm(3), 4) == ""
    assert "differs" in is_affine_then_children(OddEpsNorm(3, eps=1e-2), 4)
    assert "differs" in is_affine_then_children(PlusOne(3), 4)
    assert "could not be probed" in is_affine_then_children(nn.BatchNorm2d(3), 3)
    meta = HandFrozenNorm(3).to("meta")
    assert is_affine_then_children(meta, 4) == ""


def test_probe_touches_neither_values_nor_generator() -> None:
    norm, layer = PlusOne(3), CircularConv(3, 4, 3)
    state = torch.random.get_rng_state()
    before = copy.deepcopy(norm.state_dict())
    is_affine_then_children(norm, 4)
    absorbs_affine(layer, (2, 3, 6, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert norm.training


def test_probe_of_layers() -> None:
    assert absorbs_affine(CircularConv(3, 4, 3), (2, 3, 6, 6)) == ""
    assert absorbs_affine(CircularConv(3, 4, 3, device="meta"), (1, 3, 6, 6)) == ""
    assert "does not scale" in absorbs_affine(ConvRelu(3, 4, 3), (2, 3, 6, 6))
    assert "could not be probed" in absorbs_affine(CircularConv(3, 4, 3), (2, 5, 6, 6))


def test_trailing_modules_in_order() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    assert list(trailing_of(timm_layers.BatchNormAct2d(3))) == ["drop", "act"]
    assert trailing_of(nn.BatchNorm2d(3)) == {}


def test_names_by_identity() -> None:
    shared = nn.Linear(2, 2)
    tied = nn.Linear(2, 2)
    tied.weight = shared.weight
    net = nn.ModuleDict({"b": nn.Sequential(shared), "a": shared, "c": tied})
    names = Names(net)
    assert names.canonical("a") == "b.0"
    assert names.aliases("b.0") == ("a",)
    assert names.owners(shared.weight) == ("b.0", "c")
    assert names.owners(torch.zeros(1)) == ()
    assert names.owner_of_attribute("a.weight") == "b.0"
    assert names.owner_of_attribute("nowhere.weight") is None
    assert names.known("b")
    assert not names.known("d")


def test_first_shape_of_nested_values() -> None:
    assert first_shape([(torch.empty(2, 3),)]) == (2, 3)
    assert first_shape(()) is None
    assert first_shape(3) is None


@EACH
def test_capture_names_calls_users_and_shapes(method: str) -> None:
    model = ZOO["other_user"].build().eval()
    graph = capture(model, ZOO["other_user"].args, methods=(method,))
    assert graph.method == method
    assert list(graph.calls_of) == ["conv", "bn"]
    conv, bn = graph.calls_of["conv"][0], graph.calls_of["bn"][0]
    assert bn.inputs == (conv.index,)
    assert (conv.shape, bn.shape) == ((2, 4, 4, 4), (2, 4, 4, 4))
    assert len(graph.users[conv.index]) == 2
    assert [call.index for call in graph.calls] == list(range(len(graph.calls)))
    assert graph.outside_reads == frozenset()


@EACH
def test_capture_sees_outside_reads_and_functional_norms(method: str) -> None:
    graph = capture(ZOO["reads_norm"].build().eval(), ZOO["reads_norm"].args, methods=(method,))
    assert graph.outside_reads == {"bn"}
    graph = capture(ZOO["functional"].build().eval(), ZOO["functional"].args, methods=(method,))
    assert len(graph.functional_norms) == 1
    graph = capture(ZOO["functional"].build().train(), ZOO["functional"].args, methods=(method,))
    assert graph.functional_norms == ()


def test_capture_falls_back_and_remembers_why() -> None:
    graph = capture(ZOO["control_flow"].build().eval(), ZOO["control_flow"].args)
    assert graph.method == "export"
    assert list(graph.failures) == ["fx"]
    found = survey(ZOO["control_flow"].build(), ZOO["control_flow"].args)
    assert "fx" in found.failures


def test_inputs_that_do_not_fit_are_told_once_with_the_module_and_shapes() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(ZOO["conv2d"].build(), (torch.zeros(2, 5, 6, 6),))
    assert [p.where for p in caught.value.problems] == ["conv (Conv2d)"]
    assert all("(2, 5, 6, 6)" in p.way_out for p in caught.value.problems)


def test_a_survey_computes_nothing() -> None:
    model = ZOO["conv2d"].build().train()
    before = copy.deepcopy(model.state_dict())
    survey(model, ZOO["conv2d"].args)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "method",
    [
        "fx",
        "export",
    ],
)
def test_a_capture_in_training_mode_computes_nothing(method: str) -> None:
    model = ZOO["conv2d"].build().train()
    before = copy.deepcopy(model.state_dict())
    capture(model, ZOO["conv2d"].args, methods=(method,))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_meta_models_are_surveyed() -> None:
    with torch.device("meta"):
        model = ZOO["residual_net"].build()
    found = survey(model, (torch.empty(2, 3, 6, 6, device="meta"),))
    assert [site.producers for site in found.sites] == [
        ("stem.0",),
        ("conv1",),
        ("conv2",),
        ("shortcut.0",),
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("after_input", "the model's input"),
        ("conv_twice", "conv is called 2 times"),
        ("other_user", "the output of conv is also used by"),
        ("returns_feature", "the model's output"),
        ("tied_convs", "shares parameters with"),
        ("linear_3d_square", "3-D"),
        ("hook_on_norm", "hooks"),
        ("parametrized_producer", "fold it first"),
        ("weight_standardized_producer", "does not scale with its weight"),
        ("auxiliary_shares_conv", "also called in the other mode"),
        ("after_relu", "follows 1 (ReLU)"),
    ],
)
def test_obstacles_say_what_stands_in_the_way(name: str, words: str) -> None:
    case = ZOO[name]
    args, kwargs = case.inputs()
    assert any(words in site.obstacle for site in survey(case.build(), args, kwargs).sites)


def test_sites_come_in_call_order_then_train_then_never() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.never, self.aux, self.second, self.first = (nn.BatchNorm2d(3) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(x).relu())
            return self.aux(x) if self.training else x

    sites = survey(Net(), (x(2, 3, 4, 4),)).sites
    assert [site.name for site in sites] == ["first", "second", "aux", "never"]
    assert [site.phase for site in sites] == ["eval", "eval", "train", "none"]


def test_judging_reads_only() -> None:
    model = ZOO["residual_net"].build().eval()
    graph = capture(model, ZOO["residual_net"].args)
    assert judge(model, graph, "eval") == judge(model, graph, "eval")


def test_trace_fixes_untouched_defaults() -> None:
    traced = trace(ZOO["optional_argument"].build().eval(), ZOO["optional_argument"].args)
    assert not any(node.target is torch.mul and len(node.args) == 0 for node in traced.graph.nodes)
    traced(ZOO["optional_argument"].args[0])


# --- passes ---------------------------------------------------------------------------------------

PASSES = {"plain": PlainPass, "wn": WeightNormPass, "frozen": FrozenPass}


def _graph(name: str) -> tuple[fx.GraphModule, tuple]:
    case = ZOO[name]
    args, kwargs = case.inputs()
    model = case.build().eval()
    randomise_norms_(model, args, kwargs)
    if case.after:
        case.after(model)
    return to_graph(model, args, kwargs), args


@pytest.mark.parametrize("target", PASSES)
@pytest.mark.parametrize(
    "name", ["residual_net", "pre_activation", "functional", "shared_norm", "two_names"]
)
def test_passes_keep_the_function_and_do_nothing_twice(name: str, target: str) -> None:
    gm, args = _graph(name)
    expected = evaluate(gm, args, dtype=torch.float64)["output"]
    result = PASSES[target]()(gm)
    assert result.graph_module is gm
    assert result.modified
    assert not any(is_norm(module) for module in gm.modules())
    assert relative_l2(evaluate(gm, args)["output"], expected) <= 2e-6
    code = gm.code
    again = PASSES[target]()(gm)
    assert not again.modified
    assert gm.code == code
    if target == "wn" and name == "residual_net":
        assert sum(isinstance(module, WeightNormed) for module in gm.modules()) == 4
    assert not any(type(module) is nn.Identity for module in gm.modules())


def test_functional_norms_become_modules_over_the_same_tensors() -> None:
    model = ZOO["functional"].build().eval()
    gm = trace(model, ZOO["functional"].args)
    result = FunctionalNormsToModules()(gm)
    assert result.modified
    norm = gm.get_submodule("batch_norm_0")
    assert norm.weight is model.gamma
    assert norm.running_mean.data_ptr() == model.mean.data_ptr()
    assert norm.eps == 1e-3
    assert not FunctionalNormsToModules()(gm).modified


def test_a_functional_norm_over_the_batch_is_left_alone() -> None:
    class Batch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True)

    gm = trace(Batch(), (x(2, 3, 4, 4),))
    assert not FunctionalNormsToModules()(gm).modified
    assert not PlainPass()(gm).modified


def test_passes_refuse_before_they_change() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
    )
    gm = trace(net.eval(), (x(2, 3, 4, 4),))
    before = gm.code
    for kind in PASSES.values():
        with pytest.raises(PlanError, match="running statistics"):
            kind()(gm)
    assert gm.code == before
    assert isinstance(gm.get_submodule("1"), nn.BatchNorm2d)


def test_drop_identities() -> None:
    gm = trace(nn.Sequential(nn.Identity(), nn.ReLU(), nn.Identity()))
    assert DropIdentities()(gm).modified
    assert [node.target for node in gm.graph.nodes if node.op == "call_module"] == ["1"]
    assert not DropIdentities()(gm).modified
    assert torch.equal(gm(torch.tensor([-1.0, 1.0])), torch.tensor([0.0, 1.0]))

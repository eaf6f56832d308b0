"""Folding: torch's two weight norms and ours to plain Parameters, on a copy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from normconv.errors import PlanError
from normconv.folding import fold, rebuild
from normconv.layers import ChannelAffine, Reparametrised, weight_norm_
from normconv.numerics import relative_l2
from normconv.plan import history_of
from normconv.proof import evaluate
from normconv.surgery import apply_plan, make_plan
from tests.zoo import ZOO, legacy_weight_norm

DIMS = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4), (0, 1, -1, -2, None)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3), (2, 3, 6), (0, 1, 2, -2, None)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3), (2, 3, 6, 6), (0, 1, 2, -3, None)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 6), (0, 1, None)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=2), (2, 4, 5, 5), (0, 1)),
}
CASES = [(kind, dim) for kind, (_, _, dims) in DIMS.items() for dim in dims]


def old(layer: nn.Module, **options: Any) -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, **options)


APIS: dict[str, Callable[..., nn.Module]] = {
    "hook": old,
    "parametrization": parametrizations.weight_norm,
}
both = pytest.mark.parametrize("api", APIS)


@both
@pytest.mark.parametrize(("kind", "dim"), CASES)
def test_every_dim_folds_to_what_torch_computes(api: str, kind: str, dim: int | None) -> None:
    make, shape, _ = DIMS[kind]
    net = nn.Sequential(APIS[api](make().double(), dim=dim))
    x = torch.randn(shape).double()
    expected = net(x)
    folded, report = fold(net)
    assert type(folded[0]) is type(make())
    assert isinstance(folded[0].weight, nn.Parameter)
    assert list(folded[0]._parameters) == ["weight", "bias"]
    assert not parametrize.is_parametrized(folded)
    assert len(folded[0]._forward_pre_hooks) == 0
    assert relative_l2(folded(x), expected) <= 1e-14
    assert sum(report.facts["folded"].values()) == 1
    assert report.facts["left"] == 0


@both
@pytest.mark.parametrize("grad", [True, False])
def test_fold_leaves_its_argument_alone(api: str, grad: bool) -> None:
    net = nn.Sequential(APIS[api](nn.Linear(3, 2)))
    x = torch.randn(2, 3)
    expected = net(x)
    with torch.set_grad_enabled(grad):
        fold(net)
    assert torch.equal(net(x), expected)


@both
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_weight_is_a_parameter_that_trains_as_before(api: str, grad: bool, frozen: bool) -> None:
    """torch leaves a buffer there on frozen models and under no_grad."""
    net = nn.Sequential(APIS[api](nn.Linear(3, 2))).requires_grad_(not frozen)
    with torch.set_grad_enabled(grad):
        folded = fold(net).model
    weight = dict(folded.named_parameters())["0.weight"]
    assert weight.requires_grad is not frozen
    assert weight.is_leaf
    assert not list(folded.buffers())


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_is_rounded_once_and_layout_kept(api: str, dtype: torch.dtype) -> None:
    net = nn.Sequential(APIS[api](nn.Conv2d(3, 4, 3)))
    net = net.to(memory_format=torch.channels_last).to(dtype)
    state = dict(net.state_dict())
    g, v = (
        state[key] for key in sorted(state, key=lambda k: state[k].numel()) if state[key].dim() == 4
    )
    exact = g.double() * v.double() / v.double().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    weight = fold(net).model[0].weight
    assert weight.dtype == dtype
    assert relative_l2(weight, exact) <= torch.finfo(dtype).eps
    assert (weight.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() / 2
    assert weight.is_contiguous(memory_format=torch.channels_last)


@both
def test_zero_rows_become_zero_and_are_listed(api: str) -> None:
    net = nn.Sequential(APIS[api](nn.Linear(3, 4)))
    with torch.no_grad():
        for key, tensor in net.state_dict().items():
            if key.endswith(("_v", "original1")):
                tensor[[0, 2]] = 0
    assert bool(torch.isnan(net(torch.ones(1, 3))).any())
    model, report = fold(net)
    assert not bool(model[0].weight[[0, 2]].any())
    assert bool(model[0].weight[[1, 3]].all())
    assert report.sites[0].reason == "2 rows without direction became 0"
    assert report.notes == ("0: 2 rows without direction became 0",)


@both
def test_folding_twice_is_folding_once_and_pickles(api: str) -> None:
    net = nn.Sequential(APIS[api](nn.Conv1d(2, 3, 3)), nn.ReLU(), weight_norm_(nn.Conv1d(3, 2, 1)))
    x = torch.randn(1, 2, 5)
    once, report = fold(net)
    again, second = fold(once)
    assert dict(second.facts["folded"]) == {}
    assert len(report.sites) == 2
    assert all(
        torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters(), strict=True)
    )
    twin = pickle.loads(pickle.dumps(once))
    assert torch.equal(twin(x), once(x))
    assert relative_l2(once(x), net(x)) <= 1e-6


@pytest.mark.parametrize("api", [pytest.param("hook"), pytest.param("parametrization")])
def test_a_folded_model_still_trains_and_loads_its_own_state(api: str) -> None:
    folded = fold(nn.Sequential(APIS[api](nn.Linear(3, 2)))).model
    folded(torch.randn(2, 3)).sum().backward()
    assert folded[0].weight.grad is not None
    fresh = nn.Sequential(nn.Linear(3, 2))
    fresh.load_state_dict(folded.state_dict(), strict=True)
    folded.load_state_dict(fresh.state_dict(), strict=True)
    copy.deepcopy(folded)


@both
def test_another_tensor_name_is_folded_under_its_name(api: str) -> None:
    layer = nn.GRUCell(3, 4)
    layer = APIS[api](layer, name="weight_hh")
    net, x = nn.ModuleList([layer]), torch.randn(2, 3)
    expected = net[0](x)
    folded = fold(net).model
    assert sorted(folded[0]._parameters) == ["bias_hh", "bias_ih", "weight_hh", "weight_ih"]
    assert relative_l2(folded[0](x), expected) <= 1e-6


@pytest.mark.parametrize("where", ["LSTM", "GRU"])
def test_recurrent_layers_under_the_older_api(where: str) -> None:
    layer = getattr(nn, where)(3, 4)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        layer = old(layer, name=name)
    net, x = nn.Sequential(layer), torch.randn(5, 2, 3)
    expected = net(x)[0]
    folded = fold(net).model
    assert relative_l2(folded(x)[0], expected) <= 1e-6
    assert {name for name, _ in folded.named_parameters()} == {
        f"0.{name}" for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    }


def test_stale_hooked_weights_do_not_count() -> None:
    """After `load_state_dict` the attribute is of the last forward; g and v are what counts."""
    layer = legacy_weight_norm(nn.Linear(3, 2))
    layer(torch.ones(1, 3))
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})
    folded = fold(nn.Sequential(layer)).model
    assert torch.equal(folded[0].weight, fold(nn.Sequential(layer)).model[0].weight)
    x = torch.randn(1, 3)
    assert relative_l2(folded(x), layer(x)) <= 1e-6


def test_shared_modules_are_folded_once_and_stay_shared() -> None:
    layer = weight_norm_(nn.Linear(3, 3))
    net = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    model, report = fold(net)
    assert model["a"] is model["b"][0]
    assert len(report.sites) == 1


def test_tied_g_and_v_stay_tied_after_folding() -> None:
    first, second = weight_norm_(nn.Linear(3, 3)), weight_norm_(nn.Linear(3, 3))
    second.weight_g, second.weight_v = first.weight_g, first.weight_v
    model = fold(nn.Sequential(first, second)).model
    assert torch.equal(model[0].weight, model[1].weight)
    assert model[0].weight is model[1].weight


def test_root_layers_fold_too() -> None:
    assert type(fold(weight_norm_(nn.Linear(2, 2))).model) is nn.Linear
    assert type(fold(legacy_weight_norm(nn.Linear(2, 2))).model) is nn.Linear


def test_meta_models_fold() -> None:
    model = fold(nn.Sequential(weight_norm_(nn.Conv2d(2, 3, 3, device="meta")))).model
    assert model[0].weight.is_meta


def test_a_plain_model_is_unchanged() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model, report = fold(net)
    assert report.sites == ()
    assert history_of(model) == []
    assert list(model.state_dict()) == list(net.state_dict())


def test_affine_maps_fold_only_with_inputs_and_only_where_exact() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), ChannelAffine(4), nn.ReLU(), ChannelAffine(4)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    x = torch.randn(2, 3, 5, 5).double()
    assert isinstance(fold(net).model[1], ChannelAffine)
    model, report = fold(net, example_inputs=(x,))
    assert type(model[1]) is nn.Identity
    assert isinstance(model[3], ChannelAffine)
    assert dict(report.facts["folded"]) == {"channel affine": 1}
    assert relative_l2(model(x), net(x)) <= 1e-14


def test_history_of_several_conversions_rebuilds() -> None:
    case = ZOO["residual_net"]
    args, _ = case.inputs()
    model = case.build()
    first = apply_plan(
        model, make_plan(model, "frozen", example_inputs=args, include=["stem.*"])
    ).model
    second = apply_plan(first, make_plan(first, "wn", example_inputs=args)).model
    folded = fold(second, example_inputs=args).model
    assert [next(iter(entry)) for entry in history_of(folded)] == ["apply", "apply", "fold"]
    assert not any(isinstance(m, (Reparametrised, ChannelAffine)) for m in folded.modules())
    fresh = rebuild(case.build(seed=5), history_of(folded))
    assert history_of(fresh) == history_of(folded)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    expected, got = evaluate(folded, args), evaluate(fresh, args)
    assert torch.equal(got["output"], expected["output"])
    with pytest.raises(PlanError):
        rebuild(ZOO["conv2d"].build(), history_of(folded))

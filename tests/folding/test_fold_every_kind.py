"""Folding every other reparametrisation: spectral, orthogonal, pruned, stacked, unknown."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import normconv as nc
from normconv.layers import copy_model, weight_norm_
from normconv.numerics import relative_l2


def quiet(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """torch's older functions warn that there are newer ones."""

    def call(*args: Any, **kwargs: Any) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return function(*args, **kwargs)

    return call


old_weight_norm, old_spectral_norm = quiet(nn.utils.weight_norm), quiet(nn.utils.spectral_norm)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


class WeightStandardizer(nn.Module):
    """As Composer registers it: biased variance, an eps under the root."""

    def forward(self, weight: Tensor) -> Tensor:
        axes = list(range(1, weight.dim()))
        variance, mean = torch.var_mean(weight, dim=axes, keepdim=True, correction=0)
        return (weight - mean) / (variance + 1e-5).sqrt()


class Scaled(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size, 1) + 0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def orthogonal(kind: str) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: parametrizations.orthogonal(layer, orthogonal_map=kind)


def pruned(layer: nn.Module) -> nn.Module:
    prune.random_unstructured(layer, "weight", 0.3)
    return prune.l1_unstructured(layer, "weight", 0.3)


def pruned_direction(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(old_weight_norm(layer), "weight_v", 0.3)


def under(*parts: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def put(layer: nn.Module) -> nn.Module:
        for part in parts:
            parametrize.register_parametrization(layer, "weight", part())
        return layer

    return put


KINDS: dict[str, tuple[Callable[[nn.Module], nn.Module], dict[str, int]]] = {
    "old spectral norm": (old_spectral_norm, {"torch spectral_norm (hook)": 1}),
    "spectral norm": (
        parametrizations.spectral_norm, {"torch spectral_norm (parametrization)": 1}
    ),
    "matrix_exp": (orthogonal("matrix_exp"), {"torch orthogonal (parametrization)": 1}),
    "cayley": (orthogonal("cayley"), {"torch orthogonal (parametrization)": 1}),
    "householder": (orthogonal("householder"), {"torch orthogonal (parametrization)": 1}),
    "pruned": (pruned, {"torch pruning (hook)": 1}),
    "a user's": (under(Halved), {"Halved (parametrization)": 1}),
    "Composer's": (under(WeightStandardizer), {"WeightStandardizer (parametrization)": 1}),
    "two": (under(Halved, lambda: Scaled(6)), {"Halved + Scaled (parametrization)": 1}),
    "spectral on weight norm": (
        lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
        {"torch weight_norm + torch spectral_norm (parametrization)": 1},
    ),
    "weight norm on old spectral": (
        lambda layer: parametrizations.weight_norm(old_spectral_norm(layer), "weight_orig"),
        {"torch weight_norm (parametrization)": 1, "torch spectral_norm (hook)": 1},
    ),
    "old weight norm on old spectral": (
        lambda layer: old_weight_norm(old_spectral_norm(layer), "weight_orig"),
        {"torch weight_norm (hook)": 1, "torch spectral_norm (hook)": 1},
    ),
    "pruned direction": (
        pruned_direction, {"torch pruning (hook)": 1, "torch weight_norm (hook)": 1}
    ),
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", KINDS)


def wide_twin(net: nn.Module) -> nn.Module:
    """A float64 copy in eval mode, run until hooks upon hooks have caught up: they lag by one call."""
    twin = copy_model(net).double().eval()
    for module in twin.modules():
        stale = {n: v.double() for n, v in vars(module).items() if isinstance(v, Tensor)}
        vars(module).update(stale)
    for _ in range(2):
        twin(torch.randn(1, 5).double())
    return twin


def net_under(kind: str) -> nn.Module:
    """A layer that has run in training mode, so that hooks and vectors have moved."""
    net = nn.Sequential(KINDS[kind][0](nn.Linear(5, 6)), nn.ReLU())
    for _ in range(3):
        net(torch.randn(2, 5))
    return net


@every_kind
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_folds_to_its_eval_value(kind: str, frozen: bool, training: bool) -> None:
    net, x = net_under(kind).requires_grad_(not frozen), torch.randn(3, 5)
    expected = wide_twin(net)(x.double())
    net.train(training)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for sharing in (True, False):
        with torch.no_grad():
            folded, report = nc.fold(net, share_tensors=sharing)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    layer = folded[0]
    assert type(layer) is nn.Linear
    assert list(layer._parameters) == ["weight", "bias"]
    assert not layer._forward_pre_hooks
    assert not list(layer.buffers())
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad is not frozen
    assert report.facts == {"folded": KINDS[kind][1], "left": 0}
    assert relative_l2(folded.eval()(x), expected) <= 1e-6
    again = nc.fold(folded).report
    assert again.facts == {"folded": {}, "left": 0}
    torch.save(folded, buffer := io.BytesIO())
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(x), folded(x))
    loaded.load_state_dict(nn.Sequential(nn.Linear(5, 6)).state_dict(), strict=True)


@every_kind
def test_a_weight_is_its_float64_value_rounded_once(kind: str) -> None:
    net = net_under(kind).eval()
    weight = wide_twin(net)[0].weight
    assert torch.equal(nc.fold(net).model[0].weight, weight.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_kind
def test_half_precision_folds_in_float64(kind: str, dtype: torch.dtype) -> None:
    net = net_under(kind).to(dtype)
    exact = wide_twin(net)[0].weight
    weight = nc.fold(net).model[0].weight
    assert weight.dtype == dtype
    assert relative_l2(weight, exact) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("make", [old_spectral_norm, parametrizations.spectral_norm])
def test_layout_and_transposed_dimension(make: Callable[..., nn.Module]) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3)
    net = nn.Sequential(make(layer, dim=1)).eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 5, 5)
    expected = net(x)
    folded = nc.fold(net).model
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert relative_l2(folded(x), expected) <= 1e-6


@pytest.mark.parametrize("make", [old_spectral_norm, parametrizations.spectral_norm])
def test_a_weight_of_zeros_is_repaired(make: Callable[..., nn.Module]) -> None:
    net = nn.Sequential(make(nn.Linear(3, 4))).eval()
    with torch.no_grad():
        next(p for p in net.parameters() if p.dim() == 2).zero_()
    assert bool(net(torch.ones(1, 3)).isnan().any())
    folded, report = nc.fold(net)
    assert not bool(folded[0].weight.any())
    assert report.notes == ("0: a weight of spectral norm 0 became 0",)


def test_what_trains_a_parametrization_makes_its_weight_trainable() -> None:
    layer = under(lambda: Scaled(2))(nn.Linear(3, 2))
    layer.parametrizations.weight.original.requires_grad_(False)
    assert nc.fold(layer).model.weight.requires_grad
    layer.requires_grad_(False)
    assert not nc.fold(layer).model.weight.requires_grad


def test_a_parametrized_buffer_stays_a_buffer() -> None:
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "running_mean", Halved())
    with torch.no_grad():
        layer.parametrizations.running_mean.original.fill_(4.0)
    folded = nc.fold(layer).model
    assert torch.equal(dict(folded.named_buffers())["running_mean"], torch.full((3,), 2.0))
    assert type(folded) is nn.BatchNorm1d


@every_kind
def test_modules_with_several_names_and_shared_tensors_stay_tied(kind: str) -> None:
    layer = net_under(kind)[0]
    folded, report = nc.fold(nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)}))
    assert folded["a"] is folded["b"][0]
    assert sum(report.facts["folded"].values()) == sum(KINDS[kind][1].values())


def test_two_layers_over_the_same_g_and_v_share_the_plain_weight() -> None:
    first, second, third = (parametrizations.weight_norm(nn.Linear(3, 3)) for _ in range(3))
    for layer in (second, third):
        layer.parametrizations.weight.original0 = first.parametrizations.weight.original0
        layer.parametrizations.weight.original1 = first.parametrizations.weight.original1
    third.parametrizations.weight[0].dim = 1  # another value from the same tensors
    g = first.parametrizations.weight.original0
    third.parametrizations.weight.original0 = g
    folded = nc.fold(nn.Sequential(first, second)).model
    assert folded[0].weight is folded[1].weight
    hooked = [old_weight_norm(nn.Linear(3, 3)) for _ in range(2)]
    hooked[1].weight_g, hooked[1].weight_v = hooked[0].weight_g, hooked[0].weight_v
    folded = nc.fold(nn.Sequential(*hooked)).model
    assert folded[0].weight is folded[1].weight


@pytest.mark.parametrize("make", [old_weight_norm, parametrizations.weight_norm, weight_norm_])
def test_models_without_storage_fold(make: Callable[..., nn.Module]) -> None:
    folded = nc.fold(nn.Sequential(make(nn.Linear(3, 2, device="meta")))).model
    assert type(folded[0]) is nn.Linear
    assert folded[0].weight.is_meta
    spectral = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 2))).to("meta")
    assert nc.fold(spectral).model[0].weight.is_meta


class ByDtype(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * (2.0 if weight.dtype == torch.float32 else 3.0)


def test_a_formula_that_asks_for_the_dtype_is_that_of_the_model_s() -> None:
    net = nn.Sequential(under(ByDtype)(nn.Linear(3, 2)))
    folded, report = nc.fold(net)
    assert torch.equal(folded[0].weight, net[0].weight)
    assert report.notes == ("0: computed in float32: in float64 it is another weight",)
    assert nc.fold(net.double()).report.notes == ()


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


class Refusing(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            raise RuntimeError("only in training")
        return weight


class Infinite(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 0


@pytest.mark.parametrize(
    ("part", "words"),
    [(Noisy, "changes from call"), (Refusing, "only in training"), (Infinite, "not finite")],
)
def test_parametrizations_without_a_value_are_left_and_named(
    part: type[nn.Module], words: str
) -> None:
    net = nn.Sequential(under(part)(nn.Linear(3, 2)), parametrizations.weight_norm(nn.Linear(2, 2)))
    folded, report = nc.fold(net)
    assert parametrize.is_parametrized(folded[0])
    assert report.facts == {"folded": {"torch weight_norm (parametrization)": 1}, "left": 1}
    assert any(n.startswith("0: ") and part.__name__ in n and words in n for n in report.notes)


def test_compiled_code_is_left_and_named() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each version of torch deprecates it in other words
        traced = torch.jit.trace(nn.Sequential(old_weight_norm(nn.Linear(3, 2))), torch.ones(1, 3))
    net = nn.Sequential(traced, parametrizations.weight_norm(nn.Linear(2, 2)))
    folded, report = nc.fold(net)
    assert report.facts == {"folded": {"torch weight_norm (parametrization)": 1}, "left": 1}
    assert report.notes[-1].startswith("0: is TorchScript")
    assert torch.allclose(folded(torch.ones(1, 3)), net(torch.ones(1, 3)))


def test_one_of_two_parametrized_tensors_can_be_left() -> None:
    layer = parametrizations.weight_norm(nn.LSTMCell(3, 4), "weight_hh")
    parametrize.register_parametrization(layer, "weight_ih", Noisy())
    net = nn.Sequential(layer)
    folded, report = nc.fold(net)
    assert isinstance(folded[0]._parameters["weight_hh"], nn.Parameter)
    assert parametrize.is_parametrized(folded[0], "weight_ih")
    assert parametrize.is_parametrized(net[0], "weight_hh")
    assert report.facts["left"] == 1


def test_weights_of_unknown_hooks_are_left_and_named() -> None:
    def compute(module: Any, _: Any) -> None:
        module.weight = module.weight_raw * 2

    layer: Any = nn.Linear(3, 2)
    layer.register_parameter("weight_raw", nn.Parameter(torch.randn(2, 3)))
    del layer.weight
    layer.register_forward_pre_hook(compute)
    net, x = nn.Sequential(layer), torch.randn(1, 3)
    expected = net(x)
    folded, report = nc.fold(net)
    assert torch.equal(folded(x), expected)
    assert report.facts == {"folded": {}, "left": 1}
    assert "0: its weight is no parameter" in report.notes[0]
    assert "compute" in report.notes[0]

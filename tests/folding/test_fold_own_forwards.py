"""Folding layers whose own forward computes the weight: WS of timm, transformers, and users."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normconv as nc
from normconv.folding.in_forward import fold_forward
from normconv.numerics import relative_l2


class QiaoConv2d(nn.Conv2d):
    """As in the reference code of Qiao et al. 2019."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        weight = weight - weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(
            dim=3, keepdim=True
        )
        std = weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        weight = weight / std.expand_as(weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class MaskedConv1d(nn.Conv1d):
    """A fixed mask, and the hook that `padding_mode` goes through."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).float())

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight * self.mask, bias)


class EqualizedLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        return F.linear(input, self.weight * 0.5, self.bias * 0.01)


class QiaoSubclass(QiaoConv2d):
    pass


OWN = {
    "qiao": (lambda: QiaoConv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 9), nn.Conv2d),
    "subclass": (lambda: QiaoSubclass(4, 6, 3, dilation=2), (2, 4, 9, 9), nn.Conv2d),
    "masked": (
        lambda: MaskedConv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 8), nn.Conv1d
    ),
    "equalized": (lambda: EqualizedLinear(4, 3), (2, 4), nn.Linear),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("frozen", [True, False])
def test_a_forward_that_computes_the_weight_is_folded(name: str, frozen: bool) -> None:
    make, shape, plain = OWN[name]
    net, x = nn.Sequential(make()).requires_grad_(not frozen), torch.randn(shape)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    folded, report = nc.fold(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    layer = folded[0]
    assert type(layer) is plain
    assert list(layer._parameters) == ["weight", "bias"]
    assert not list(layer.buffers())
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.requires_grad is not frozen
    assert layer.bias.requires_grad is not frozen
    assert relative_l2(folded(x), copy.deepcopy(net).double()(x.double())) <= 1e-6
    assert report.facts == {"folded": {f"{type(make()).__name__} (forward)": 1}, "left": 0}
    assert nc.fold(folded).report.facts == {"folded": {}, "left": 0}
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), folded(x))


def test_the_weight_is_the_float64_value_rounded_once() -> None:
    net = nn.Sequential(QiaoConv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        exact = net.to(dtype)[0].weight.detach().double()
        exact = exact - exact.mean((1, 2, 3), keepdim=True)
        exact = exact / (exact.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)
        weight = nc.fold(net).model[0].weight
        assert weight.dtype == dtype
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert relative_l2(weight, exact) <= torch.finfo(dtype).eps


class ByDtypeConv2d(nn.Conv2d):
    """The form of many diffusion models: its eps depends on the dtype of what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        eps = 1e-5 if x.dtype == torch.float32 else 1e-3
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) * (var + eps).rsqrt()
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_formula_that_asks_for_the_dtype_is_that_of_the_model_s(dtype: torch.dtype) -> None:
    net = nn.Sequential(ByDtypeConv2d(4, 6, 3)).to(dtype)
    eps = 1e-5 if dtype == torch.float32 else 1e-3
    exact = net[0].weight.detach().double()
    var, mean = torch.var_mean(exact, (1, 2, 3), keepdim=True, unbiased=False)
    folded, report = nc.fold(net)
    assert relative_l2(folded[0].weight, (exact - mean) * (var + eps).rsqrt()) <= (
        4 * torch.finfo(dtype).eps
    )
    said = ("0: computed in float32: in float64 it is another weight",)
    assert report.notes == (said if dtype == torch.float32 else ())
    assert folded[0].weight.dtype == dtype


class DividingConv(nn.ConvTranspose1d):
    """No eps: a filter without direction is 0 / 0."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        centred = self.weight - self.weight.mean((0, 2), keepdim=True)
        weight = centred / centred.norm(dim=(0, 2), keepdim=True)
        return F.conv_transpose1d(x, weight, self.bias)


def test_filters_without_direction_become_zero_and_are_listed() -> None:
    net, x = nn.Sequential(DividingConv(4, 5, 3)), torch.randn(2, 4, 6)
    with torch.no_grad():
        net[0].weight[:, 1::2] = 0.0
        expected = net(x)
    folded, report = nc.fold(net)
    assert bool(expected[:, 1].isnan().all())
    assert report.notes == ("0: 2 rows without direction became 0",)
    assert not bool(folded[0].weight[:, 1::2].any())
    assert torch.allclose(folded(x)[:, ::2], expected[:, ::2], atol=1e-6)
    assert torch.allclose(folded(x)[:, 1], folded[0].bias[1])


class CausalConv1d(nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (2, 0)))


class CastLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype).clone(), self.bias)


class DynamicLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * input.mean(), self.bias)


class TwoInputs(nn.Linear):
    def forward(self, input: Tensor, style: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(input, self.weight * style, self.bias)


@pytest.mark.parametrize(
    "layer",
    [CausalConv1d(2, 3, 3), CastLinear(3, 3), DynamicLinear(3, 3), TwoInputs(3, 3)],
    ids=lambda layer: type(layer).__name__,
)
def test_what_is_no_function_of_parameters_alone_is_not_touched(layer: nn.Module) -> None:
    folded, report = nc.fold(nn.Sequential(layer))
    assert type(folded[0]) is type(layer)
    assert report.facts == {"folded": {}, "left": 0}


class PaddedWS(QiaoConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class DriftingLinear(nn.Linear):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return F.linear(input, self.weight / self.calls, self.bias)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (PaddedWS(2, 3, 3), "does more than its operator"),
        (DriftingLinear(2, 3), "changes from call"),
        (DividingConv(1, 3, 1), "is NaN"),  # one element less its mean has no direction ever
    ],
    ids=["padded", "drifting", "nan"],
)
def test_a_computed_weight_without_a_plain_layer_is_left_and_named(
    layer: nn.Module, words: str
) -> None:
    folded, report = nc.fold(nn.Sequential(layer))
    assert type(folded[0]) is type(layer)
    assert report.facts["left"] == 1
    assert report.notes[0].startswith("0: ")
    assert words in report.notes[0]
    assert all(int(b) == 1 for b in layer.buffers())


@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize(
    "name", ["StdConv2d", "ScaledStdConv2d", "StdConv2dSame", "ScaledStdConv2dSame"]
)
def test_timm_layers(name: str, size: int) -> None:
    layers = pytest.importorskip("timm.layers")
    kind: Any = getattr(layers, name)
    net = nn.Sequential(kind(3, 4, 3, stride=2), kind(4, 6, 3, groups=2), kind(6, 4, 4, stride=3))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, size, size)
    folded, report = nc.fold(net)
    same = layers.Conv2dSame if name.endswith("Same") else nn.Conv2d
    assert type(folded[0]) is same
    assert {type(layer) for layer in folded} <= {nn.Conv2d, layers.Conv2dSame}
    assert report.facts == {"folded": {f"{name} (forward)": 3}, "left": 0}
    assert relative_l2(folded(x), copy.deepcopy(net).double()(x.double())) <= 1e-6
    assert {n.rpartition(".")[2] for n, _ in folded.named_parameters()} <= {"weight", "bias"}
    structure = nc.fold(copy.deepcopy(net).to("meta")).model
    assert [type(layer) for layer in structure] == [type(layer) for layer in folded]
    structure.load_state_dict(folded.state_dict(), strict=True, assign=True)
    assert torch.equal(structure(x), folded(x))


@pytest.mark.parametrize("padding", [None, "same"])
def test_transformers_convolutions(padding: str | None) -> None:
    bit = pytest.importorskip("transformers.models.bit.modeling_bit")
    conv = bit.WeightStandardizedConv2d(3, 4, 3, stride=2, padding=padding, eps=1e-8)
    net, x = nn.Sequential(conv, nn.ReLU()), torch.randn(2, 3, 15, 16)
    folded, report = nc.fold(net)
    assert report.facts["folded"] == {"WeightStandardizedConv2d (forward)": 1}
    if padding is None:
        assert type(folded[0]) is nn.Conv2d
    else:  # the padding depends on the input's size
        assert [type(part) for part in folded[0]][1:] == [nn.Conv2d]
        assert [name for name, _ in folded.named_parameters()] == ["0.conv.weight"]
    assert relative_l2(folded(x), copy.deepcopy(net).double()(x.double())) <= 1e-6
    both = nc.fold(nn.ModuleDict({"a": net, "b": net})).model
    assert both["a"][0] is both["b"][0]


class Counting(nn.Sequential):
    """A model whose layers hold hooks that hold the model."""

    copies = 0

    def listen(self) -> None:
        for layer in self:
            layer.register_forward_hook(self.heard)

    def heard(self, *_: Any) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> Counting:
        Counting.copies += 1
        twin = Counting(*(copy.deepcopy(layer, memo) for layer in self))
        memo[id(self)] = twin
        return twin


def test_a_layer_is_run_without_its_hooks() -> None:
    net = Counting(QiaoConv2d(2, 2, 3))
    net.listen()
    handles = len(net[0]._forward_hooks)
    before = Counting.copies
    layer, outcome = fold_forward(net[0], {}, replaceable=True)
    assert type(layer) is nn.Conv2d
    assert outcome is not None
    assert len(layer._forward_hooks) == handles == 1
    assert Counting.copies == before


def test_tied_weights_stay_tied_and_hooks_stay() -> None:
    first, second = QiaoConv2d(2, 2, 3), QiaoConv2d(2, 2, 3, bias=False)
    second.weight = first.weight
    calls: list[int] = []
    first.register_forward_hook(lambda *_: calls.append(1))
    folded = nc.fold(nn.Sequential(first, second)).model
    assert calls == []
    assert folded[0].weight is folded[1].weight
    folded(torch.randn(1, 2, 9, 9))
    assert calls == [1]


class Bounded(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.clamp(-6, 6), 2 * self.weight, self.bias)


class ByHand(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ nn.functional.normalize(self.weight).t()


class TwoWeights(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, 2 * self.weight) + nn.functional.linear(x, -self.weight)


@pytest.mark.parametrize("kind", [Bounded, ByHand, TwoWeights])
def test_more_than_an_operator_is_left_and_counted(kind: type[nn.Linear]) -> None:
    net, x = nn.Sequential(kind(3, 2)), 100 * torch.randn(4, 3)
    model, report = nc.fold(net)
    assert (report.facts["folded"], report.facts["left"]) == ({}, 1)
    assert kind.__name__ in report.notes[0]
    assert torch.equal(model(x), net(x))

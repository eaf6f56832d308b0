"""Weight-standardized layers: class, function, pickles, compilation, folding."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import fx, nn

from normconv.errors import UsageError
from normconv.layers import (
    MeanOnlyBatchNorm,
    Reparametrised,
    WeightStandardized,
    absorb_affine_,
    fold_layer_,
    kind_of,
    layout_of,
    mean_share,
    on_each_class,
    unfit_for_weight_standardization,
    weight_norm_,
    weight_standardize_,
)
from normconv.layers.reparametrised import rebuild_layer
from normconv.numerics import DIALECTS, Affine, mean_shares, relative_l2
from tests.layers.test_reparametrised_layers import LAYERS, OwnState

every_layer = pytest.mark.parametrize("kind", LAYERS)
every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


def center_(layer: nn.Module) -> nn.Module:
    """Take the mean of every filter away, by index."""
    layout, weight = layout_of(layer), layer.weight
    with torch.no_grad():
        if not layout.transposed:
            weight -= weight.flatten(1).mean(1).reshape(-1, *(1,) * (weight.dim() - 1))
            return layer
        ins = weight.shape[0] // layout.groups
        for group in range(layout.groups):
            for out in range(weight.shape[1]):
                weight[group * ins : (group + 1) * ins, out] -= weight[
                    group * ins : (group + 1) * ins, out
                ].mean()
    return layer


@every_dialect
@every_layer
def test_centered_layers_compute_what_they_did(kind: str, dialect: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = center_(make().double()), torch.randn(shape).double()
    plain_class, weight, expected = type(layer), layer.weight, layer(x)
    had, attributes = list(layer._parameters), set(vars(layer))
    assert weight_standardize_(layer, dialect=dialect) is layer
    assert isinstance(layer, plain_class)
    assert isinstance(layer, WeightStandardized)
    assert isinstance(layer, Reparametrised)
    assert type(layer).__name__ == f"WS{plain_class.__name__}"
    assert kind_of(layer) == kind
    assert layer.weight_v is weight
    assert list(layer._parameters) == ["weight_gain", "weight_v", *had[1:]]
    assert layer.weight_gain.numel() == expected.shape[-1 if kind == "linear" else 1]
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()]
    assert f"dialect={dialect}" in repr(layer)
    assert relative_l2(layer(x), expected) <= 1e-14
    assert not bool(fold_layer_(layer).any())
    assert type(layer) is plain_class
    assert list(layer._parameters) == had
    assert set(vars(layer)) == attributes
    assert relative_l2(layer(x), expected) <= 1e-14


@every_layer
def test_other_layers_lose_the_mean_that_is_told(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape).double()
    before = layer.weight.detach().clone()
    expected = center_(copy.deepcopy(layer))(x)
    share = mean_share(layer)
    weight_standardize_(layer)
    assert relative_l2(layer(x), expected) <= 1e-14
    assert torch.equal(mean_share(layer), share)
    assert torch.equal(mean_shares(before, layout_of(layer)), share)
    lost = (before - layer.weight).square().sum() / before.square().sum()
    assert 0 < lost <= share.max() ** 2 * (1 + 1e-12)


def test_what_cannot_be_standardized_says_why() -> None:
    for layer in (
        nn.Linear(1, 3),
        nn.Conv2d(4, 4, 1, groups=4),
        nn.ConvTranspose1d(2, 4, 1, groups=2),
    ):
        before = type(layer)
        with pytest.raises(UsageError, match="one element each: without its mean a filter is 0"):
            weight_standardize_(layer)
        assert type(layer) is before
    for layer in (nn.ReLU(), weight_norm_(nn.Linear(2, 2)), weight_standardize_(nn.Linear(2, 2))):
        with pytest.raises(UsageError, match=r"weight standardization needs .* a plain weight"):
            weight_standardize_(layer)
    layer = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="is no weight standardization"):
        weight_standardize_(layer, dialect="mine")
    assert type(layer) is nn.Linear
    with pytest.raises(UsageError, match="plain weight"):
        mean_share(nn.ReLU())
    assert "plain weight" in unfit_for_weight_standardization(nn.ReLU())
    assert unfit_for_weight_standardization(nn.Linear(2, 2)) == ""


def test_a_row_of_one_in_a_transposed_layer_is_seen_by_its_row() -> None:
    """Two inputs feed each output: the first axis of the weight is not the row."""
    weight_standardize_(nn.ConvTranspose1d(2, 3, 1))


@every_dialect
def test_pickle_deepcopy_and_state_dict(dialect: str) -> None:
    layer = weight_standardize_(OwnState("mine"), dialect=dialect)
    nn.init.normal_(layer.weight_gain)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(twin) is type(layer)
        assert (twin.tag, twin.restored, twin.dialect) == ("mine", True, dialect)
        assert torch.equal(twin.weight, layer.weight)
    fresh = weight_standardize_(OwnState("other"), dialect=dialect)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(fresh.weight, layer.weight)
    again = rebuild_layer("ws", nn.Conv2d, weight_standardize_(nn.Conv2d(2, 3, 1)).__dict__)
    assert type(again).__name__ == "WSConv2d"


def test_trainability_is_inherited_both_ways() -> None:
    layer = weight_standardize_(nn.Linear(3, 2).requires_grad_(False))
    assert not layer.weight_gain.requires_grad
    assert not layer.weight_v.requires_grad
    assert not layer.weight.requires_grad
    layer.weight_gain.requires_grad_(True)
    fold_layer_(layer)
    assert layer.weight.requires_grad


def test_dtypes_devices_and_memory_formats() -> None:
    layer = weight_standardize_(nn.Conv2d(2, 3, 3)).to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert layer.to(dtype).weight.dtype == dtype
    meta = weight_standardize_(nn.Linear(2, 2, device="meta"), dialect="qiao")
    assert meta.weight.is_meta
    fold_layer_(meta)
    assert meta.weight.is_meta


@every_dialect
@pytest.mark.parametrize("kind", ["conv2d", "conv_transpose2d", "linear"])
def test_compiles_into_one_graph(kind: str, dialect: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = weight_standardize_(make(), dialect=dialect), torch.randn(shape)
    torch._dynamo.reset()  # it compiles one function for all layers, eight times at most
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    torch.testing.assert_close(out, layer(x))
    out.sum().backward()
    assert bool(torch.isfinite(layer.weight_v.grad).all())


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 about itself
def test_an_exported_program_can_be_saved() -> None:
    model = nn.Sequential(weight_standardize_(nn.Conv2d(2, 3, 3)), nn.ConvTranspose2d(3, 2, 3))
    weight_norm_(model[1])
    model.append(MeanOnlyBatchNorm(2))
    x, file = torch.randn(2, 2, 5, 5), io.BytesIO()
    torch.export.save(torch.export.export(model.eval(), (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), model(x))


def test_fx_sees_one_call_for_the_weight() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = weight_standardize_(nn.Conv2d(2, 3, 3), dialect="nf")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.conv.weight, self.conv.bias)

    model, x = Reader(), torch.randn(1, 2, 5, 5)
    graph = fx.symbolic_trace(model)
    assert next(n.name for n in graph.graph.nodes if n.op == "call_function") == "_standard_weight"
    assert torch.equal(graph(x), model(x))


def test_the_gain_absorbs_scale() -> None:
    layer, x = weight_standardize_(nn.Conv2d(2, 3, 3).double()), torch.randn(1, 2, 5, 5).double()
    affine = Affine(torch.tensor([2.0, -1, 0]).double(), torch.tensor([0.5, 0, 1]).double())
    expected = layer(x) * affine.scale.view(-1, 1, 1) + affine.shift.view(-1, 1, 1)
    absorb_affine_(layer, affine)
    assert isinstance(layer, WeightStandardized)
    assert relative_l2(layer(x), expected) <= 1e-14


def test_tied_layers_share_what_they_fold_to() -> None:
    first = weight_standardize_(nn.Linear(3, 3))
    second = copy.deepcopy(first)
    second.weight_gain, second.weight_v = first.weight_gain, first.weight_v
    done: dict[tuple[int, ...], nn.Parameter] = {}
    fold_layer_(first, done)
    fold_layer_(second, done)
    assert first.weight is second.weight


def test_observers_hear_of_every_class_once() -> None:
    class Own(nn.Linear):
        pass

    heard: list[type[nn.Module]] = []
    observer = heard.append
    weight_norm_(nn.Linear(2, 2))
    on_each_class(observer)
    known = list(heard)
    on_each_class(observer)
    assert heard == known * 2
    heard[:] = known
    assert type(weight_norm_(nn.Linear(2, 2))) in known
    layer = weight_standardize_(Own(2, 2))
    weight_standardize_(Own(2, 2))
    assert heard == [*known, type(layer)]


def test_standardizing_is_torch_in_training_too() -> None:
    """One step of SGD moves the computed weight as the formula's own autograd says."""
    ours = weight_standardize_(nn.Conv2d(2, 3, 3).double(), dialect="qiao")
    v = ours.weight_v.detach().clone().requires_grad_()
    gain = ours.weight_gain.detach().clone().requires_grad_()
    x = torch.randn(2, 2, 6, 6).double()
    centered = v - v.mean((1, 2, 3), keepdim=True)
    std = centered.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
    loss = nn.functional.conv2d(x, gain * centered / std, ours.bias).square().sum()
    loss.backward()
    ours(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_v.grad, v.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.weight_gain.grad, gain.grad, rtol=1e-11, atol=1e-12)

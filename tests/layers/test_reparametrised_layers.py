"""What we put into models: weight-normed layers, affine maps, absorbed maps, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from normconv.errors import UsageError
from normconv.layers import (
    ChannelAffine,
    WeightNormed,
    absorb_affine_,
    copy_model,
    fold_layer_,
    kind_of,
    layout_of,
    weight_norm_,
)
from normconv.layers.reparametrised import rebuild_layer
from normconv.numerics import Affine, relative_l2
from tests.zoo import legacy_weight_norm

LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, bias=False), (2, 3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 5)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=0),
        (2, 4, 5, 5),
    ),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 2, 2, groups=2), (2, 2, 3, 3, 3)),
}


class OwnState(nn.Conv2d):
    """A layer class with its own pickling and constructor."""

    def __init__(self, tag: str) -> None:
        super().__init__(2, 3, 1)
        self.tag = tag

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.restored = True


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_norm_keeps_class_function_and_order(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape).double()
    plain_class, expected, had = type(layer), layer(x), list(layer._parameters)
    assert kind_of(layer) == kind
    assert weight_norm_(layer) is layer
    assert isinstance(layer, plain_class)
    assert isinstance(layer, WeightNormed)
    assert kind_of(layer) == kind
    assert type(layer).__name__ == f"WN{plain_class.__name__}"
    assert relative_l2(layer(x), expected) <= 1e-15
    names = list(layer._parameters)
    assert names == ["weight_g", "weight_v", *had[1:]]
    assert "weight" not in layer.state_dict()
    repaired = fold_layer_(layer)
    assert type(layer) is plain_class
    assert list(layer._parameters) == had
    assert not bool(repaired.any())
    assert relative_l2(layer(x), expected) <= 1e-15
    assert isinstance(layer.weight, nn.Parameter)


@pytest.mark.parametrize("kind", LAYERS)
def test_absorbed_affine_is_the_affine_of_the_output(kind: str) -> None:
    make, shape = LAYERS[kind]
    for weight_norm in (False, True):
        layer, x = make().double(), torch.randn(shape).double()
        before = layer(x)
        channels = before.shape[1]
        affine = Affine(torch.randn(channels).double(), torch.randn(channels).double())
        view = (1, -1) + (1,) * (before.dim() - 2)
        expected = before * affine.scale.view(view) + affine.shift.view(view)
        absorb_affine_(layer, affine, weight_norm=weight_norm)
        assert isinstance(layer, WeightNormed) == weight_norm
        assert relative_l2(layer(x), expected) <= 1e-14


def test_absorbing_rounds_once_in_half() -> None:
    layer = nn.Linear(3, 2).half()
    w, b = layer.weight.detach().double(), layer.bias.detach().double()
    affine = Affine(torch.tensor([1 / 3, -7.7]).double(), torch.tensor([0.1, 1e-3]).double())
    absorb_affine_(layer, affine)
    assert torch.equal(layer.weight, (w * affine.scale[:, None]).half())
    assert torch.equal(layer.bias, (b * affine.scale + affine.shift).half())


def test_trainability_is_inherited() -> None:
    one = Affine(torch.ones(2).double(), torch.zeros(2).double())
    layer = nn.Linear(2, 2, bias=False).requires_grad_(False)
    absorb_affine_(layer, one, weight_norm=True)
    assert {n: p.requires_grad for n, p in layer.named_parameters()} == dict.fromkeys(
        ("weight_g", "weight_v", "bias"), False
    )
    layer = nn.Linear(2, 2, bias=False).requires_grad_(False)
    absorb_affine_(layer, one, bias_trainable=True)
    assert layer.bias.requires_grad
    assert not layer.weight.requires_grad
    layer = weight_norm_(nn.Linear(2, 2))
    layer.weight_g.requires_grad_(False)
    fold_layer_(layer)
    assert layer.weight.requires_grad


def test_absorbing_is_refused_where_there_is_no_plain_weight() -> None:
    one = Affine(torch.ones(2).double(), torch.zeros(2).double())
    for layer in (nn.ReLU(), parametrizations.weight_norm(nn.Linear(2, 2)), nn.Embedding(2, 2)):
        with pytest.raises(UsageError, match="no plain weight"):
            absorb_affine_(layer, one)
    for layer in (nn.ReLU(), weight_norm_(nn.Linear(2, 2)), legacy_weight_norm(nn.Linear(2, 2))):
        with pytest.raises(UsageError, match="plain weight"):
            weight_norm_(layer)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose1d"])
def test_gradients_equal_torch_weight_norm(kind: str) -> None:
    make, shape = LAYERS[kind]
    ours, x = weight_norm_(make().double()), torch.randn(shape).double()
    theirs = make().double()
    with torch.no_grad():
        theirs.weight.copy_(ours.weight)
        if theirs.bias is not None:
            theirs.bias.copy_(ours.bias)
    dim = 1 if layout_of(theirs).transposed else 0
    nn.utils.parametrizations.weight_norm(theirs, dim=dim)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    wn = theirs.parametrizations.weight
    torch.testing.assert_close(ours.weight_g.grad, wn.original0.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.weight_v.grad, wn.original1.grad, rtol=1e-11, atol=1e-12)
    if theirs.bias is not None:
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_the_made_class_is_made_once() -> None:
    first, second = weight_norm_(nn.Linear(2, 2)), weight_norm_(nn.Linear(3, 3))
    assert type(first) is type(second)
    assert "weight norm" in type(first).__doc__ or "reparametrised" in type(first).__doc__


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_keeps_state_hooks_and_own_setstate(protocol: int) -> None:
    layer = weight_norm_(OwnState("mine"))
    layer.train(False)
    twin = pickle.loads(pickle.dumps(layer, protocol))
    assert type(twin) is type(layer)
    assert (twin.tag, twin.restored, twin.training) == ("mine", True, False)
    assert torch.equal(twin.weight, layer.weight)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in layer.named_parameters()]


def test_deepcopy_survives_cycles_and_shares_what_was_shared() -> None:
    net = nn.Sequential(weight_norm_(nn.Linear(2, 2)), nn.Linear(2, 2))
    net[0].__dict__["home"] = net
    net[1].bias = net[0].bias
    twin = copy.deepcopy(net)
    assert twin[0].__dict__["home"] is twin
    assert twin[1].bias is twin[0].bias
    assert twin[0].weight_v is not net[0].weight_v
    assert torch.equal(twin[0].weight, net[0].weight)


def test_rebuild_takes_only_layers() -> None:
    with pytest.raises(UsageError, match="no reparametrised layer"):
        rebuild_layer("wn", dict, {})
    with pytest.raises(UsageError, match="no reparametrised layer"):
        rebuild_layer("other", nn.Linear, {})


def test_rebuild_refuses_modules_that_are_no_operator() -> None:
    with pytest.raises(UsageError, match="no reparametrised layer"):
        rebuild_layer("wn", nn.ReLU, {})


def test_dtype_and_device_moves_reach_g_and_v() -> None:
    layer = weight_norm_(nn.Conv2d(2, 3, 3)).to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    layer = layer.half()
    assert layer.weight.dtype == torch.float16
    assert weight_norm_(nn.Linear(2, 2)).to("meta").weight.is_meta


def test_conv3d_channels_last_is_restored() -> None:
    layer = nn.Conv3d(2, 3, 2).to(memory_format=torch.channels_last_3d)
    weight_norm_(layer)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_channel_affine_is_the_map_in_every_rank_and_dtype() -> None:
    affine = Affine(torch.tensor([2.0, -1.0]).double(), torch.tensor([0.5, 0.0]).double())
    for trainable in (True, False):
        layer = ChannelAffine.of(affine, trainable=trainable, dtype=torch.float32)
        assert len(list(layer.parameters())) == (2 if trainable else 0)
        assert list(layer.state_dict()) == ["scale", "shift"]
        for rank in range(2, 6):
            x = torch.randn(3, 2, *(2,) * (rank - 2))
            out = layer(x)
            assert torch.equal(out[:, 0], 2 * x[:, 0] + 0.5)
            assert torch.equal(out[:, 1], -x[:, 1])
        assert layer(torch.randn(1, 2).bfloat16()).dtype == torch.bfloat16
    assert repr(layer) == "ChannelAffine(2, trainable=False)"


def test_channel_affine_takes_its_input_by_the_name_norms_use() -> None:
    ChannelAffine(2)(input=torch.zeros(1, 2))


def test_copy_model_takes_non_leaf_attributes() -> None:
    net = nn.Sequential(legacy_weight_norm(nn.Linear(2, 2)))
    x = torch.randn(3, 2)
    expected = net(x)
    twin = copy_model(net)
    assert torch.equal(twin(x), expected)
    assert twin[0].weight_v is not net[0].weight_v
    assert net[0].weight.requires_grad


def test_legacy_names_in_a_checkpoint_load() -> None:
    """`weight_g`, `weight_v` are also torch's older names: such a checkpoint loads as it is."""
    theirs = legacy_weight_norm(nn.Conv2d(2, 3, 3))
    ours = weight_norm_(nn.Conv2d(2, 3, 3))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(ours(x), theirs(x))

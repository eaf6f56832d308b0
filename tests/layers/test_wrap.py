"""`nc.wrap`: every family of layers, reparametrised in place, computes and trains as it should."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normconv as nc
from normconv.errors import PlanError, UsageError
from normconv.layers import LogWeightNormed, WeightNormed, absorb_affine_, row_layouts
from normconv.numerics import DIALECTS, Affine, relative_l2
from tests.zoo import legacy_weight_norm

SEQUENCE = (5, 2, 4)  # steps, samples, features
CASES = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 5)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), None),
    "rnn": (lambda: nn.RNN(4, 3, nonlinearity="relu"), SEQUENCE),
    "gru": (lambda: nn.GRU(4, 3, 2, batch_first=True), SEQUENCE),
    "lstm": (lambda: nn.LSTM(4, 3, 2, bidirectional=True), SEQUENCE),
    "lstm projected": (lambda: nn.LSTM(4, 5, 2, proj_size=2, bidirectional=True), SEQUENCE),
    "lstm without bias": (lambda: nn.LSTM(4, 3, bias=False), SEQUENCE),
    "rnn cell": (lambda: nn.RNNCell(4, 3), (2, 4)),
    "gru cell": (lambda: nn.GRUCell(4, 3), (2, 4)),
    "lstm cell": (lambda: nn.LSTMCell(4, 3, bias=False), (2, 4)),
    "attention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), SEQUENCE),
    "attention of several widths": (
        lambda: nn.MultiheadAttention(4, 2, kdim=4, vdim=3, add_bias_kv=True), SEQUENCE
    ),
}  # fmt: skip


class OfItself(nn.MultiheadAttention):
    """A subclass with its own forward: self-attention, values narrower where the layer wants that."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(x, x, x)


def made(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    make, shape = CASES[kind]
    layer = make().to(dtype)
    if shape is None:
        return layer, (torch.tensor([[1, 0, 3], [6, 1, 1]]),)
    x = torch.randn(shape, dtype=dtype)
    if isinstance(layer, nn.MultiheadAttention):
        return layer, (x, x, x[..., : layer.vdim])
    return layer, (x,)


def tensors(output: object) -> list[Tensor]:
    """All tensors of an output: what a layer puts out and its state."""
    if isinstance(output, Tensor):
        return [output]
    return [] if output is None else [t for part in output for t in tensors(part)]


def far(layer: nn.Module, expected: list[Tensor], inputs: tuple[Tensor, ...]) -> float:
    got = tensors(layer(*inputs))
    assert len(got) == len(expected) > 0
    return max(relative_l2(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("scale", ["linear", "exp"])
@pytest.mark.parametrize("kind", CASES)
def test_the_function_stays_and_fold_brings_the_class_back(kind: str, scale: str) -> None:
    layer, inputs = made(kind)
    plain_class, had = type(layer), [name for name, _ in layer.named_parameters()]
    weights = list(row_layouts(layer))
    expected = tensors(layer(*inputs))
    assert nc.wrap(layer, scale=scale) is layer
    assert isinstance(layer, plain_class)
    assert type(layer) is not plain_class
    assert isinstance(layer, LogWeightNormed if scale == "exp" else WeightNormed)
    assert not set(weights) & set(dict(layer.named_parameters()))
    assert set(layer.state_dict()) == set(dict(layer.named_parameters()))
    # An embedding row of zeros becomes a tiny one where gains are exponentials.
    bound = 1e-15 if scale == "linear" else 1e-14
    assert far(layer, expected, inputs) <= bound
    folded = nc.fold(layer).model
    assert type(folded) is plain_class
    assert [name for name, _ in folded.named_parameters()] == had
    assert far(folded, expected, inputs) <= bound
    assert [type(m) for m in folded.modules()] == [type(m) for m in made(kind)[0].modules()]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", CASES)
def test_copies_files_and_dtypes(kind: str, tmp_path: Path) -> None:
    layer, inputs = made(kind)
    nc.wrap(layer)
    expected = tensors(layer(*inputs))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), saved(layer, tmp_path)):
        assert type(twin) is type(layer)
        assert far(twin, expected, inputs) == 0
        with torch.no_grad():
            next(twin.parameters()).mul_(2)
        assert far(twin, expected, inputs) > 1e-3, "it computes from its own parameters"
        assert far(layer, expected, inputs) == 0
    fresh, _ = made(kind)
    for parameter in fresh.parameters():
        nn.init.uniform_(parameter)
    nc.wrap(fresh).load_state_dict(layer.state_dict(), strict=True)
    assert far(fresh, expected, inputs) == 0
    layer.float()
    narrow = tuple(t.float() if t.is_floating_point() else t for t in inputs)
    assert far(layer, expected, narrow) <= 1e-5
    assert all(getattr(copy.deepcopy(layer).to("meta"), n).is_meta for n in row_layouts(layer))


def saved(layer: nn.Module, folder: Path) -> nn.Module:
    nc.save(layer, folder / "layer.pt")
    return nc.load(folder / "layer.pt")


@pytest.mark.parametrize("scale", ["linear", "exp"])
@pytest.mark.parametrize(
    "kind",
    ["embedding", "lstm projected", "gru", "rnn", "lstm cell", "attention of several widths"],
)
def test_gradients_by_finite_differences(kind: str, scale: str) -> None:
    layer, inputs = made(kind)
    nc.wrap(layer, scale=scale, **({"c": 0.5} if scale == "exp" else {}))
    parts = dict(layer.named_parameters())
    if kind == "embedding":  # torch gives the padding row no gradient, by its own rule
        inputs = (torch.tensor([[1, 2, 3]]),)

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(parts, values, strict=True))
        return tuple(tensors(torch.func.functional_call(layer, given, inputs)))

    values = tuple(p.detach().clone().requires_grad_() for p in parts.values())
    assert torch.autograd.gradcheck(outputs, values, fast_mode=True)


def test_gradients_of_a_recurrent_layer_equal_those_of_torch() -> None:
    ours, (x,) = made("lstm")
    theirs, _ = made("lstm")
    nc.wrap(ours)
    for name in row_layouts(theirs):
        parametrizations.weight_norm(theirs, name)
    for layer in (ours, theirs):
        sum(t.square().sum() for t in tensors(layer(x[:, :1]))).backward()  # one sample
    for name in row_layouts(theirs):
        wn = theirs.parametrizations[name]
        for own, other in (("_g", wn.original0), ("_v", wn.original1)):
            got = ours.get_parameter(name + own).grad
            torch.testing.assert_close(got, other.grad, rtol=1e-10, atol=1e-13)


def test_training_moves_the_state_of_a_recurrent_layer() -> None:
    torch.manual_seed(0)
    layer, x = nc.wrap(nn.LSTM(3, 4)), torch.randn(6, 1, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(5):
        loss = (layer(x)[0] - 0.2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]


def test_packed_sequences_and_given_states() -> None:
    layer, (x,) = made("lstm")
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3])
    state = (torch.randn(4, 2, 3).double(), torch.randn(4, 2, 3).double())
    expected = layer(packed, state)
    nc.wrap(layer)
    layer.flatten_parameters()
    got = layer(packed, state)
    assert relative_l2(got[0].data, expected[0].data) <= 1e-15
    assert relative_l2(got[1][1], expected[1][1]) <= 1e-15
    with pytest.raises(ValueError, match="dtype"):
        layer(x.float())


@pytest.mark.parametrize("training", [True, False])
def test_the_fast_path_of_a_transformer_layer(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    twin = copy.deepcopy(layer)
    for part in (twin.self_attn, twin.linear1, twin.linear2):
        nc.wrap(part)
    x = torch.randn(2, 3, 8).double()
    layer.train(training)
    twin.train(training)
    with torch.set_grad_enabled(training):
        assert relative_l2(twin(x), layer(x)) <= 1e-14
    with torch.no_grad():  # the paths that read weights would not see an old one
        twin.self_attn.in_proj_weight_g.mul_(3)
        before = layer(x)
        layer.self_attn.in_proj_weight.mul_(3)
        assert relative_l2(twin(x), layer(x)) <= 1e-14
        assert relative_l2(before, layer(x)) > 1e-3
    kinds = {type(m) for m in nc.fold(twin).model.modules()}
    assert kinds == {type(m) for m in layer.modules()}


def test_a_subclass_keeps_its_own_forward() -> None:
    torch.manual_seed(0)
    layer, x = OfItself(4, 2).double(), torch.randn(3, 2, 4).double()
    expected = tensors(layer(x))
    assert far(nc.wrap(layer), expected, (x,)) <= 1e-15


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("kind", ["gru", "attention", "embedding", "linear"])
def test_standardized_layers_lose_the_mean_and_nothing_else(kind: str, dialect: str) -> None:
    layer, inputs = made(kind)
    parts = [layer, *(m for m in layer.children() if row_layouts(m))]
    with torch.no_grad():
        for part in parts:
            for name in row_layouts(part):
                weight = part.get_parameter(name)
                weight.sub_(weight.mean(1, keepdim=True))
    expected = tensors(layer(*inputs))
    nc.wrap(layer, to="ws", dialect=dialect)
    assert far(layer, expected, inputs) <= 1e-13
    assert type(nc.fold(layer).model) is CASES[kind][0]().__class__


def test_signs_and_zeros_of_gains_that_are_exponentials() -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    w = layer.weight.detach().clone()
    nc.wrap(layer, scale="exp", c=2.0)
    assert repr(layer) == "LogWNLinear(in_features=3, out_features=3, bias=True, gain_rate=2.0)"
    gain = (2 * layer.weight_s).exp().flatten()
    assert 0 < gain[1] <= torch.finfo(torch.float32).eps * gain.max()
    assert relative_l2(layer.weight, w) <= 4 * torch.finfo(torch.float32).eps


def test_an_affine_map_goes_into_exponential_gains() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    scale, shift = torch.tensor([2.0, -0.5, 1.0, -3.0]).double(), torch.randn(4).double()
    expected = layer(x) * scale + shift
    nc.wrap(layer, scale="exp", c=0.3)
    absorb_affine_(layer, Affine(scale, shift))
    assert isinstance(layer, LogWeightNormed)
    assert relative_l2(layer(x), expected) <= 1e-14


def test_compiles_into_one_graph() -> None:
    for layer, inputs in (made("attention"), made("gru cell")):
        nc.wrap(layer, scale="exp")
        expected = tensors(layer(*inputs))
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got = tensors(compiled(*inputs))
        assert max(relative_l2(a, b) for a, b in zip(got, expected, strict=True)) <= 1e-12


def stale_embedding() -> nn.Module:
    return nn.Embedding(3, 2, max_norm=1.0)


def tied_recurrent() -> nn.Module:
    layer = nn.GRU(3, 3)
    layer.weight_hh_l0 = layer.weight_ih_l0
    return layer


def integer_linear() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    return layer


def broken_projection() -> nn.Module:
    layer = nn.MultiheadAttention(4, 2)
    layer.out_proj = parametrizations.weight_norm(layer.out_proj)
    return layer


def not_a_number() -> nn.Module:
    layer = nn.LSTM(2, 2)
    nn.init.constant_(layer.weight_hh_l0, float("nan"))
    return layer


REFUSED = {
    "no weight": (nn.ReLU, "no weight that a row norm"),
    "norm": (lambda: nn.LayerNorm(3), "no weight that a row norm"),
    "container": (lambda: nn.Sequential(nn.Linear(2, 2)), "no weight that a row norm"),
    "wrapped": (lambda: nc.wrap(nn.LSTM(2, 2)), "weight norm already; fold it first"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "fold it first"),
    "hooked": (lambda: legacy_weight_norm(nn.Linear(2, 2)), "fold it first"),
    "lazy": (lambda: nn.LazyConv2d(2, 3), "lazy"),
    "integer": (integer_linear, "int8"),
    "renormalized": (stale_embedding, "max_norm"),
    "sparse": (lambda: nn.Embedding(3, 2, sparse=True), "sparse"),
    "tied": (tied_recurrent, "the same parameter"),
    "inside": (broken_projection, "out_proj: torch computes its weight"),
    "nan": (not_a_number, "NaN"),
    "empty": (lambda: nn.Embedding(0, 2), "no elements"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_wrapped_stays_as_it_was(case: str) -> None:
    make, reason = REFUSED[case]
    layer = make()
    kind, names = type(layer), [name for name, _ in layer.named_parameters()]
    for to in ("wn", "ws"):
        with pytest.raises(UsageError, match=reason):
            nc.wrap(layer, to=to)
    assert type(layer) is kind
    assert [name for name, _ in layer.named_parameters()] == names


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"to": "bn"}, "'wn' or 'ws'"),
        ({"scale": "log"}, "neither 'linear' nor 'exp'"),
        ({"scale": "exp", "c": -1.0}, "no positive number"),
        ({"c": 2.0}, "goes with scale='exp'"),
        ({"to": "ws", "scale": "exp"}, "only to='wn'"),
        ({"dialect": "bit"}, "only to='ws'"),
        ({"to": "ws", "dialect": "none"}, "none of"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict, reason: str) -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=reason):
        nc.wrap(layer, **options)
    assert type(layer) is nn.Linear


def test_a_layer_of_zeros_has_no_exponential_gain() -> None:
    layer = nn.MultiheadAttention(4, 2)
    nn.init.zeros_(layer.out_proj.weight)
    with pytest.raises(UsageError, match=r"out_proj: its weight is 0"):
        nc.wrap(layer, scale="exp")
    assert type(layer) is nn.MultiheadAttention
    nc.wrap(layer)


def test_filters_of_one_element_are_not_standardized() -> None:
    with pytest.raises(UsageError, match="one element"):
        nc.wrap(nn.LSTM(1, 2), to="ws")


def test_a_pickle_without_weights_is_refused() -> None:
    from normconv.layers.reparametrised import rebuild_layer

    with pytest.raises(UsageError, match="no reparametrised layer"):
        rebuild_layer("wn", nn.LSTM, {"_parameters": {"weight_ih_l0": None}})
    buffer = io.BytesIO()
    torch.save(nc.wrap(nn.LSTM(2, 2)), buffer)
    buffer.seek(0)
    assert isinstance(torch.load(buffer, weights_only=False), WeightNormed)


@pytest.mark.parametrize("to", ["wn", "ws"])
def test_grouped_transposed_layers_change_their_memory_format(to: str) -> None:
    """A gain of more dimensions than the weight has no such format."""
    layer, x = nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)
    nc.wrap(layer, to=to)
    before = layer(x)
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert relative_l2(layer(x), before) < 1e-5


def test_a_wrapped_layer_starts_standard_on_its_inputs() -> None:
    x = torch.randn(40, 4, 7, 7, dtype=torch.float64) * 3 + 1
    layer = nn.Conv2d(4, 6, 3, groups=2, dtype=torch.float64)
    for init in (x, [x[:20], x[20:]]):
        got = nc.wrap(copy.deepcopy(layer), init=init)(x)
        assert got.mean((0, 2, 3)).abs().max() < 1e-10
        assert (got.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-10
    exp = nc.wrap(copy.deepcopy(layer), scale="exp", init=x)(x)
    assert (exp.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-10


def test_a_start_that_there_is_not_leaves_the_layer_alone() -> None:
    with pytest.raises(UsageError, match=r"init: Embedding has no data-dependent start"):
        nc.wrap(nn.Embedding(3, 4), init=torch.tensor([0, 1]))
    cases = [
        (nn.LSTM(3, 4), {"init": torch.randn(5, 2, 3)}),
        (nn.Linear(3, 4), {"init": torch.randn(5, 2)}),
        (nn.Linear(3, 4), {"init": iter([torch.randn(5, 3)])}),
        (nn.Linear(3, 4), {"init": torch.randn(5, 3), "to": "ws"}),
    ]
    for layer, keywords in cases:
        kind, before = type(layer), copy.deepcopy(layer.state_dict())
        with pytest.raises(UsageError):
            nc.wrap(layer, **keywords)
        assert type(layer) is kind
        assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("dtype", "c"), [(torch.float16, 1e-5), (torch.float16, 1e30), (torch.float32, 1e-300)]
)
def test_a_logarithm_beyond_the_dtype_is_told_before_any_edit(dtype: torch.dtype, c: float) -> None:
    layer = nn.Linear(6, 3).to(dtype)
    before = layer.weight.detach().clone()
    with pytest.raises(UsageError, match=r"log\|g\| / c of its weight is beyond torch.float"):
        nc.wrap(layer, scale="exp", c=c)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, before)
    model, options = nn.Sequential(layer), {"scale": "exp", "c": c}
    with pytest.raises(PlanError, match=r"beyond torch\.float"):
        nc.convert(model, "wn", example_inputs=(torch.zeros(1, 6, dtype=dtype),), options=options)


def test_which_layers_the_default_takes_is_in_the_report() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(8, 4)
    (note,) = [n for n in nc.convert(net, "wn", example_inputs=(x,)).report.notes if "normed" in n]
    assert "none is folded into 3, which stay as they are; layers='all' takes them" in note
    told = nc.convert(net, "wn", example_inputs=(x,), layers="normed").report
    assert not [n for n in told.notes if "normed" in n]

"""Folding recurrent layers: every weight norm, to a layer that exports to one node."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import normconv as nc
from normconv.layers import copy_model, row_layouts, weight_norm_
from normconv.numerics import relative_l2


def hooked(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name in row_layouts(layer):
            nn.utils.weight_norm(layer, name)
    return layer


def parametrized(layer: nn.Module) -> nn.Module:
    for name in row_layouts(layer):
        parametrizations.weight_norm(layer, name)
    return layer


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ours": weight_norm_, "hook": hooked, "parametrization": parametrized
}  # fmt: skip
LAYERS: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(3, 4, proj_size=2, batch_first=True),
    "GRU": lambda: nn.GRU(3, 4, num_layers=2, bias=False, batch_first=True),
    "RNN": lambda: nn.RNN(3, 4, batch_first=True),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_weights_fold_to_the_plain_class(kind: str, layer: str) -> None:
    plain = LAYERS[layer]()
    net, x = nn.ModuleList([KINDS[kind](copy.deepcopy(plain))]), torch.randn(2, 5, 3)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = copy_model(net)[0](x)[0]
    folded, report = nc.fold(net)
    made = folded[0]
    assert type(made) is type(plain)
    assert list(made._parameters) == list(plain._parameters)
    assert all(a is b for a, b in zip(made._flat_weights, made.parameters(), strict=True))
    count = 1 if kind == "ours" else len(row_layouts(plain))
    assert sum(report.facts["folded"].values()) == count
    assert report.facts["left"] == 0
    assert relative_l2(made(x)[0], expected) <= 1e-6
    assert nc.fold(folded).report.facts["folded"] == {}
    torch.save(folded, buffer := io.BytesIO())
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)[0](x)[0], made(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_layer_trains_and_loads(kind: str) -> None:
    folded = nc.fold(KINDS[kind](nn.LSTM(3, 4))).model
    x = torch.randn(5, 2, 3)
    before = folded(x)[0]
    before.sum().backward()
    with torch.no_grad():
        for parameter in folded.parameters():
            assert parameter.grad is not None
            parameter -= parameter.grad
    assert relative_l2(folded(x)[0], before) > 1e-3
    fresh = nn.LSTM(3, 4)
    folded.load_state_dict(fresh.state_dict(), strict=True)
    assert torch.equal(folded(x)[0], fresh(x)[0])


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("kind", KINDS)
def test_cells(kind: str, cell: type[nn.Module]) -> None:
    made: Any = cell
    net, x = nn.ModuleList([KINDS[kind](made(3, 4))]), torch.randn(2, 3)
    expected = net[0](x)
    folded = nc.fold(net).model
    assert list(folded[0]._parameters) == ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    got = folded[0](x)
    pairs = zip(got, expected, strict=True)
    assert all(relative_l2(a, b) <= 1e-6 for a, b in pairs)


class Tagger(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)[0]
        return output


@pytest.mark.parametrize(
    ("kind", "layer", "bidirectional"),
    [
        ("ours", "LSTM", False),
        ("parametrization", "LSTM", False),
        ("parametrization", "LSTM", True),
        ("hook", "GRU", True),
    ],
)
def test_exports_to_one_node(kind: str, layer: str, bidirectional: bool, tmp_path: Path) -> None:
    make: Any = getattr(nn, layer)
    net = Tagger(KINDS[kind](make(3, 4, batch_first=True, bidirectional=bidirectional))).eval()
    report = nc.export_onnx(
        net, tmp_path / "m.onnx", example_inputs=(torch.randn(2, 5, 3),), check=False
    )
    assert {check.name: check.passed for check in report.checks}["weight arithmetic"]
    model = onnx.load(tmp_path / "m.onnx")
    nodes = [node.op_type for node in model.graph.node]
    assert nodes.count(layer) == 1, nodes
    assert not {"Div", "Sqrt", "ReduceL2", "ReduceSum", "Pow", "MatMul"} & set(nodes)
    node = next(node for node in model.graph.node if node.op_type == layer)
    stored = {tensor.name for tensor in model.graph.initializer}
    assert set(node.input[1:3]) <= stored


def test_a_projection_has_no_node(tmp_path: Path) -> None:
    net = Tagger(nn.LSTM(3, 4, batch_first=True, proj_size=2))
    with pytest.raises(nc.NormconvError, match="layer: is an LSTM with proj_size=2"):
        nc.export_onnx(net, tmp_path / "m.onnx", example_inputs=(torch.randn(2, 5, 3),))
    assert not list(tmp_path.iterdir())

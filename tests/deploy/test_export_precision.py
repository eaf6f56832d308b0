"""Files in half precision: norms stay in float32, weights are rounded once, faults are seen."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import normconv as nc
from normconv.deploy import export_onnx
from normconv.deploy.onnx_graph import norm_nodes
from normconv.deploy.regions import norm_regions
from normconv.errors import CheckFailed, Refused, UsageError

IMAGE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
HALVES = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
#: What the decomposed group norm of the net below is made of.
GROUP_NORM = ["Reshape", "InstanceNormalization", "Reshape", "Mul", "Add"]


class RMSNorm(nn.Module):
    """A norm that the exporter writes out as arithmetic."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        RMSNorm(8),
        nn.Linear(8, 5),
    )
    nn.init.uniform_(net[1].weight, 0.5, 2.0)
    nn.init.uniform_(net[1].bias, -1.0, 1.0)
    return net.eval()


@pytest.fixture(scope="module", params=list(HALVES))
def exported(request, tmp_path_factory):
    """A dtype, its file and the report."""
    path = tmp_path_factory.mktemp(request.param) / "net.onnx"
    return (
        request.param,
        path,
        export_onnx(network(), path, example_inputs=IMAGE, dtype=request.param),
    )


def typed(path: Path) -> tuple[onnx.GraphProto, dict[str, int]]:
    """A file's graph, and the element type of each of its values."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kinds[value.name] = value.type.tensor_type.elem_type
    return graph, kinds


def test_norms_stay_in_float32_and_the_rest_is_half(exported):
    dtype, path, report = exported
    half, _ = HALVES[dtype]
    graph, kinds = typed(path)
    floats = {TensorProto.FLOAT, half}
    by_dtype: dict[int, list[str]] = {TensorProto.FLOAT: [], half: []}
    for node in graph.node:
        found = {kinds[name] for name in (*node.input, *node.output) if kinds.get(name) in floats}
        if node.op_type == "Cast":
            assert found == floats, "a cast changes the dtype"
        elif node.op_type != "Shape":
            assert len(found) == 1, f"{node.op_type} mixes dtypes"
            by_dtype[found.pop()].append(node.op_type)
    kept, rounded = by_dtype[TensorProto.FLOAT], by_dtype[half]
    assert kept[:5] == GROUP_NORM
    assert {"Sqrt", "ReduceMean", "Div"} <= set(kept[5:])
    assert kept[-1] == "Mul", "the scale of the norm written out as arithmetic"
    assert {"Conv", "Relu", "Gemm"} <= set(rounded)
    assert not {"Conv", "Relu", "Gemm"} & set(kept)
    assert {norm.kind for norm in norm_nodes(path)} == {"GroupNormalization", "RMSNormalization"}
    assert report.facts["nodes_by_dtype"] == {
        dtype: len(rounded),
        "fp32": len(kept),
        "casts": sum(node.op_type == "Cast" for node in graph.node),
    }


def test_no_cast_is_doubled_and_none_follows_another(exported):
    _, path, _ = exported
    casts = [node for node in onnx.load(path).graph.node if node.op_type == "Cast"]
    given = {name for node in casts for name in node.output}
    taken = [(node.input[0], node.attribute[0].i) for node in casts]
    assert len(taken) == len(set(taken))
    assert not given & {name for name, _ in taken}
    assert len(casts) == 6  # in, into and out of two norms, out


def test_inputs_and_outputs_stay_float32(exported):
    _, path, report = exported
    graph = onnx.load(path).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    assert kinds == {"input": TensorProto.FLOAT, "output": TensorProto.FLOAT}
    assert report.facts["inputs_and_outputs"] == "fp32"


def test_weights_are_rounded_once_and_norms_not(exported):
    dtype, path, _ = exported
    net = network()
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    expected = net[3].weight.detach().numpy().astype(HALVES[dtype][1])
    assert stored["3.weight"].dtype == HALVES[dtype][1]
    assert (stored["3.weight"] == expected).all()
    scale = net[1].weight.detach().numpy()
    assert any(v.dtype == np.float32 and np.array_equal(v.ravel(), scale) for v in stored.values())


def test_the_proof_says_what_is_skipped_and_what_is_judged(exported):
    dtype, _, report = exported
    names = {check.name for check in report.checks}
    assert {"cpu structure", "cpu output", "cpu size batch 1 output"} <= names
    assert any("skipped: on the CPU" in n and "run in float64" in n for n in report.notes)
    row = report.facts["cpu run"]["outputs"]["output"]
    eps = torch.finfo({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]).eps
    assert row["dtype"] == "float64"
    assert row["bound"] >= 4 * eps
    assert 0 < row["error"] < eps, "rounded weights are off, by rounding"


def test_a_wrong_rounded_weight_is_seen(exported, tmp_path):
    _, path, _ = exported
    assert nc.verify(network(), path, IMAGE).passed
    model = onnx.load(path)
    weight = next(
        t for t in model.graph.initializer if t.name == "8.weight" or t.name == "7.weight"
    )
    values = numpy_helper.to_array(weight).copy()
    values[0] = values[0] * values.dtype.type(1.25)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    report = nc.verify(network(), tmp_path / "wrong.onnx", IMAGE)
    assert [check.name for check in report.failed_checks if check.measured] == ["output"]


def test_a_file_that_fails_is_not_published(tmp_path, monkeypatch):
    from normconv.deploy.rounding import _Rounding

    right = _Rounding._round
    monkeypatch.setattr(
        _Rounding,
        "_round",
        lambda self, array: right(self, array * (1.25 if array.ndim > 1 else 1)),
    )
    with pytest.raises(CheckFailed, match="output"):
        export_onnx(network(), tmp_path / "x.onnx", example_inputs=IMAGE, dtype="fp16")
    assert not (tmp_path / "x.onnx").exists()


def test_onnx_runtime_runs_a_float16_file(tmp_path):
    path, net = tmp_path / "net.onnx", network()
    export_onnx(net, path, example_inputs=IMAGE, dtype="fp16", check=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (2, 3):
        given = torch.cat([IMAGE, -IMAGE])[:size]
        (found,) = session.run(None, {"input": given.numpy()})
        exact = net.double()(given.double()).detach()
        net.float()
        assert found.dtype == np.float32
        assert nc.numerics.relative_l2(torch.from_numpy(found), exact) < 4 * 2.0**-10


def test_weights_beyond_the_range_are_refused_by_name(tmp_path):
    net = network()
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = 70_000.0
        net[7].bias[1] = -1e6
    with pytest.raises(Refused) as refused:
        export_onnx(net, tmp_path / "x.onnx", example_inputs=IMAGE, dtype="fp16")
    assert [problem.where for problem in refused.value.problems] == ["0.weight", "7.bias"]
    assert "holds 7e+04, and the largest fp16 is 6.55e+04" in str(refused.value)
    assert "use bf16 or fp32" in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    export_onnx(net, tmp_path / "x.onnx", example_inputs=IMAGE, dtype="bf16")


def test_a_norms_own_weights_may_exceed_the_range(tmp_path):
    net = network()
    with torch.no_grad():
        net[1].weight[0] = 70_000.0
    report = export_onnx(net, tmp_path / "x.onnx", example_inputs=IMAGE, dtype="fp16")
    assert report.passed


class Positions(nn.Module):
    """Positions beyond what half precision counts, a mask, an epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        angle = index.float().unsqueeze(-1) * torch.tensor([1.0, 0.01, 0.001, 0.1])
        y = self.linear(x) + torch.sin(angle)
        y = torch.where(index.unsqueeze(-1) > 2050, y, torch.finfo(torch.float32).min)
        return torch.softmax(y, 1) / (y.abs().amax(-1, keepdim=True) * 0 + 1e-12).clamp_min(1e-9)


def test_positions_masks_and_epsilons_survive(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "x.onnx"
    given = (torch.randn(2, 3, 4), torch.tensor([[2049, 2051, 2053], [1, 4097, 4099]]))
    export_onnx(Positions(), path, example_inputs=given, dtype="fp16", check=False)
    graph, kinds = typed(path)
    sine = next(node for node in graph.node if node.op_type == "Sin")
    assert kinds[sine.output[0]] == TensorProto.FLOAT
    halves = [
        numpy_helper.to_array(t)
        for t in graph.initializer
        if t.data_type == TensorProto.FLOAT16 and not t.name.startswith("linear")
    ]
    assert all(np.isfinite(v).all() for v in halves)
    assert any((v == np.finfo(np.float16).min).all() for v in halves), "the mask"
    assert all(v.all() for v in halves if v.size == 1 and v.item() >= 0 and v.item() < 1e-6)


def test_a_region_of_a_layer_norm_written_out():
    """(x - mean) / sqrt(var + eps) * w + b between two others: seven nodes and no more."""
    text = """<ir_version: 10, opset_import: ["" : 20]>
    g (float[2, 4] x) => (float[2, 4] y)
      <float[4] w = {1, 2, 3, 4}, float[4] b = {0, 0, 0, 1}, float eps = {0.00001}>
    {
      r = Relu(x)
      m = ReduceMean<keepdims = 1>(r)
      c = Sub(r, m)
      s = Mul(c, c)
      v = ReduceMean<keepdims = 1>(s)
      e = Add(v, eps)
      d = Sqrt(e)
      n = Div(c, d)
      a = Mul(n, w)
      z = Add(a, b)
      y = Add(z, r)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    region = {str(node.outputs[0].name) for node in norm_regions(model)}
    assert region == {"m", "c", "s", "v", "e", "d", "n", "a", "z"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "half"}, "dtype: 'half' is not one of fp32, fp16, bf16"),
        ({"dtype": "bf16", "opset": 20}, "opset: 20 is asked for, and bf16 is written in 22"),
        ({"dtype": "fp16", "golden": "g.npz"}, "golden: its bounds are those of float32"),
    ],
)
def test_what_cannot_be_asked_for(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_onnx(nn.Linear(3, 2), tmp_path / "x.onnx", example_inputs=IMAGE, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_rounded_already(tmp_path):
    with pytest.raises(UsageError, match="the model has bfloat16"):
        export_onnx(
            network().bfloat16(), tmp_path / "x.onnx", example_inputs=IMAGE.bfloat16(), dtype="fp16"
        )


def test_fp32_is_the_file_without_the_option(tmp_path):
    export_onnx(network(), tmp_path / "a.onnx", example_inputs=IMAGE, check=False)
    export_onnx(network(), tmp_path / "b.onnx", example_inputs=IMAGE, check=False, dtype="fp32")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

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
from normconv.deploy import export_onnx, forms
from normconv.deploy.onnx_graph import norm_nodes
from normconv.deploy.precision import PRECISIONS
from normconv.deploy.regions import norm_regions
from normconv.deploy.rounding import _Rounding, round_graph
from normconv.errors import CheckFailed, Refused, UsageError
from tests.cli.test_commands import invoke_json

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


def test_onnx_runtime_is_not_asked_on_the_cpu(exported, monkeypatch):
    """It ends the process on some float16 files (a Transpose before a MatMul)."""

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("ONNX Runtime opens the file")

    monkeypatch.setattr(forms, "OnnxRunner", opened)
    assert nc.verify(network(), exported[1], IMAGE, provider="cpu").passed


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(3, 2), "m.pt")
    document = invoke_json("export", "m.pt", "--input", "2x3", "--dtype", "bf16", "-o", "m.onnx")
    assert document["facts"]["dtype"] == "bf16"
    assert document["facts"]["opset"] == {"ai.onnx": 22}


def test_a_file_that_fails_is_not_published(tmp_path, monkeypatch):
    right = _Rounding._round
    monkeypatch.setattr(_Rounding, "_round", lambda self, array: right(self, array * 1.25))
    with pytest.raises(CheckFailed, match="output"):
        export_onnx(
            nn.Linear(3, 2), tmp_path / "x.onnx", example_inputs=IMAGE[0, :, 0, :3], dtype="fp16"
        )
    assert not (tmp_path / "x.onnx").exists()


def test_onnx_runtime_runs_a_float16_file(exported):
    dtype, path, _ = exported
    if dtype != "fp16":
        pytest.skip("ONNX Runtime has no bfloat16 convolution on the CPU")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    net = network().double()
    for size in (2, 3):
        given = torch.cat([IMAGE, -IMAGE])[:size]
        (found,) = session.run(None, {"input": given.numpy()})
        assert found.dtype == np.float32
        exact = net(given.double()).detach()
        assert nc.numerics.relative_l2(torch.from_numpy(found), exact) < 4 * 2.0**-10


def test_weights_beyond_the_range_are_refused_by_name(tmp_path):
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 70_000.0
        layer.bias[1] = -1e6
    with pytest.raises(Refused) as refused:
        export_onnx(layer, tmp_path / "x.onnx", example_inputs=IMAGE[0, :, 0, :3], dtype="fp16")
    assert [problem.where for problem in refused.value.problems] == ["weight", "bias"]
    assert "holds 7e+04, and the largest fp16 is 6.55e+04" in str(refused.value)
    assert "use bf16 or fp32" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def rounded(text: str, dtype: str = "fp16") -> tuple[dict[str, Tensor], dict[str, int]]:
    """Round a graph of one line a node; return its constants and the element type of each value."""
    header = '<ir_version: 10, opset_import: ["" : 20]> g '
    model = ir.from_proto(onnx.parser.parse_model(header + text))
    round_graph(model, PRECISIONS[dtype])
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), strict_mode=True)
    onnx.checker.check_model(proto, full_check=True)
    kinds = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info}
    kinds |= {t.name: t.data_type for t in proto.graph.initializer}
    return {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}, kinds


def test_bf16_holds_what_fp16_does_not():
    text = """(float[2, 3] x) => (float[2, 3] y) <float[3] w = {70000, 1, 2}> { y = Mul(x, w) }"""
    with pytest.raises(Refused, match="w: holds 7e\\+04"):
        rounded(text)
    stored, _ = rounded(text, "bf16")
    assert stored["w"].astype(float).tolist() == [70144.0, 1.0, 2.0]


def test_a_norms_own_weights_may_exceed_the_range():
    """One of them is used outside as well, and is stored in both dtypes."""
    stored, kinds = rounded(
        """(float[2, 3] x) => (float[2, 3] y) <float[3] w = {70000, 1, 2}, float[3] b = {0.1, 0, 1}> {
          n = LayerNormalization(x, w, b)
          r = Relu(n)
          y = Add(r, b)
        }"""
    )
    assert stored["w"].dtype == stored["b"].dtype == np.float32
    assert stored["b_float16"].tolist() == [np.float16(0.1), 0, 1]
    assert kinds["r"] == TensorProto.FLOAT16


def test_masks_and_epsilons_survive():
    stored, _ = rounded(
        """(float[2, 3] x, bool[2, 3] m) => (float[2, 3] y)
        <float low = {-3.4028234663852886e38}, float eps = {1e-12}, float[2] w = {1e-12, 1}> {
          a = Where(m, x, low)
          y = Max(a, eps)
        }"""
    )
    assert stored["low"] == np.finfo(np.float16).min
    assert stored["eps"] == np.finfo(np.float16).smallest_subnormal


def test_positions_are_counted_in_float32_until_they_meet_a_weight():
    _, kinds = rounded(
        """(int64[2, 3] i, float[2, 3] x) => (float[2, 3] y, float[2, 2] z)
        <float f = {0.01}, float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
          p = Cast<to = 1>(i)
          a = Mul(p, f)
          s = Sin(a)
          y = Add(x, s)
          z = MatMul(p, w)
        }"""
    )
    assert kinds["p"] == kinds["a"] == kinds["s"] == TensorProto.FLOAT
    assert kinds["w"] == TensorProto.FLOAT16


def test_an_input_that_takes_float32_only_keeps_it():
    """Resize takes its scales in float32; Range has no half kind."""
    _, kinds = rounded(
        """(float[1, 1, 2, 2] x, float n) => (float[1, 1, 4, 4] y, float[N] r)
        <float[4] scales = {1, 1, 2, 2}, float zero = {0}, float one = {1}> {
          a = Relu(x)
          b = Resize<mode = "nearest">(a, , scales)
          y = Relu(b)
          r = Range(zero, n, one)
        }"""
    )
    assert kinds["b"] == TensorProto.FLOAT16
    assert kinds["scales"] == kinds["zero"] == TensorProto.FLOAT


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
    for name, options in (("a.onnx", {}), ("b.onnx", {"dtype": "fp32"})):
        given = IMAGE[0, :, 0, :3]
        torch.manual_seed(0)
        export_onnx(nn.Linear(3, 2), tmp_path / name, example_inputs=given, check=False, **options)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()

"""`verify` on several backends, at other sizes, in half precision: each check sees its fault."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import normconv as nc
from normconv.deploy import contenders, floors, forms, runners
from normconv.deploy.forms import chosen_backends
from normconv.errors import UsageError
from normconv.report import Report
from normconv.report.html import html_page
from tests.deploy.deploy_nets import Residual

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Residual(nn.GroupNorm(2, 8)).eval()


class Layer(nn.Module):
    """What the files of `convolution` compute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x))


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer().eval()


_KINDS = {
    "float32": (TensorProto.FLOAT, np.float32),
    "float16": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
}


def convolution(
    layer: Layer,
    path: Path,
    dtype: str = "float32",
    *,
    width: int | str = "width",
    fixed: bool = False,
) -> Path:
    """Write a convolution and a ReLU; a fixed one reshapes its output to what 6 x 6 pixels give."""
    kind, numpy_type = _KINDS[dtype]
    weight = numpy_helper.from_array(layer.conv.weight.detach().numpy().astype(numpy_type), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    initializers = [weight]
    if fixed:
        initializers.append(numpy_helper.from_array(np.array([0, 4, 4, 4]), "shape"))
        nodes.append(helper.make_node("Reshape", ["z", "shape"], ["out"]))
    output = "out" if fixed else "z"
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", kind, ["batch", 3, 6, width])],
        [value(output, kind, ["batch", 4, 4, "w_out" if width == "width" else 4])],
        initializers,
    )
    opset = 22 if dtype == "bfloat16" else 20  # the first whose Conv takes it
    onnx.save(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", opset)]),
        path,
    )
    return path


def errors(report: Report) -> list[str]:
    return [check.name for check in report.failed_checks]


def test_a_module_on_every_backend_in_one_report(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners.torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(contenders, "provider_problem", lambda p: "" if p == "cpu" else f"no {p}")
    monkeypatch.setattr(contenders, "compiler_problem", lambda: "")
    report = nc.verify(net, copy.deepcopy(net), IMAGE, backends=["all"], other_sizes=True)
    assert report.passed, report.failed_checks
    rows = report.facts["backends"]
    assert list(rows) == ["eager", "compile", "pt2", "ort-cpu"]
    assert {"compile output", "pt2 size batch 3 output", "ort-cpu size batch 1 output"} <= {
        check.name for check in report.checks
    }
    # The unconverted model ran on each as well.
    assert all("floor" in row["outputs"]["output"] for row in rows.values())
    assert 0 < rows["ort-cpu"]["outputs"]["output"]["floor"] < 1e-5
    assert rows["ort-cpu"]["nodes_by_provider"]["cpu"] > 4
    assert report.facts["absent"] == {"ort-cuda": "no cuda", "ort-tensorrt": "no tensorrt"}
    page = html_page(report)
    assert "Error by backend" in page
    assert "Unconverted model there" in page
    assert "no tensorrt" in page
    wrong = copy.deepcopy(net)
    with torch.no_grad():
        wrong.head.weight[0, 0] += 1e-2
    report = nc.verify(net, wrong, IMAGE, backends=["eager", "compile", "pt2"])
    assert errors(report) == ["eager output", "compile output", "pt2 output"]
    assert "head is the first to leave the bound" in report.failed_checks[0].way_out


def test_a_backend_that_is_asked_for_and_missing_fails(
    layer: Layer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "provider_problem", lambda p: f"no {p}")
    path = convolution(layer, tmp_path / "net.onnx")
    report = nc.verify(layer, path, IMAGE, backends=["ort-cuda", "eager"])
    assert {check.name: check.detail for check in report.failed_checks} == {
        "ort-cuda": "no cuda",
        "eager": "an .onnx file runs on ort-cpu and its like",
    }
    # Of all, none may be left without that being a failure.
    assert errors(nc.verify(layer, path, IMAGE, backends=["all"])) == ["backends"]


def test_wrong_words_are_told(layer: Layer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'tpu': there are eager, compile, pt2, ort-cpu"):
        chosen_backends(["tpu"], layer)
    with pytest.raises(UsageError, match="both a provider and backends"):
        nc.verify(layer, layer, IMAGE, provider="cpu", backends=["eager"])
    with pytest.raises(UsageError, match="no such file"):
        nc.verify(layer, tmp_path / "none.onnx", IMAGE, backends=["ort-cpu"])


def test_a_file_that_does_not_load_is_a_finding(layer: Layer, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a model")
    assert errors(nc.verify(layer, path, IMAGE, backends=["ort-cpu"])) == ["ort-cpu"]


# --- sizes --------------------------------------------------------------------------------------


def test_free_axes_of_a_file_are_run_at_other_sizes(layer: Layer, tmp_path: Path) -> None:
    path = convolution(layer, tmp_path / "net.onnx")
    report = nc.verify(layer, path, IMAGE, provider="cpu", other_sizes=True)
    assert report.passed, report.failed_checks
    assert set(report.facts["outputs"]) == {
        "output",
        "size batch 1 output",
        "size batch 3 output",
        "size width 5 output",
    }


def test_a_file_that_holds_at_one_size_only_is_seen(layer: Layer, tmp_path: Path) -> None:
    path = convolution(layer, tmp_path / "net.onnx", fixed=True)
    assert nc.verify(layer, path, IMAGE, provider="cpu").passed
    report = nc.verify(layer, path, IMAGE, provider="cpu", other_sizes=True)
    assert errors(report) == ["size width 5 candidate runs"]


def test_a_candidate_that_is_wrong_at_another_batch_is_seen(layer: Layer) -> None:
    class Wrong(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (1.0 if len(x) == 2 else 1.01)

    wrong = Wrong()
    wrong.load_state_dict(layer.state_dict())
    assert nc.verify(layer, wrong, IMAGE).passed
    report = nc.verify(layer, wrong, IMAGE, other_sizes=True)
    assert errors(report) == ["size batch 1 output", "size batch 3 output"]


def test_a_size_that_the_reference_refuses_is_noted(layer: Layer, tmp_path: Path) -> None:
    class Narrow(Layer):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] != 6:
                raise ValueError("only six pixels")
            return super().forward(x)

    narrow = Narrow()
    narrow.load_state_dict(layer.state_dict())
    report = nc.verify(
        narrow, convolution(layer, tmp_path / "n.onnx"), IMAGE, provider="cpu", other_sizes=True
    )
    assert report.passed
    assert any("width 5 not run" in note and "only six pixels" in note for note in report.notes)


# --- half precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_on_the_cpu_is_judged_by_its_rounded_weights(
    layer: Layer, tmp_path: Path, dtype: str
) -> None:
    path = convolution(layer, tmp_path / "half.onnx", dtype, width=6)
    report = nc.verify(layer, path, IMAGE, provider="cpu", other_sizes=True)
    assert report.passed, report.failed_checks
    assert any(f"does not compute in {dtype}" in note for note in report.notes)
    assert {"structure", "output"} <= {check.name for check in report.checks}
    row = report.facts["outputs"]["output"]
    eps = torch.finfo(getattr(torch, dtype)).eps
    assert row["dtype"] == "float64"
    assert eps / 100 < row["error"] < eps  # the rounding of weights and inputs, and it is seen
    assert 4 * eps <= row["bound"] < 8 * eps


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_wrong_weight_in_half_precision_is_seen(layer: Layer, tmp_path: Path, dtype: str) -> None:
    wrong = copy.deepcopy(layer)
    with torch.no_grad():
        wrong.conv.weight[0] *= 1.2
    path = convolution(wrong, tmp_path / "half.onnx", dtype, width=6)
    assert errors(nc.verify(layer, path, IMAGE, backends=["ort-cpu"])) == ["ort-cpu output"]


def test_a_half_file_whose_graph_is_wrong_is_seen(layer: Layer, tmp_path: Path) -> None:
    path = convolution(layer, tmp_path / "half.onnx", "float16", width=6)
    proto = onnx.load(path)
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 5
    onnx.save(proto, path)
    assert "structure" in errors(nc.verify(layer, path, IMAGE, provider="cpu"))


# --- the noise floor ----------------------------------------------------------------------------


def test_a_backend_is_forgiven_what_it_does_to_the_original_and_no_more(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that rounds to eleven bits: forgiven with TF32 on, and a fault without."""
    forward = runners.ModuleRunner.run

    def coarse(self, args, kwargs):
        outputs = forward(self, args, kwargs)
        return {name: value.half().float() for name, value in outputs.items()}

    class Coarse(runners.ModuleRunner):
        run = coarse
        provider = "cuda"

    monkeypatch.setattr(forms, "CompiledRunner", Coarse)
    monkeypatch.setattr(contenders, "compiler_problem", lambda: "")
    report = nc.verify(net, net, IMAGE, backends=["compile"])
    assert errors(report) == ["compile output"]
    report = nc.verify(net, net, IMAGE, backends=["compile"], tf32=True)
    assert report.passed, report.failed_checks
    assert report.facts["TF32"] == "allowed"
    row = report.facts["backends"]["compile"]["outputs"]["output"]
    assert row["floor"] == pytest.approx(row["error"])
    assert row["floor"] < 10 * floors.TF32_EPS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none")
@pytest.mark.parametrize("tf32", [False, True])
def test_on_cuda(net: nn.Module, tf32: bool) -> None:
    """TF32 is off for the proof; half precision is judged there in its own arithmetic."""
    report = nc.verify(
        net, copy.deepcopy(net).cuda(), IMAGE, backends=["eager", "ort-cuda"], tf32=tf32
    )
    assert report.passed, report.failed_checks
    half = nc.verify(net, copy.deepcopy(net).half().cuda(), IMAGE.half(), backends=["ort-cuda"])
    assert half.passed, half.failed_checks
    assert not half.notes

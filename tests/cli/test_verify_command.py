"""`normconv verify`: backends, real inputs, other sizes, the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app

RUNNER = CliRunner()


def invoke(*words: object, code: int = 0) -> str:
    result = RUNNER.invoke(app, ["verify", *map(str, words)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def invoke_json(*words: object, code: int = 0) -> dict[str, Any]:
    document = json.loads(invoke(*words, "--json", code=code))
    assert isinstance(document, dict)
    return document


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A module and an .onnx file of the same convolution."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()).eval()
    nc.save(net, tmp_path / "net.pt")
    weight = numpy_helper.from_array(net[0].weight.detach().numpy(), "w")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])],
        "net",
        [value("x", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [value("z", TensorProto.FLOAT, ["batch", 4, 6, 6])],
        [weight],
    )
    opset = helper.make_opsetid("", 20)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[opset]), tmp_path / "net.onnx")
    return tmp_path / "net.pt", tmp_path / "net.onnx"


def test_a_file_on_a_backend_at_other_batches(files: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "verify.html"
    words = (*files, "--input", "2x3x8x8", "--backend", "ort-cpu", "--report", page)
    document = invoke_json(*words)
    assert set(document["facts"]["backends"]["ort-cpu"]["outputs"]) == {
        "output",
        "size batch 1 output",
        "size batch 3 output",
    }
    assert "Error by backend" in page.read_text(encoding="utf-8")
    assert "✓ ort-cpu output" in invoke(*words)


def test_real_inputs(files: tuple[Path, Path], tmp_path: Path) -> None:
    """What is compared is what is given: a fault that noise does not show is seen."""
    np.savez(tmp_path / "data.npz", x=np.full((12, 3, 8, 8), 100.0, np.float32))
    document = invoke_json(*files, "--input", "2x3x8x8", "--data", tmp_path / "data.npz")
    assert document["facts"]["batches"] == 2
    assert document["facts"]["example inputs"].startswith("2 batches of ")
    assert {"batch 0 output", "batch 1 output"} <= set(document["facts"]["outputs"])
    invoke(*files, "--input", "2x3x8x8", "--data", tmp_path / "none.npz", code=2)
    module, clipped = files[0], onnx.load(files[1])
    clipped.graph.node[1].op_type = "Clip"
    clipped.graph.node[1].input.extend(["low", "high"])
    for name, limit in (("low", 0.0), ("high", 10.0)):
        clipped.graph.initializer.append(numpy_helper.from_array(np.float32(limit), name))
    onnx.save(clipped, tmp_path / "clipped.onnx")
    words = (module, tmp_path / "clipped.onnx", "--input", "2x3x8x8")
    invoke(*words)
    invoke(*words, "--data", tmp_path / "data.npz", code=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "tpu"), "'tpu': there are eager, compile, pt2"),
        (("--backend", "ort-cpu", "--provider", "cpu"), "both a provider and backends"),
        (("--device", "tpu"), "neither cpu nor cuda"),
    ],
)
def test_a_wrong_call_is_told(
    files: tuple[Path, Path], words: tuple[str, ...], message: str
) -> None:
    module = files[0]
    candidate = module if "--device" in words else files[1]
    out = invoke(module, candidate, "--input", "2x3x8x8", *words, code=2)
    assert message in " ".join(out.split())

"""Profiles, parts, the fallback, provenance, and files that repeat."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import normconv
from normconv.deploy import export as export_module
from normconv.deploy import export_onnx
from normconv.errors import Refused, UsageError
from tests.deploy.deploy_nets import Residual
from tests.deploy.tiny_speech import tiny

IMAGE = torch.linspace(-1, 1, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


@pytest.mark.parametrize(
    ("runtime", "opset", "form"),
    [("ort-cpu", None, "decomposed"), ("ort-cuda", 21, "node"), ("tensorrt", 18, "decomposed")],
)
def test_the_form_of_a_group_norm(runtime, opset, form, tmp_path):
    model = Residual(nn.GroupNorm(2, 8))
    path = tmp_path / "x.onnx"
    report = export_onnx(model, path, example_inputs=IMAGE, runtime=runtime, opset=opset)
    counts = report.facts["node_counts"]
    expected = "GroupNormalization" if form == "node" else "InstanceNormalization"
    assert report.facts["group_norm"] == form
    assert counts[expected] == 1
    assert len({"GroupNormalization", "InstanceNormalization"} & set(counts)) == 1


@pytest.mark.parametrize(("runtime", "opset"), [("ort-cpu", 21), ("tensorrt", 21), ("generic", 17)])
def test_an_opset_that_cannot_hold_the_model(runtime, opset, tmp_path):
    with pytest.raises(UsageError, match=f"opset: {opset} is not in 18 to 20 for {runtime}"):
        export_onnx(Residual(), tmp_path / "x", example_inputs=IMAGE, runtime=runtime, opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_runtime_and_an_absent_provider(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="'ort' is not one of generic"):
        export_onnx(Residual(), tmp_path / "x.onnx", example_inputs=IMAGE, runtime="ort")
    monkeypatch.setattr(
        export_module, "provider_problem", lambda name: "" if name == "cpu" else "no such device"
    )
    with pytest.raises(Refused, match="provider cuda: no such device"):
        export_onnx(
            Residual(), tmp_path / "x.onnx", example_inputs=IMAGE, providers=("cpu", "cuda")
        )
    assert list(tmp_path.iterdir()) == []
    report = export_onnx(Residual(), tmp_path / "x.onnx", example_inputs=IMAGE, runtime="tensorrt")
    assert any("not checked on tensorrt: no such device" in note for note in report.notes)


def test_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "x.onnx"
    path.write_bytes(b"older")

    def full(model, written):
        written.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_module, "save", full)
    with pytest.raises(UsageError, match=r"x\.onnx: it cannot be written: No space left"):
        export_onnx(Residual(), path, example_inputs=IMAGE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.onnx"]
    assert path.read_bytes() == b"older"


class Codec(nn.Module):
    """Has a method that a decoder's user wants."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 4, 3, padding=1)
        self.decoder = nn.Sequential(nn.Conv1d(4, 2, 3, padding=1), nn.Tanh())

    def forward(self, wave: Tensor) -> Tensor:
        return self.decode(self.encoder(wave), 1.0)

    def decode(self, codes: Tensor, gain: float = 2.0) -> Tensor:
        return self.decoder(codes) * gain


def modules_in(path: Path) -> set[str]:
    nodes = onnx.load(path).graph.node
    return {p.value for node in nodes for p in node.metadata_props if p.key == "normconv.module"}


def test_a_submodule_with_the_inputs_it_gets(tmp_path):
    report = export_onnx(
        Codec(), tmp_path / "x.onnx", example_inputs=torch.randn(2, 1, 7), at="decoder"
    )
    assert report.facts["example_shapes"] == {"input": [2, 4, 7]}
    assert report.facts["at"] == "decoder"
    assert any("inputs of decoder" in note for note in report.notes)
    with pytest.raises(UsageError, match="nearest: 'decoder'"):
        export_onnx(Codec(), tmp_path / "y.onnx", example_inputs=torch.randn(2, 1, 7), at="decode")


def test_another_method_keeps_its_names(tmp_path):
    model = Codec()
    path = tmp_path / "x.onnx"
    report = export_onnx(model, path, example_inputs=torch.randn(2, 4, 7), method="decode")
    assert report.facts["example_shapes"] == {"codes": [2, 4, 7]}
    assert {"decoder.0", "decoder.1"} <= modules_in(path)
    assert type(model) is Codec
    with pytest.raises(UsageError, match="method='deocde': the Codec has no such method"):
        export_onnx(model, path, example_inputs=torch.randn(2, 4, 7), method="deocde")


def test_what_torch_export_refuses_is_traced_and_checked(tmp_path):
    decoder = tiny("encodec").decoder
    path = tmp_path / "decoder.onnx"
    report = export_onnx(decoder, path, example_inputs=torch.randn(2, 16, 16))
    assert report.passed
    assert report.facts["exporter"] == "torchscript"
    assert any("dynamo=False" in note for note in report.notes)
    assert "layers.0.conv" in modules_in(path)


def test_a_converted_model_says_its_plan(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    converted = normconv.convert(model, "wn", example_inputs=IMAGE).model
    path = tmp_path / "x.onnx"
    export_onnx(converted, path, example_inputs=IMAGE)
    props = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert props["normconv.version"] == normconv.__version__
    assert props["normconv.target"] == "wn"
    assert len(props["normconv.plan"]) == 64


_EXPORT = """
import sys, torch, normconv
from torch import nn
from normconv.deploy import export_onnx
assert normconv.__file__.startswith(sys.argv[2]), normconv.__file__
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4)).eval()
x = torch.ones(2, 3, 6, 6)
net = normconv.convert(net, "wn", example_inputs=(x,)).model
export_onnx(net, sys.argv[1], example_inputs=(x,), check=False)
"""


@pytest.mark.slow
def test_two_installations_write_the_same_bytes(tmp_path):
    package = Path(normconv.__file__).parent
    digests = []
    for name, seed in (("one", "1"), ("another/place", "2")):
        root = tmp_path / name
        shutil.copytree(package, root / "normconv", ignore=shutil.ignore_patterns("__pycache__"))
        environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": seed}
        out = root / f"net{seed}.onnx"
        command = [sys.executable, "-c", _EXPORT, str(out), str(root)]
        subprocess.run(command, env=environment, cwd=root, check=True)
        assert str(tmp_path).encode() not in out.read_bytes()
        digests.append(hashlib.sha256(out.read_bytes()).hexdigest())
    assert digests[0] == digests[1]

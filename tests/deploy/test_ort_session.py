import builtins
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from normconv.deploy import Session, export_onnx
from normconv.errors import MissingDependency, Refused, UsageError
from tests.deploy.deploy_nets import Residual

IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("session") / "net.onnx"
    torch.manual_seed(0)
    export_onnx(Residual(), path, example_inputs=(IMAGE,), check=False)
    return path


def test_it_runs_a_path_and_bytes(file):
    for source in (file, str(file), file.read_bytes()):
        outputs = Session(source, "cpu").run({"x": IMAGE})
        assert list(outputs) == ["output"]
        assert outputs["output"].shape == (2, 5)
    same = Session(file, "cpu").run({"x": IMAGE.numpy()})["output"]
    assert np.array_equal(same, outputs["output"])


def test_it_counts_the_nodes_that_ran(file):
    session = Session(file, "cpu")
    counts = session.nodes_per_provider()
    assert set(counts) == {"cpu"}
    assert counts["cpu"] >= 4


def test_counting_falls_back_to_a_profile(file, monkeypatch):
    session = Session(file, "cpu")
    monkeypatch.setattr(
        type(session._session), "get_provider_graph_assignment_info", None, raising=True
    )
    counts = session.nodes_per_provider()
    assert set(counts) == {"cpu"}
    assert counts["cpu"] >= 4


def test_every_wrong_input_is_named(file):
    session = Session(file, "cpu")
    with pytest.raises(Refused, match=r"x: takes tensor\(float\), not tensor\(double\)"):
        session.run({"x": IMAGE.double()})
    with pytest.raises(Refused, match=r"x: takes the shape .*not \[2, 3, 6\]"):
        session.run({"x": IMAGE[..., 0]})
    with pytest.raises(Refused, match=r"(?s)2 problems.*image.*no such input.*x: .*missing"):
        session.run({"image": IMAGE})


def test_files_that_do_not_run(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        Session(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(Refused, match=r"bad\.onnx"):
        Session(tmp_path / "bad.onnx", "cpu")


def test_an_unknown_provider():
    with pytest.raises(UsageError, match="'tpu' is not one of cpu, cuda"):
        Session(b"", "tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_refused_and_silent(file, capfd):
    with pytest.raises(Refused, match="provider cuda"):
        Session(file, "cuda")
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def test_a_provider_that_took_no_node_is_refused(file, monkeypatch):
    monkeypatch.setattr(Session, "nodes_per_provider", lambda self: {"cpu": 3})
    monkeypatch.setitem(sys.modules["normconv.deploy.session"].PROVIDERS, "cuda", "Other")
    session = Session(file, "cpu")
    session.provider = "cuda"
    monkeypatch.setattr(session._session, "get_providers", lambda: ["Other"])
    with pytest.raises(Refused, match="it took no node"):
        session._require_provider()


def test_without_onnxruntime_the_extra_is_named(file, monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "onnxruntime":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    message = r"pip install 'normconv\[gpu\]' or 'normconv\[cpu\]'"
    with pytest.raises(MissingDependency, match=message):
        Session(file)
    with pytest.raises(MissingDependency, match=message):
        export_onnx(nn.Linear(2, 2), tmp_path / "x.onnx", example_inputs=(torch.zeros(2, 2),))
    assert not list(tmp_path.iterdir())


def test_half_precision_inputs_and_outputs():
    for kind, dtype in (
        (TensorProto.FLOAT16, torch.float16),
        (TensorProto.BFLOAT16, torch.bfloat16),
    ):
        graph = helper.make_graph(
            [helper.make_node("Cast", ["x"], ["y"], to=kind)],
            "g",
            [helper.make_tensor_value_info("x", kind, [2])],
            [helper.make_tensor_value_info("y", kind, [2])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model)
        outputs = Session(model.SerializeToString(), "cpu").run(
            {"x": torch.tensor([1.5, -2.0], dtype=dtype)}
        )
        assert outputs["y"].tolist() == [1.5, -2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none")
def test_on_cuda_the_nodes_run_on_cuda(file):
    session = Session(file, "cuda")
    assert session.nodes_per_provider().get("cuda", 0) > 0
    assert np.allclose(
        session.run({"x": IMAGE})["output"],
        Session(file, "cpu").run({"x": IMAGE})["output"],
        atol=1e-5,
    )

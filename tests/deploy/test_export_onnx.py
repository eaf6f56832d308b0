import copy
import hashlib
import logging
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import normconv
from normconv.deploy import Session, export_onnx, onnx_graph, write
from normconv.deploy import export as export_module
from normconv.deploy import parity as parity_module
from normconv.deploy.inputs import resized
from normconv.errors import CaptureError, CheckFailed, UsageError
from normconv.proof import evaluate
from tests.deploy.deploy_nets import (
    DataclassOut,
    FixedBatch,
    MixesSamples,
    Residual,
    Tokens,
    TwoInputs,
    quiet_weight_norm,
)


def image(batch: int = 2, size: int = 6) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def digest(model: nn.Module) -> str:
    parts = [f"{k}{v.sum().item()}{v.dtype}{v.shape}" for k, v in model.state_dict().items()]
    parts += [str(module.training) for module in model.modules()]
    parts += [str(sorted(model.__dict__))]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_residual_net(tmp_path, capfd):
    model = Residual().train()
    before = digest(model)
    report = export_onnx(model, tmp_path / "net.onnx", example_inputs=(image(),))
    assert report.passed
    assert digest(model) == before
    assert capfd.readouterr() == ("", "")
    written = {"net.onnx", "net.onnx.certificate.json"}
    assert {entry.name for entry in tmp_path.iterdir()} == written
    facts = report.facts
    assert facts["opset"] == {"ai.onnx": 20}
    assert facts["norm_nodes"] == 0
    assert facts["node_counts"]["Conv"] == 2
    assert facts["example_shapes"] == {"x": [2, 3, 6, 6]}
    assert facts["dynamic_axes"] == {"x": {0: "batch"}, "output": {0: "batch"}}
    assert facts["cpu run"]["nodes_by_provider"]["cpu"] > 4
    assert facts["bytes"] == (tmp_path / "net.onnx").stat().st_size
    assert {"fold", "export", "write", "check graph", "check numbers"} <= set(facts["seconds"])
    names = {check.name for check in report.checks}
    assert {f"cpu batch {n} output" for n in (1, 2, 3)} <= names
    report.to_json()


def test_the_batch_is_free(tmp_path):
    model = Residual()
    export_onnx(model, tmp_path / "net.onnx", example_inputs=image())
    session = Session(tmp_path / "net.onnx", "cpu")
    for batch in (1, 2, 3, 5):
        expected = evaluate(model, (image(batch),))["output"].numpy()
        got = session.run({"x": image(batch)})["output"]
        assert np.allclose(got, expected, atol=1e-5)


def test_an_example_of_one_sample_still_frees_the_batch(tmp_path):
    report = export_onnx(Residual(), tmp_path / "net.onnx", example_inputs=(image(1),))
    assert any("repeated" in note for note in report.notes)
    session = Session(tmp_path / "net.onnx", "cpu")
    assert session.run({"x": image(5)})["output"].shape == (5, 5)


def test_a_fixed_batch_on_request(tmp_path):
    path = tmp_path / "net.onnx"
    report = export_onnx(Residual(), path, example_inputs=(image(1),), dynamic_batch=False)
    assert report.facts["dynamic_axes"] == {}
    assert report.facts["example_shapes"] == {"x": [1, 3, 6, 6]}
    assert "cpu output" in [check.name for check in report.checks]


def test_a_batch_that_cannot_be_free_is_said(tmp_path):
    report = export_onnx(FixedBatch(), tmp_path / "x.onnx", example_inputs=(torch.randn(4, 6),))
    assert report.facts["dynamic_axes"] == {}
    assert "the batch axis is fixed at 4" in report.notes[0]


def test_samples_that_depend_on_each_other(tmp_path):
    """The sliced reference does not fit; the reference is run at each batch."""
    report = export_onnx(MixesSamples(), tmp_path / "x.onnx", example_inputs=(torch.randn(4, 6),))
    assert report.passed


def test_several_inputs_and_a_nested_output(tmp_path):
    model = TwoInputs()
    kwargs = {"shift": torch.randn(2, 4)}
    report = export_onnx(
        model, tmp_path / "x.onnx", example_inputs=(image(), torch.rand(2)), example_kwargs=kwargs
    )
    session = Session(tmp_path / "x.onnx", "cpu")
    assert [spec.name for spec in session.inputs] == ["image", "scale", "shift"]
    assert session.outputs == ("logits", "aux_0")
    assert report.facts["example_shapes"]["scale"] == [2]
    assert {"cpu batch 3 output.logits", "cpu batch 3 output.aux.0"} <= {
        check.name for check in report.checks
    }


def test_a_dataclass_output(tmp_path):
    export_onnx(DataclassOut(), tmp_path / "x.onnx", example_inputs=(torch.randn(2, 6),))
    assert Session(tmp_path / "x.onnx", "cpu").outputs == ("mean", "spread")


def test_a_tuple_output_and_given_names(tmp_path):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            return self.linear(x), x + 1

    x = (torch.randn(2, 6),)
    export_onnx(Both(), tmp_path / "x.onnx", example_inputs=x)
    assert Session(tmp_path / "x.onnx", "cpu").outputs == ("output_0", "output_1")
    export_onnx(
        Both(), tmp_path / "x.onnx", example_inputs=x, input_names=["v"], output_names=["a", "b"]
    )
    session = Session(tmp_path / "x.onnx", "cpu")
    assert ([s.name for s in session.inputs], session.outputs) == (["v"], ("a", "b"))
    with pytest.raises(UsageError, match=r"output_names: \['a'\] does not name 2"):
        export_onnx(Both(), tmp_path / "y.onnx", example_inputs=x, output_names=["a"])
    assert not (tmp_path / "y.onnx").exists()


@pytest.mark.parametrize(
    ("model", "inputs", "op"),
    [
        (Tokens(), torch.randn(2, 5, 16), "MatMul"),
        (nn.Linear(2048, 2048), torch.randn(2, 3, 2048), "MatMul"),
        (nn.Linear(2048, 2048), torch.randn(2, 2048), "Gemm"),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), torch.randn(2, 6, 5, 5), "ConvTranspose"),
        (nn.Conv1d(6, 6, 3, groups=6), torch.randn(2, 6, 9), "Conv"),
        (nn.Conv3d(2, 4, 3), torch.randn(2, 2, 4, 4, 4), "Conv"),
        (nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last), torch.randn(2, 8, 5, 5), "Conv"),
    ],
    ids=["tokens", "large-3d", "large-2d", "transposed", "depthwise", "conv3d", "channels-last"],
)
def test_weights_are_initializers(model, inputs, op, tmp_path):
    report = export_onnx(model, tmp_path / "x.onnx", example_inputs=(inputs,))
    assert report.facts["node_counts"][op] >= 1
    assert "Transpose" not in report.facts["node_counts"]


def test_weight_norm_is_folded_first(tmp_path):
    plain = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    reparametrised = copy.deepcopy(plain)
    for layer in (reparametrised[0], reparametrised[2]):
        quiet_weight_norm(layer)
    a = export_onnx(plain, tmp_path / "plain.onnx", example_inputs=(image(),))
    b = export_onnx(reparametrised, tmp_path / "wn.onnx", example_inputs=(image(),))
    assert a.facts["node_counts"] == b.facts["node_counts"]
    assert abs(a.facts["bytes"] - b.facts["bytes"]) < 200
    assert hasattr(reparametrised[0], "parametrizations")


def test_a_graph_module(tmp_path):
    model = torch.fx.symbolic_trace(Residual())
    report = export_onnx(model, tmp_path / "new" / "x.onnx", example_inputs=(image(),))
    assert report.facts["dynamic_axes"]["x"] == {0: "batch"}
    assert "forward" not in model.__dict__


def test_norms_are_counted(tmp_path):
    report = export_onnx(
        Residual(nn.GroupNorm(2, 8)), tmp_path / "x.onnx", example_inputs=(image(),)
    )
    assert report.facts["norm_nodes"] == 1
    assert report.facts["norm_kinds"] == {"GroupNormalization": 1}


def test_a_batch_norm_the_model_still_has_is_no_failure(tmp_path):
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
    report = export_onnx(model, tmp_path / "x.onnx", example_inputs=(image(),))
    assert report.facts["norm_kinds"] == {"BatchNormalization": 1}


@pytest.mark.parametrize("opset", [17, 21, 7])
def test_an_opset_out_of_range(opset, tmp_path):
    with pytest.raises(UsageError, match=rf"opset: {opset} is not in 18 to 20"):
        export_onnx(nn.Linear(2, 2), tmp_path / "x.onnx", example_inputs=(image(),), opset=opset)


@pytest.mark.parametrize("opset", [18, 19])
def test_other_opsets(opset, tmp_path):
    model = Residual(nn.GroupNorm(1, 8))
    report = export_onnx(model, tmp_path / "x.onnx", example_inputs=(image(),), opset=opset)
    assert report.facts["opset"] == {"ai.onnx": opset}


def test_external_data(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "EXTERNAL_DATA_THRESHOLD", 1000)
    report = export_onnx(Tokens(), tmp_path / "net.onnx", example_inputs=(torch.randn(2, 4, 16),))
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["net.onnx", "net.onnx.certificate.json", "net.onnx.data"]
    assert report.facts["external_data"]
    sizes = [(tmp_path / name).stat().st_size for name in ("net.onnx", "net.onnx.data")]
    assert report.facts["bytes"] == sum(sizes)
    assert (tmp_path / "net.onnx").stat().st_size < 5000
    assert onnx_graph.weight_arithmetic(tmp_path / "net.onnx") == []
    # The folder can be moved as it is.
    moved = tmp_path.parent / (tmp_path.name + "-moved")
    tmp_path.rename(moved)
    outputs = Session(moved / "net.onnx", "cpu").run({"tokens": torch.zeros(3, 4, 16)})
    assert outputs["output"].shape == (3, 4, 16)


def test_nothing_of_this_machine_is_in_the_file(tmp_path):
    export_onnx(Residual(), tmp_path / "x.onnx", example_inputs=(image(),), check=False)
    content = (tmp_path / "x.onnx").read_bytes()
    for trace in (b".py", b"stack_trace", b"site-packages", str(Path.cwd()).encode(), b"/tmp"):
        assert trace not in content
    proto = onnx.load(tmp_path / "x.onnx")
    assert {p.key: p.value for p in proto.metadata_props} == {
        "normconv.version": normconv.__version__
    }


# --- faults ---


def wrong_weight(monkeypatch, share=1e-3):
    """Let the file have one weight that is a little off."""
    real = export_module.save

    def save(model, path):
        value = next(iter(model.graph.initializers.values()))
        array = value.const_value.numpy().copy()
        array.flat[0] += share * np.linalg.norm(array)
        value.const_value = ir.tensor(array, name=value.name)
        real(model, path)

    monkeypatch.setattr(export_module, "save", save)


def test_a_wrong_file_is_rejected_and_the_older_stays(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    export_onnx(Residual(), path, example_inputs=(image(),))
    older = path.read_bytes()
    wrong_weight(monkeypatch)
    with pytest.raises(CheckFailed) as caught:
        export_onnx(Residual(), path, example_inputs=(image(),))
    assert path.read_bytes() == older
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "net.onnx",
        "net.onnx.certificate.json",
        "net.onnx.rejected",
    ]
    assert caught.value.report.facts["rejected"] == "net.onnx.rejected"
    failed = caught.value.report.failed_checks
    assert {check.name for check in failed} >= {"cpu batch 2 output"}
    assert all(check.measured > check.bound for check in failed if check.measured is not None)


def test_a_rejected_file_keeps_its_own_external_data(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "EXTERNAL_DATA_THRESHOLD", 100)
    path = tmp_path / "net.onnx"
    x = (torch.randn(2, 4, 16),)
    torch.manual_seed(1)
    export_onnx(Tokens(), path, example_inputs=x)
    older = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    wrong_weight(monkeypatch, 0.1)
    with pytest.raises(CheckFailed):
        export_onnx(Tokens(), path, example_inputs=x)
    assert {name: (tmp_path / name).read_bytes() for name in older} == older
    rejected = {"net.onnx.rejected", "net.onnx.rejected.data"}
    assert {p.name for p in tmp_path.iterdir()} == {*older, *rejected}
    Session(tmp_path / "net.onnx.rejected", "cpu").run({"tokens": torch.zeros(3, 4, 16)})


def test_a_structural_fault_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "clean", lambda model: None)
    with pytest.raises(CheckFailed, match="paths and stack traces"):
        export_onnx(Residual(), tmp_path / "x.onnx", example_inputs=(image(),), check=False)


def test_a_batch_norm_too_many_is_a_failure(tmp_path, monkeypatch):
    real = export_module.to_onnx_or_traced

    def claims_none(*args, **kwargs):
        program = real(*args, **kwargs)
        return program.__class__(**{**program.__dict__, "batch_norms": 0})

    monkeypatch.setattr(export_module, "to_onnx_or_traced", claims_none)
    model = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))
    with pytest.raises(CheckFailed, match="BatchNormalization nodes: 1 is not <= 0"):
        export_onnx(model, tmp_path / "x.onnx", example_inputs=(image(),))


@pytest.mark.parametrize(
    "where", ["to_onnx_or_traced", "clean", "save", "_with_graph", "backend_parity"]
)
def test_no_partial_file_when_something_breaks(where, tmp_path, monkeypatch):
    def breaks(*args, **kwargs):
        raise RuntimeError("broken")

    monkeypatch.setattr(export_module, where, breaks)
    model = Residual()
    before = digest(model)
    with pytest.raises(RuntimeError, match="broken"):
        export_onnx(model, tmp_path / "x.onnx", example_inputs=(image(),))
    assert list(tmp_path.iterdir()) == []
    assert digest(model) == before


def test_a_model_that_cannot_be_captured(tmp_path, caplog):
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            h = self.linear(x)
            return h if h.sum().item() > 0 else -h

    # Nothing would show that a trace of one branch is wrong.
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CaptureError, match=r"Looks: torch\.export"),
    ):
        export_onnx(Looks(), tmp_path / "x.onnx", example_inputs=(torch.randn(2, 6),), check=False)
    assert list(tmp_path.iterdir()) == []
    # A trace of one branch would be wrong for the other.
    with pytest.raises(CaptureError, match=r"reads of its inputs' values \(a Python number\)"):
        export_onnx(Looks(), tmp_path / "x.onnx", example_inputs=(torch.randn(2, 6),))
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_the_exporter_is_not_forgiven_as_noise(tmp_path, monkeypatch):
    """The unfolded original would have the same fault: what it may forgive is limited."""
    wrong_weight(monkeypatch)
    monkeypatch.setattr(parity_module, "save", export_module.save)
    with pytest.raises(CheckFailed):
        export_onnx(Residual(), tmp_path / "x.onnx", example_inputs=(image(),))


def test_a_batch_that_is_not_free_after_all_is_seen(tmp_path, monkeypatch):
    """A file with its example's batch written into it fails at the other batches."""
    real = export_module.to_onnx_or_traced

    def claims_free(*args, **kwargs):
        program = real(*args, **{**kwargs, "dynamic_batch": False})
        return program.__class__(**{**program.__dict__, "dynamic": True})

    monkeypatch.setattr(export_module, "to_onnx_or_traced", claims_free)
    with pytest.raises(CheckFailed, match=r"cpu batch 3 run: x: takes.*dynamic_batch=False"):
        export_onnx(Residual(), tmp_path / "x.onnx", example_inputs=(image(),))


# --- dtypes ---


def test_float64_without_kernels_is_checked_by_its_graph_only(tmp_path):
    model = nn.Conv2d(3, 4, 3).double()
    report = export_onnx(model, tmp_path / "x.onnx", example_inputs=(image().double(),))
    assert report.passed
    if not any(check.name.startswith("cpu ") for check in report.checks):
        assert any("float64" in note for note in report.notes)


def test_float64_with_kernels_is_held_to_float64(tmp_path):
    model = nn.Linear(6, 4).double()
    report = export_onnx(model, tmp_path / "x.onnx", example_inputs=(torch.randn(2, 6).double(),))
    (check,) = [c for c in report.checks if c.name == "cpu batch 2 output"]
    assert check.bound == 1e-10
    assert check.measured < 1e-14


def test_float16_on_cpu_is_noted(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).half()
    report = export_onnx(model, tmp_path / "x.onnx", example_inputs=(image().half(),))
    assert any("float16" in note for note in report.notes)


# --- the batch ---


def test_resized_makes_samples_that_differ():
    x = torch.ones(2, 3)
    wider = resized((x, torch.ones(5), 7), 2, 5)
    assert wider[0].shape == (5, 3)
    assert torch.equal(wider[0][:2], x)
    assert wider[0][:, 0].tolist() == [1.0, 1.0, 0.875, 0.875, 0.75]
    assert wider[1].shape == (5,)
    assert resized(x, 2, 1).shape == (1, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none")
def test_on_both_providers(tmp_path):
    report = export_onnx(
        Residual(), tmp_path / "x.onnx", example_inputs=(image(),), providers=["cpu", "cuda"]
    )
    assert report.facts["cuda run"]["nodes_by_provider"]["cuda"] > 0


def pad_of_zeros_before_a_maximum() -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    nn.init.constant_(conv.bias, -9.0)
    return nn.Sequential(conv, nn.ConstantPad2d(1, 0.0), nn.MaxPool2d(3, 2)).eval()


@pytest.mark.parametrize("mended", [True, False])
def test_zeros_padded_before_a_maximum_stay_zeros(
    mended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = pad_of_zeros_before_a_maximum(), torch.randn(2, 3, 12, 12)
    if not mended:  # ONNX Runtime's fault, and the check that sees it
        monkeypatch.setattr("normconv.deploy.clean._keep_zeros_before_maxima", lambda model: None)
        with pytest.raises(CheckFailed, match="output"):
            export_onnx(net, tmp_path / "net.onnx", example_inputs=(x,))
        return
    assert export_onnx(net, tmp_path / "net.onnx", example_inputs=(x,)).passed
    (pad,) = (n for n in onnx.load(tmp_path / "net.onnx").graph.node if n.op_type == "Pad")
    assert len(pad.input) >= 3
    assert pad.input[2]

import copy

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from normconv.deploy import export_onnx, verify
from normconv.deploy.compare import Reference, agreement, compare
from normconv.deploy.floors import Floors
from normconv.errors import LoadError, MissingDependency, Refused, UsageError
from tests.deploy.deploy_nets import Residual, Tokens, TwoInputs


def image(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 6, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Residual()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "net.onnx"
    export_onnx(model, path, example_inputs=(image(),), check=False)
    return path


@pytest.fixture(scope="module")
def program(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "net.pt2"
    dim = torch.export.Dim("batch")
    was = model.training
    captured = torch.export.export(
        model.eval(), (image(),), dynamic_shapes={"x": {0: dim}}, strict=False
    )
    model.train(was)
    torch.export.save(captured, path)
    return path


def perturbed(model: nn.Module, share: float = 1e-3) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        weight = twin.stem.weight
        weight.view(-1)[0] += share * weight.norm()
    return twin


def test_every_form_against_every_form(model, file, program):
    for reference in (model, program, file):
        for candidate in (model, copy.deepcopy(model), program, file):
            report = verify(reference, candidate, image())
            assert report.passed, (reference, candidate, report.failed_checks)
    assert verify(program, file, image()).facts["reference"] == "float64 run"
    assert "rounding step" in verify(file, model, image()).facts["reference"]


def test_what_is_reported(model, file):
    report = verify(model, file, image())
    row = report.facts["outputs"]["output"]
    assert 0 < row["error"] < row["bound"] < 1e-5
    assert row["cosine"] > 0.999999
    assert row["max_abs_over_rms"] < 1e-5
    assert (row["top1"], row["top1_rows"], row["top1_counted"]) == (1.0, 4, 0)
    assert report.facts["nodes_by_provider"]["cpu"] > 4
    assert report.facts["sight"]["output"] > 1e-2
    assert report.subject == f"{file} against Residual"
    report.to_json()


@pytest.mark.parametrize("form", ["module", "onnx"])
def test_a_perturbed_weight_fails(model, form, tmp_path):
    twin = perturbed(model)
    candidate = twin
    if form == "onnx":
        candidate = tmp_path / "x.onnx"
        export_onnx(twin, candidate, example_inputs=(image(),), check=False)
    report = verify(model, candidate, image())
    (failed,) = [c for c in report.failed_checks if c.name == "output"]
    assert failed.measured > 10 * failed.bound


def test_nan_fails(model):
    class Nan(nn.Module):
        def forward(self, x):
            out = torch.zeros(x.shape[0], 5)
            out[0, 0] = float("nan")
            return out

    report = verify(model, Nan(), image())
    assert "NaN in 1 of 20" in report.failed_checks[0].detail
    # Nor does NaN equal NaN.
    assert not verify(Nan(), Nan(), image()).passed


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


def test_wrong_shape_missing_and_extra_outputs_fail():
    two = Returns(lambda x: {"a": x.mean((2, 3)), "b": x.sum(1)})
    report = verify(two, Returns(lambda x: {"a": x.mean((2, 3))}), image())
    assert [c.detail for c in report.failed_checks] == [
        "this output is missing; the candidate gives output.a"
    ]
    report = verify(Returns(lambda x: {"a": x.mean((2, 3))}), two, image())
    assert "this output is too many" in report.failed_checks[0].detail
    report = verify(two, Returns(lambda x: {"a": x.mean((2, 3)), "b": x.sum(1)[:, :3]}), image())
    assert report.failed_checks[0].detail == "the shape is [4, 3, 6], not [4, 6, 6]"
    # A shape that would broadcast is wrong all the same.
    report = verify(two, Returns(lambda x: {"a": x.mean((2, 3)), "b": x.sum(1)[:1]}), image())
    assert not report.passed


def test_an_onnx_file_without_an_output_fails(file, model, tmp_path):
    proto = onnx.load(file)
    proto.graph.output[0].name = "other"
    proto.graph.node[-1].output[0] = "other"
    onnx.save(proto, tmp_path / "renamed.onnx")
    # Names of other tools are matched by order.
    assert verify(model, tmp_path / "renamed.onnx", image()).passed
    both = Returns(lambda x: (model(x), x))
    report = verify(both, file, image())
    # The module in the closure is not cast: the float64 run fails, and that is said.
    assert "rounding step" in report.facts["reference"]
    assert not verify(both, file, image()).passed


def test_a_missing_initializer_value_fails(file, model, tmp_path):
    proto = onnx.load(file)
    for tensor in proto.graph.initializer:
        if tensor.name == "head.weight":
            array = numpy_helper.to_array(tensor) * 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, tmp_path / "zero.onnx")
    assert not verify(model, tmp_path / "zero.onnx", image()).passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_wrong_provider_fails(model, file):
    report = verify(model, file, image(), provider="cuda")
    assert not report.passed
    assert "provider cuda" in report.failed_checks[0].detail
    report = verify(model, model, image(), provider="cuda")
    assert report.failed_checks[0].detail == "the candidate ran on cpu, asked for was cuda"


def test_inputs_that_do_not_fit_a_file_are_a_finding(file):
    report = verify(nn.Flatten(), file, torch.randn(2, 3, 4, 4, 1))
    assert "takes the shape" in report.failed_checks[0].detail
    report = verify(nn.Bilinear(6, 6, 2), file, (image(), image()))
    assert "2 tensors were given" in report.failed_checks[0].detail


def test_a_candidate_that_raises_is_a_finding(model):
    def raises(x):
        raise ValueError("no such thing")

    report = verify(model, Returns(raises), image())
    assert report.failed_checks[0].detail == "ValueError: no such thing"


def test_wrong_calls_raise(model, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        verify(model, tmp_path / "none.onnx", image())
    with pytest.raises(UsageError, match="there is no batch"):
        verify(model, model, [])
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UsageError, match=r"only \.onnx and \.pt2"):
        verify(model, tmp_path / "x.txt", image())
    (tmp_path / "x.pt2").write_bytes(b"nothing")
    with pytest.raises(LoadError, match="no exported program"):
        verify(tmp_path / "x.pt2", model, image())
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    with pytest.raises(Refused):
        verify(tmp_path / "x.onnx", model, image())
    assert not verify(model, tmp_path / "x.onnx", image()).passed


def test_a_missing_runtime_is_no_finding(model, file, monkeypatch):
    def missing():
        raise MissingDependency.needs("ONNX Runtime", "gpu", "cpu")

    monkeypatch.setattr("normconv.deploy.session.onnxruntime_module", missing)
    with pytest.raises(MissingDependency):
        verify(model, file, image())


def test_a_reference_that_differs_from_itself_fails():
    state = {"calls": 0}

    def drifts(x):
        state["calls"] += 1
        return x * (1 + 1e-3 * state["calls"])

    report = verify(Returns(drifts), Returns(lambda x: x), image())
    (failed,) = report.failed_checks
    assert failed.name == "reference repeats"
    assert "Returns differs from itself in output" in failed.detail


def test_seeded_noise_is_fixed():
    noisy = Returns(lambda x: x + torch.randn(x.shape))
    assert verify(noisy, Returns(lambda x: x), image()).failed_checks[0].name == "output"


def test_a_blind_check_is_said():
    class Blind(nn.Module):
        def forward(self, x):
            return torch.ones(x.shape[0], 3, dtype=x.dtype) + 1e-6 * x.mean((2, 3))

    report = verify(Blind(), Blind(), image())
    assert report.passed
    assert any("nearly blind" in note for note in report.notes)


def test_batches_and_keyword_inputs(tmp_path):
    torch.manual_seed(0)
    model = TwoInputs()
    batches = [((image(n), torch.rand(n)), {"shift": torch.randn(n, 4)}) for n in (2, 5)]
    path = tmp_path / "two.onnx"
    args, kwargs = batches[0]
    export_onnx(model, path, example_inputs=args, example_kwargs=kwargs, check=False)
    report = verify(model, path, batches)
    assert report.passed, report.failed_checks
    assert {"batch 0 output.logits", "batch 1 output.aux.0"} <= {c.name for c in report.checks}
    assert report.facts["batches"] == 2


def test_integers_must_be_equal():
    classes = Returns(lambda x: x.flatten(1).argmax(1))
    assert verify(classes, classes, image()).passed
    assert not verify(classes, Returns(lambda x: x.flatten(1).argmax(1) + 1), image()).passed


def test_a_calibrated_conversion_is_held_to_what_was_asked(model):
    twin = perturbed(model, 0.05)
    assert not verify(model, twin, image()).passed
    loose = verify(model, twin, image(), max_error=0.5, min_agreement=0.5)
    assert loose.passed
    strict = verify(model, Returns(lambda x: -model(x)), image(), max_error=5.0, min_agreement=0.9)
    assert [c.name for c in strict.failed_checks] == ["output top-1"]


def test_agreement_counts_only_what_rounding_does_not_explain():
    exact = torch.tensor([[1.0, 0.0], [1.0, 1.0 - 1e-9], [0.0, 2.0]], dtype=torch.float64)
    candidate = torch.tensor([[0.0, 1.0], [1.0 - 1e-6, 1.0], [0.0, 2.0]])
    met = agreement(candidate, exact, 1e-6)
    assert (met.rows, met.same, met.counted) == (3, 1, 1)
    assert agreement(candidate, exact, float("nan")).counted == 2


def test_the_originals_own_error_sets_the_bound():
    exact = {"output": torch.tensor([1.0, 1.0], dtype=torch.float64)}
    native = {"output": torch.tensor([1.0, 1.001])}
    reference = Reference(exact, native)
    off = {"output": torch.tensor([1.0, 1.003])}
    assert compare(off, reference).checks[0].passed
    assert not compare({"output": torch.tensor([1.0, 1.005])}, reference).checks[0].passed
    broken = Reference(exact, {"output": torch.tensor([1.0, float("nan")])})
    (check,) = compare(off, broken).checks
    assert not check.passed
    assert check.detail == "the original itself breaks in its own dtype"


def test_the_backend_is_asked_for_its_own_error_only_after_a_miss(model, file, monkeypatch):
    asked = []

    def ask(*args):
        asked.append(args)
        return {}

    monkeypatch.setattr(Floors, "errors", ask)
    assert verify(model, file, image()).passed
    assert not asked
    assert not verify(perturbed(model), file, image()).passed
    assert asked


def test_what_the_backend_forgives_is_limited(model, file):
    """The perturbed reference runs well there, so its error there forgives nothing."""
    report = verify(perturbed(model), file, image())
    (failed,) = [c for c in report.failed_checks if c.name == "output"]
    assert failed.bound < 1e-4


def test_half_precision_candidates_get_the_bound_of_their_dtype(tmp_path):
    torch.manual_seed(0)
    model = Tokens()
    half = copy.deepcopy(model).half()
    path = tmp_path / "half.onnx"
    x = torch.randn(2, 5, 16)
    export_onnx(half, path, example_inputs=(x.half(),), check=False)
    report = verify(model, path, x)
    assert report.passed, report.failed_checks
    assert report.facts["outputs"]["output"]["bound"] >= 4 * torch.finfo(torch.float16).eps

"""Named free axes: in the file, held to the original at other sizes, refused where a size is fixed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normconv.deploy import Session, export_onnx
from normconv.deploy import export as export_module
from normconv.deploy import tracing as tracing_module
from normconv.deploy.axes import parse_axes
from normconv.errors import CaptureError, CheckFailed, Problem, Refused, UsageError
from normconv.proof import evaluate


class Vocoder(nn.Module):
    """Mel frames to samples: two samples per frame."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3, padding=1))
        self.up = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.out = nn.Conv1d(8, 1, 3, padding=1)

    def forward(self, mel: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(torch.relu(self.inner(mel)))))


class Halved(nn.Module):
    """A U-Net of one level: it takes even sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return image + self.up(torch.relu(self.down(image)))


class Baked(nn.Module):
    """The length goes through a Python number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.5, 1.0, int(x.shape[2]))


class Branches(nn.Module):
    """Short inputs take another way, which a capture does not hold."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[2] > 8 else x * 3


def mel(frames: int = 16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, frames, generator=torch.Generator().manual_seed(frames))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_frames_of_a_vocoder(tmp_path):
    model = Vocoder()
    path = tmp_path / "v.onnx"
    report = export_onnx(model, path, example_inputs=mel(), dynamic={2: "frames"})
    assert report.facts["dynamic_axes"] == {
        "mel": {0: "batch", 2: "frames"},
        "output": {0: "batch", 2: "2*frames"},
    }
    names = {check.name for check in report.checks}
    assert {f"cpu frames {n} output" for n in (13, 17)} <= names
    assert {f"cpu batch {n} output" for n in (1, 2, 3)} <= names
    session = Session(path, "cpu")
    for frames in (1, 5, 40):
        exact = evaluate(model, (mel(frames, 3),))["output"]
        found = torch.from_numpy(session.run({"mel": mel(frames, 3)})["output"])
        assert torch.allclose(found, exact, atol=1e-5)


def test_height_and_width_where_odd_sizes_are_refused_by_the_model(tmp_path):
    report = export_onnx(
        Halved(),
        tmp_path / "u.onnx",
        example_inputs=torch.randn(1, 3, 12, 8),
        dynamic={"image": {0: "n", 2: "height", 3: "width"}},
    )
    axes = report.facts["dynamic_axes"]
    assert axes["image"] == {0: "n", 2: "height", 3: "width"}
    assert set(axes["output"]) == {0, 2, 3}
    names = {check.name for check in report.checks}
    assert {"cpu height 8 output", "cpu height 16 output"} <= names
    assert {"cpu width 4 output", "cpu width 12 output", "cpu n 3 output"} <= names
    assert any(note.startswith("height 11: the model itself") for note in report.notes)


def test_a_size_that_the_model_fixes_is_refused(tmp_path):
    with pytest.raises(
        Refused, match=r"'frames': the model fixes its size at 16: .*16 <= .*; leave"
    ):
        export_onnx(Baked(), tmp_path / "x.onnx", example_inputs=mel(), dynamic={2: "frames"})
    assert list(tmp_path.iterdir()) == []
    # The batch axis alone is no matter.
    export_onnx(Baked(), tmp_path / "x.onnx", example_inputs=mel())


def test_sizes_beyond_a_branch_are_run(tmp_path):
    with pytest.raises(CheckFailed, match="cpu frames 8 output"):
        export_onnx(Branches(), tmp_path / "x.onnx", example_inputs=mel(), dynamic={2: "frames"})


@pytest.mark.slow
def test_the_time_axis_of_a_recurrent_layer(tmp_path):
    """torch.export unrolls it; the tracer does not."""

    class Gru(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0]

    path = tmp_path / "x.onnx"
    report = export_onnx(Gru(), path, example_inputs=torch.randn(2, 3, 4), dynamic={1: "time"})
    assert report.facts["exporter"] == "torchscript"
    assert report.facts["dynamic_axes"]["output"] == {0: "batch", 1: "time"}
    assert report.facts["node_counts"]["GRU"] == 1


def untraceable(monkeypatch) -> None:
    def fails(model, *args, **kwargs):
        raise CaptureError(Problem("model", "torch.export made no ONNX graph"))

    monkeypatch.setattr(tracing_module, "to_onnx", fails)


def test_a_traced_file_has_the_axes_too(tmp_path, monkeypatch):
    untraceable(monkeypatch)
    path = tmp_path / "v.onnx"
    report = export_onnx(Vocoder(), path, example_inputs=mel(), dynamic={2: "frames"})
    assert report.facts["exporter"] == "torchscript"
    assert report.facts["dynamic_axes"] == {
        "mel": {0: "batch", 2: "frames"},
        "output": {0: "batch", 2: "output_2"},
    }
    assert "cpu frames 13 output" in {check.name for check in report.checks}


def test_a_trace_of_one_branch_is_caught(tmp_path, monkeypatch):
    untraceable(monkeypatch)
    with pytest.raises(CheckFailed, match="cpu frames 4 output"):
        export_onnx(Branches(), tmp_path / "x.onnx", example_inputs=mel(), dynamic={2: "frames"})


def test_a_traced_file_that_holds_a_size_is_caught(tmp_path, monkeypatch):
    untraceable(monkeypatch)
    with pytest.raises(CheckFailed, match=r"cpu frames 13 run"):
        export_onnx(Baked(), tmp_path / "x.onnx", example_inputs=mel(), dynamic={2: "frames"})
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.onnx.rejected"]


def test_a_file_that_says_free_and_is_not_is_caught(tmp_path, monkeypatch):
    real = export_module.to_onnx_or_traced

    def fixed(*args, free, **kwargs):
        return real(*args, **kwargs)

    monkeypatch.setattr(export_module, "to_onnx_or_traced", fixed)
    with pytest.raises(CheckFailed, match=r"cpu frames 13 run: mel: takes"):
        export_onnx(Vocoder(), tmp_path / "x.onnx", example_inputs=mel(), dynamic={2: "frames"})


def test_an_axis_of_two_inputs_and_of_size_one(tmp_path):
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * mask[:, None]

    report = export_onnx(
        Masked(),
        tmp_path / "x.onnx",
        example_inputs=(mel(1, 1), torch.ones(1, 1)),
        dynamic={"x": {2: "frames"}, "mask": {1: "frames"}},
    )
    named = {"x": {0: "batch", 2: "frames"}, "mask": {0: "batch", 1: "frames"}}
    assert report.facts["dynamic_axes"] == {**named, "output": named["x"]}


def test_everything_that_is_wrong_is_listed(tmp_path):
    asked = {1: "9", 7: "far", "y": {0: "n"}, "mel": {3: "deep", 2: "frames", 0: "frames"}}
    with pytest.raises(UsageError) as failure:
        export_onnx(Vocoder(), tmp_path / "x.onnx", example_inputs=mel(), dynamic=asked)
    text = str(failure.value)
    assert "dynamic axis 7: no input has it: mel is 2x4x16" in text
    assert "dynamic 'y': there is no such input; name mel" in text
    assert "the input is 2x4x16: it has no axis 3" in text
    assert "names two axes of one input: mel:2 of size 16, mel:0 of size 2" in text
    assert "'9' is not a name" in text
    assert len(failure.value.problems) == 5
    assert list(tmp_path.iterdir()) == []


def test_one_name_for_two_sizes(tmp_path):
    asked = {"input1": {0: "n"}, "input2": {0: "n"}}
    with pytest.raises(UsageError, match="different sizes: input1:0 of size 2, input2:0 of size 3"):
        export_onnx(
            nn.Bilinear(4, 4, 1),
            tmp_path / "x.onnx",
            example_inputs=(torch.ones(2, 4), torch.ones(3, 4)),
            dynamic=asked,
        )


def test_the_command_line_form():
    assert parse_axes(["0=batch,x:2=frames", "x:1=c"]) == {0: "batch", "x": {2: "frames", 1: "c"}}
    with pytest.raises(UsageError) as failure:
        parse_axes(["frames", "2=a,2=b", "x:-1=c"])
    assert len(failure.value.problems) == 3

"""`normconv fold`: folders of transformers, whole modules with torch's hooks, --strict, --standalone."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.demo import DigitsResNet
from normconv.deploy import folded_folder
from normconv.deploy.reload import Reloaded, load_and_run
from normconv.layers import ChannelAffine

RUNNER = CliRunner()
speech = pytest.importorskip("tests.deploy.tiny_speech")


def invoke(*words: object, code: int = 0) -> dict[str, Any]:
    result = RUNNER.invoke(app, ["fold", *(str(word) for word in words), "--json"])
    assert result.exit_code == code, result.output
    document = json.loads(result.stdout)
    assert isinstance(document, dict)
    return document


@pytest.fixture(scope="module")
def encodec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = speech.save_tiny("encodec", tmp_path_factory.mktemp("speech") / "codec")
    return folder


def test_a_folder_proved_in_a_fresh_process(encodec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    document = invoke(f"transformers:{encodec}", "-o", out, "--input", "2x1x64", "--strict")
    assert document["passed"]
    assert document["facts"]["written"] == {"folder": str(out)}
    reloaded = [c["name"] for c in document["checks"] if c["name"].startswith("reloaded: output")]
    assert "reloaded: output.audio_values" in reloaded
    model = nc.load_folded("EncodecModel", out)
    original = nc.load(f"transformers:{encodec}")
    x = speech.inputs_of("encodec")["input_values"]
    with torch.no_grad():
        expected, got = original(x).audio_values, model(x).audio_values
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_the_folder_s_name_without_one(
    encodec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded_folder, "reload_folder", load_and_run)
    monkeypatch.chdir(tmp_path)
    words = ("--layout", "library", "--input", "2x1x64")
    document = invoke(f"transformers:{encodec}", *words)
    assert document["facts"]["written"] == {"folder": "codec.folded"}
    assert (tmp_path / "codec.folded" / "model.safetensors").is_file()


def test_a_folder_that_computes_something_else(
    encodec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(folder: Path, args: Any, kwargs: Any) -> Reloaded:
        made = load_and_run(folder, args, kwargs)
        made.outputs["output.audio_values"][0, 0, 0] = float("nan")
        return made

    monkeypatch.setattr(folded_folder, "reload_folder", wrong)
    out = tmp_path / "out"
    document = invoke(f"transformers:{encodec}", "-o", out, "--input", "2x1x64", code=1)
    assert [p["where"] for p in document["problems"]] == ["reloaded: output.audio_values"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json.rejected"]


def test_what_does_not_go_together(encodec: Path, tmp_path: Path) -> None:
    source = f"transformers:{encodec}"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.txt").write_text("mine")
    nc.save(nn.Linear(2, 2), tmp_path / "net.pt")
    for words, where in (
        ((source, "-o", tmp_path / "full"), "--out"),
        ((source, "-o", encodec / "inner"), "--out"),
        ((source, "-o", tmp_path / "out", "--layout", "flat"), "--layout"),
        ((source, "-o", tmp_path / "out", "--affine"), "--affine"),
        ((source, "-o", tmp_path / "out", "--model-arg", "a=1"), "--model-arg"),
        ((tmp_path / "net.pt", "--layout", "library"), "--layout"),
    ):
        assert invoke(*words, code=2)["problems"][0]["where"] == where
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["full", "net.pt"]


def test_a_transformers_model_as_a_file(encodec: Path, tmp_path: Path) -> None:
    out = tmp_path / "codec.pt"
    invoke(f"transformers:{encodec}", "-o", out, "--input", "2x1x64")
    assert not [key for key in nc.load(out).state_dict() if "original" in key]


def test_hooks_of_torch_in_a_whole_module(tmp_path: Path) -> None:
    """Weight norm and spectral norm hang on a module as hooks; the file is loaded safely all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(
            weight_norm(nn.Conv1d(3, 4, 3)), nn.ReLU(), spectral_norm(nn.Conv1d(4, 2, 1))
        )
        net(torch.randn(2, 3, 8))  # one step of the power iteration
        net.eval()(torch.randn(2, 3, 8))
    torch.save(net, tmp_path / "net.pt")
    x = torch.randn(2, 3, 8)
    document = invoke(tmp_path / "net.pt", "--input", "2x3x8", "--strict")
    assert sum(document["facts"]["folded"].values()) == 2
    assert document["facts"]["left"] == 0
    folded = torch.load(tmp_path / "net.folded.pt", weights_only=False)
    assert not [hook for module in folded.modules() for hook in module._forward_pre_hooks]
    torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-6)


NETS = """
import torch
from torch import nn
from torch.nn.utils import parametrize


class Noise(nn.Module):
    def forward(self, weight):
        return weight + 1e-9 * torch.rand_like(weight)


def noisy():
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    parametrize.register_parametrization(net[0], "weight", Noise())
    return net
"""


def test_strict_refuses_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strict_nets.py").write_text(NETS)
    out = tmp_path / "net.safetensors"
    words = ("strict_nets:noisy", "--input", "2x3", "-o", out)
    document = invoke(*words, "--strict", code=3)
    assert [problem["where"] for problem in document["problems"]] == ["0"]
    assert not out.exists()
    document = invoke(*words)
    assert document["facts"]["left"] == 1
    assert any(note.startswith("0: ") for note in document["notes"])


def test_standalone_is_the_default(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())
    converted = nc.convert(net, "wn", example_inputs=(torch.randn(2, 3, 8, 8),)).model
    source = tmp_path / "net.pt"
    nc.save(converted, source)
    words = (source, "--input", "2x3x8x8")
    invoke(*words)
    invoke(*words, "--no-standalone", "-o", tmp_path / "with.pt")
    alone = nc.load(tmp_path / "net.folded.pt")
    homes = {type(module).__module__.partition(".")[0] for module in alone.modules()}
    assert "normconv" not in homes
    blocked = (
        "import sys, torch; sys.modules['normconv'] = None; "
        "net = torch.load(sys.argv[1], weights_only=False); "
        "print(type(net).__name__, tuple(net(torch.ones(2, 3, 8, 8)).shape))"
    )
    words = [sys.executable, "-I", "-c", blocked, str(tmp_path / "net.folded.pt")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Sequential (2, 4, 6, 6)"
    refused = subprocess.run([*words[:-1], str(tmp_path / "with.pt")], capture_output=True)
    assert refused.returncode != 0  # the block works
    kept = nc.load(tmp_path / "with.pt")
    assert any(isinstance(module, ChannelAffine) for module in kept.modules())


def test_a_model_of_normconv_s_own_is_told(tmp_path: Path) -> None:
    nc.save(DigitsResNet().eval(), tmp_path / "net.pt")
    words = (tmp_path / "net.pt", "--input", "2x1x8x8")
    assert any("only with normconv" in note for note in invoke(*words)["notes"])
    assert "DigitsResNet" in str(invoke(*words, "--standalone", code=2)["problems"])


def test_norms_become_constants(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    source, data = tmp_path / "net.pt", tmp_path / "x.pt"
    torch.save(net, source)
    torch.save(torch.randn(64, 3, 8, 8), data)
    out = tmp_path / "frozen.pt"
    words = (source, "--freeze-norms", "-o", out, "--input", "2x3x8x8", "--device", "cpu")
    document = invoke(*words, "--calib", data, "--recover", 2, "--batch-size", 16)
    assert [row["fidelity"] for row in document["sites"]] == ["calibrated"]
    assert document["facts"]["norms left"] == 0
    assert document["facts"]["recover"]["steps"] == 2
    model = nc.load(out)
    assert not any(isinstance(module, nn.GroupNorm) for module in model.modules())
    out.unlink()
    assert "add --calib" in invoke(*words, code=2)["problems"][0]["way_out"]
    assert not out.exists()
    assert invoke(source, "--calib", data, code=2)["problems"][0]["where"] == "--calib"

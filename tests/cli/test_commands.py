"""The command line, in process: exit codes, files, JSON, rejected results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.demo import DigitsResNet
from normconv.proof import randomise_norms_

RUNNER = CliRunner()


def invoke(*words: object, code: int = 0) -> str:
    result = RUNNER.invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def invoke_json(*words: object, code: int = 0) -> dict[str, Any]:
    result = RUNNER.invoke(app, [*(str(word) for word in words), "--json"])
    assert result.exit_code == code, result.output
    document = json.loads(result.stdout)  # nothing but JSON on standard output
    assert isinstance(document, dict)
    return document


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    model = DigitsResNet()
    randomise_norms_(model, (torch.randn(8, 1, 8, 8),))
    path = tmp_path / "model.pt"
    nc.save(model.eval(), path)
    return path


@pytest.fixture
def plain_file(tmp_path: Path) -> Path:
    path = tmp_path / "plain.pt"
    nc.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), path)
    return path


def test_convert_writes_model_and_report_beside_the_source(digits: Path) -> None:
    out = invoke("convert", digits, "--to", "wn", "--input", "4x1x8x8")
    assert "proved" in out
    converted = nc.load(digits.with_name("model.wn.pt"))
    assert isinstance(converted, DigitsResNet)
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(converted(x), nc.load(digits)(x), rtol=1e-4, atol=1e-5)
    document = json.loads(digits.with_name("model.wn.json").read_text())
    assert document["passed"]
    assert len(document["plan"]["steps"]) == 10
    assert all(site["error"] <= site["bound"] for site in document["sites"])


def test_convert_needs_no_other_flag(digits: Path) -> None:
    document = invoke_json("convert", digits, "--to", "wn")
    assert document["passed"]
    assert "inferred" in document["facts"]["example inputs"]


def test_the_report_is_itself_a_plan(digits: Path, tmp_path: Path) -> None:
    invoke("convert", digits, "--to", "plain", "--input", "2x1x8x8")
    again = tmp_path / "again.pt"
    plan = digits.with_name("model.plain.json")
    invoke("convert", digits, "--plan", plan, "--input", "2x1x8x8", "-o", again)
    first, second = nc.load(digits.with_name("model.plain.pt")), nc.load(again)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_convert_exports_onnx(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    document = invoke_json("convert", digits, "--to", "wn", "--onnx", file, "--input", "2x1x8x8")
    assert file.exists()
    assert document["facts"]["onnx norm_nodes"] == 0
    verified = invoke_json("verify", digits, file, "--input", "5x1x8x8")
    assert verified["passed"]


def test_dry_run_and_plan_write_nothing(digits: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert "into stem" in invoke("convert", digits, "--dry-run", "--input", "2x1x8x8")
    assert "into stem" in invoke("plan", digits, "--input", "2x1x8x8")
    assert sorted(tmp_path.iterdir()) == before
    plan = tmp_path / "plan.json"
    invoke("plan", digits, "--to", "frozen", "--input", "2x1x8x8", "-o", plan)
    assert {step.action for step in nc.Plan.read(plan).steps} == {"frozen"}


def test_globs_and_options(digits: Path) -> None:
    words = ("--to", "frozen", "--exclude", "layer3.*", "--option", "trainable=True")
    document = invoke_json("convert", digits, *words, "--input", "2x1x8x8")
    kept = [step["site"] for step in document["plan"]["steps"] if step["action"] == "keep"]
    assert kept == ["layer3.bn1", "layer3.bn2", "layer3.shortcut.1"]
    converted = nc.load(digits.with_name("model.frozen.pt"))
    assert isinstance(converted.bn.scale, nn.Parameter)


def test_a_glob_that_matches_nothing_names_the_nearest_site(digits: Path) -> None:
    out = invoke_json("plan", digits, "--exclude", "layr3.bn1", "--input", "2x1x8x8", code=2)
    assert "layer3.bn1" in out["problems"][0]["way_out"]


def test_inspect(digits: Path) -> None:
    document = invoke_json("inspect", digits, "--input", "2x1x8x8")
    sites = {site["name"]: site for site in document["sites"]}
    assert sites["bn"]["producers"] == ["stem"]
    assert sites["head_norm"]["obstacle"] == "follows relu"
    assert sites["head_norm"]["consumers"] == ["head"]
    assert "10 norms, 9 can be folded" in invoke("inspect", digits, "--input", "2x1x8x8")


def test_fold_gives_plain_layers(digits: Path, tmp_path: Path) -> None:
    invoke("convert", digits, "--input", "2x1x8x8")
    out = tmp_path / "folded.pt"
    document = invoke_json("fold", digits.with_name("model.wn.pt"), "--input", "2x1x8x8", "-o", out)
    assert document["facts"]["folded"] == {"normconv weight norm": 10}
    assert type(nc.load(out).stem) is nn.Conv2d
    again = invoke_json("fold", out, "--input", "2x1x8x8", "-o", tmp_path / "twice.pt")
    assert again["facts"]["folded"] == {}


def test_export_and_verify(digits: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.onnx"
    document = invoke_json("export", digits, "-o", file, "--opset", "18", "--input", "2x1x8x8")
    assert document["facts"]["opset"] == {"ai.onnx": 18}
    invoke("export", digits, "-o", file, "--opset", "21", code=2)
    invoke("export", digits, "-o", file, "--input", "2x1x8x8", "--dynamic", "samples", code=2)


def test_verify_takes_a_file_as_the_reference(digits: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    invoke("export", digits, "-o", first, "--input", "2x1x8x8")
    invoke("convert", digits, "--onnx", second, "--input", "2x1x8x8")
    assert invoke_json("verify", first, second, "--input", "3x1x8x8")["passed"]
    invoke("verify", first, second, code=2)


def test_verify_fails_on_another_model(digits: Path, tmp_path: Path) -> None:
    other = nc.load(digits)
    with torch.no_grad():
        other.head.weight[0] *= 1.001
    nc.save(other, tmp_path / "other.pt")
    document = invoke_json("verify", digits, tmp_path / "other.pt", "--input", "4x1x8x8", code=1)
    assert not document["passed"]
    assert document["exit_code"] == 1


def test_exit_codes(digits: Path, plain_file: Path, tmp_path: Path) -> None:
    invoke("convert", tmp_path / "none.pt", code=2)
    invoke("convert", digits, "--to", "batchnorm", "--input", "2x1x8x8", code=2)
    invoke("convert", digits, "--input", "2x1x8x0", code=2)
    invoke("convert", plain_file, "--to", "plain", "--input", "2x3x8x8", code=3)  # no norm at all
    invoke("convert", digits, "--input", "2x7x8x8", code=3)  # the input does not fit
    text = tmp_path / "text.pt"
    text.write_text("not a model")
    document = invoke_json("convert", text, code=3)
    assert document["error"] == "LoadError"
    assert not list(tmp_path.glob("*.wn.*"))


def test_a_failed_proof_leaves_only_rejected_files(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    invoke("convert", digits, "--input", "2x1x8x8")
    good = digits.with_name("model.wn.pt").read_bytes()
    from normconv.targets import exact

    right = exact.absorb_norm_

    def wrong(root: nn.Module, names: Any, producers: Any, **more: Any) -> None:
        right(root, names, producers, **more)
        with torch.no_grad():
            root.get_submodule((producers or more["consumers"])[0]).weight_g[0] *= 1.01

    monkeypatch.setattr(exact, "absorb_norm_", wrong)
    document = invoke_json("convert", digits, "--input", "2x1x8x8", code=1)
    assert any(not check["passed"] for check in document["checks"])
    assert digits.with_name("model.wn.pt").read_bytes() == good
    rejected = digits.with_name("model.wn.pt.rejected")
    assert rejected.exists()
    report = json.loads(digits.with_name("model.wn.json.rejected").read_text())
    assert report["passed"] is False


@pytest.mark.parametrize("words", [("--help",), ("convert", "--help"), ("--version",)])
def test_help_loads_no_torch(words: tuple[str, ...]) -> None:
    code = f"""
        import sys
        sys.argv = ["normconv", *{words!r}]
        from normconv.cli import main
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop.code
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_class_of_the_users_own_script_needs_trust(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from torch import nn

            class Net(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.conv = nn.Conv2d(3, 4, 3)
                    self.norm = nn.BatchNorm2d(4)

                def forward(self, x):
                    return self.norm(self.conv(x))

            if __name__ == "__main__":
                torch.save(Net(), "net.pt")
            """
        )
    )
    subprocess.run([sys.executable, "train.py"], cwd=tmp_path, check=True, env=dict(os.environ))
    refused = invoke_json("convert", tmp_path / "net.pt", code=3)
    assert "__main__.Net" in refused["problems"][0]["what"]
    assert "--trust" in refused["problems"][0]["way_out"]
    document = invoke_json(
        "convert", tmp_path / "net.pt", "--trust", script, "--input", "2x3x8x8", code=0
    )
    assert document["passed"]

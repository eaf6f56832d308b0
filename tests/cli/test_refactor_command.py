"""`normconv refactor`: files, exit codes, and a strict load in the original class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.demo import DigitsResNet
from normconv.proof import randomise_norms_

RUNNER = CliRunner()
INPUT = ("--input", "4x1x8x8")


def invoke(*words: object, code: int = 0) -> str:
    result = RUNNER.invoke(app, [str(word) for word in words], env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    model, x = DigitsResNet(), torch.randn(8, 1, 8, 8)
    randomise_norms_(model, (x,))
    path = tmp_path / "folded.pt"
    nc.save(nc.fold(nc.convert(model.eval(), "wn", example_inputs=(x,)).model).model, path)
    return path


def test_back_to_the_class_and_to_weight_norm(folded: Path) -> None:
    assert "proved" in invoke("refactor", folded, "--to", "bn", *INPUT)
    path = folded.with_suffix(".bn.pt")
    DigitsResNet().load_state_dict(nc.load(path).state_dict(), strict=True)
    report = json.loads(path.with_suffix(".json").read_text())
    assert (report["verb"], report["target"]) == ("refactor", "bn")
    assert all(check["passed"] for check in report["checks"])
    out = folded.with_name("again.pt")
    invoke("refactor", folded, "--to", "wn", "-o", out, *INPUT)
    assert any(name.endswith("weight_g") for name in nc.load(out).state_dict())


def test_layers_and_the_original(folded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nc.load(folded)
    del model.__dict__["_normconv_history"]
    plain = folded.with_name("plain.pt")
    nc.save(model, plain)
    # The message wraps in the terminal's width: one phrase of it.
    assert "--layers" in invoke("refactor", plain, "--to", "wn", *INPUT, code=2)
    assert "matches no site" in invoke(
        "refactor", plain, "--to", "wn", "--layers", "nothing", *INPUT, code=2
    )
    invoke("refactor", plain, "--to", "wn", "--layers", "all", *INPUT)
    assert "--like" in invoke("refactor", plain, "--to", "bn", *INPUT, code=2)
    invoke("refactor", plain, "--to", "bn", "--like", "normconv.demo:DigitsResNet", *INPUT)
    DigitsResNet().load_state_dict(nc.load(folded.with_name("plain.bn.pt")).state_dict())


def test_nothing_is_written_over(folded: Path) -> None:
    before = folded.read_bytes()
    invoke("refactor", folded, "--to", "bn", "-o", folded, *INPUT, code=2)
    invoke("refactor", folded, "--to", "gn", *INPUT, code=2)
    assert folded.read_bytes() == before
    assert list(folded.parent.iterdir()) == [folded]


def test_a_group_norm_result_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)).eval()
    x = torch.randn(4, 1, 8, 8)
    nc.save(nc.convert(net, "gn", example_inputs=(x,)).model, tmp_path / "gn.pt")
    invoke("refactor", tmp_path / "gn.pt", "--to", "bn", *INPUT, code=3)
    assert [path.name for path in tmp_path.iterdir()] == ["gn.pt"]

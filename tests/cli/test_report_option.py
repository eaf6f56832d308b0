"""`--report`: every command that reports writes the same as a page, failures included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from typer.main import get_command
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.proof import randomise_norms_

RUNNER = CliRunner()
REPORTING = [
    "inspect",
    "plan",
    "convert",
    "calibrate",
    "recover",
    "initialise",
    "fold",
    "export",
    "verify",
    "audit",
    "bench",
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    randomise_norms_(net, (torch.randn(4, 3, 5, 5),))
    nc.save(net.eval(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def invoke(*words: object, code: int = 0) -> str:
    result = RUNNER.invoke(app, [*map(str, words)], env={"COLUMNS": "160"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("name", REPORTING)
def test_the_option_is_there(name: str) -> None:
    options = [word for each in get_command(app).commands[name].params for word in each.opts]
    assert "--report" in options


def test_a_conversion_is_written_as_a_page(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "convert.html"
    out = invoke("convert", model, "--input", "2x3x5x5", "--report", page)
    assert "proved" in out
    text = page.read_text(encoding="utf-8")
    assert "Passed." in text
    assert "1 → 0" in text


def test_what_a_command_without_checks_found_is_written(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "inspect.html"
    invoke("inspect", model, "--input", "2x3x5x5", "--report", page)
    assert "BatchNorm2d" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_failed_check_is_written_too(model: Path, tmp_path: Path, form: tuple[str, ...]) -> None:
    page = tmp_path / "audit.html"
    invoke("audit", model, "--input", "2x3x5x5", "--report", page, *form, code=1)
    assert "✗ Failed." in page.read_text(encoding="utf-8")


def test_a_failed_comparison_is_written_too(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    nc.save(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval(), other)
    page = tmp_path / "verify.html"
    invoke("verify", model, other, "--input", "2x3x5x5", "--report", page, code=1)
    assert "✗ Failed." in page.read_text(encoding="utf-8")


def test_a_name_that_cannot_be_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    out = invoke("convert", model, "--report", tmp_path / "page.txt", code=2)
    assert "end its name in .html" in " ".join(out.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt"]


def test_one_command_does_not_write_the_page_of_another(model: Path, tmp_path: Path) -> None:
    page = tmp_path / "inspect.html"
    invoke("inspect", model, "--input", "2x3x5x5", "--report", page)
    page.unlink()
    invoke("inspect", model, "--input", "2x3x5x5")
    assert not page.exists()

"""`normconv demo`, short: every stage works and the closing table is true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.demo.digits import accuracy, load_digits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    result = CliRunner().invoke(app, ["demo", "-o", str(path), "--epochs", "4", "--json"])
    assert result.exit_code == 0, result.output
    (path / "table.json").write_text(result.stdout)
    return path


def test_the_closing_table(folder: Path) -> None:
    rows = json.loads((folder / "table.json").read_text())["rows"]
    names = [row["name"].split(" (")[0] for row in rows]
    assert names == ["original", "converted", "folded", "ONNX"]
    assert [row["norm_nodes"] for row in rows] == [10, 0, 0, 0]
    assert rows[0]["accuracy"] > 0.9  # it learned something
    assert len({row["accuracy"] for row in rows}) == 1
    assert all(row["error"] < 1e-5 for row in rows)
    assert all(row["milliseconds"] > 0 for row in rows)


def test_the_files_are_the_models(folder: Path) -> None:
    data = load_digits()
    original = nc.load(folder / "model.pt")
    expected = accuracy(original(data.test_images), data.test_labels)
    for name in ("model.wn.pt", "model.folded.pt"):
        model = nc.load(folder / name)
        assert accuracy(model(data.test_images), data.test_labels) == expected
    with torch.no_grad():
        assert nc.verify(original, str(folder / "model.onnx"), (data.test_images[:7],)).passed
    assert nc.Plan.read(folder / "model.wn.json").counts() == {"fold": 9, "forward": 1}

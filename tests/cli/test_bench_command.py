"""`normconv bench`: names, inputs, files, tables."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import pytest
from torch import nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.deploy.probing import tiny_model

RUNNER = CliRunner()
FAST = ("--seconds", "0", "--batch-sizes", "1")


def invoke(*words: object, code: int = 0) -> str:
    result = RUNNER.invoke(app, ["bench", *map(str, words)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    module, file = tmp_path / "model.pt", tmp_path / "tiny.onnx"
    nc.save(nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1)).eval(), module)
    file.write_bytes(tiny_model())
    return module, file


def test_a_module_and_a_file_side_by_side(models: tuple[Path, Path], tmp_path: Path) -> None:
    module, file = models
    written, page = tmp_path / "bench.json", tmp_path / "bench.html"
    words = (f"bn={module}", file, "--input", "1x1x3x3", "-o", written, "--report", page)
    out = invoke(*words, "--backend", "eager", "--backend", "ort-cpu", *FAST)
    assert "ratio: to bn on eager, median and quartiles over the turns" in " ".join(out.split())
    assert f"versions: python {platform.python_version()}" in out
    document = json.loads(written.read_text())
    rows = document["facts"]["timings"]
    assert [(row["model"], row["backend"]) for row in rows] == [
        ("bn", "eager"),
        ("tiny", "ort-cpu"),
    ]
    assert document["versions"]["torch"] == metadata.version("torch")
    text = page.read_text()
    assert "Fastest at batch 1" in text
    assert text.count('class="bar') == 2


def test_a_file_alone_says_what_it_takes(models: tuple[Path, Path]) -> None:
    out = invoke(f"a={models[1]}", f"b={models[1]}", "--backend", "ort-cpu", *FAST, "--json")
    document = json.loads(out[out.index("{") :])
    assert document["facts"]["machine"]["inputs"] == "float32 1x1x3x3"
    assert [row["ratio_to"] for row in document["facts"]["timings"]] == ["a on ort-cpu"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a=x.onnx", "a=y.onnx"), "x.onnx and y.onnx have one name"),
        (("=x.onnx",), "this is no NAME=MODEL"),
        (("a=none.onnx",), "there is no such file"),
        (("a=x.onnx", "--batch-sizes", "1,none"), "no list of whole numbers from 1"),
        (("a=x.onnx", "--report", "page.txt"), "end its name in .html"),
        (("a=x.onnx", "-o", "page.txt"), "does not end in .json"),
        (("a=x.onnx", "--plot", "page.svg"), "does not end in .png"),
    ],
)
def test_a_wrong_call_is_told(words: tuple[str, ...], message: str) -> None:
    assert message in " ".join(invoke(*words, code=2).split())

"""`normconv calibrate` and `convert --calib`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app
from normconv.plan import history_of


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(16 * 36, 4))
    images = torch.randn(64, 3, 8, 8) * torch.randn(64, 1, 1, 1).exp()
    for _ in range(20):
        net(images)
    torch.save(net.eval(), tmp_path / "net.pt")
    torch.save(images, tmp_path / "images.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words])


def test_convert_and_calibrate_in_one_and_in_two(files: Path) -> None:
    one = run(
        "convert", "net.pt", "--to", "gn", "--input", "2x3x8x8", "--calib", "images.pt", "--json"
    )
    assert one.exit_code == 0, one.output
    report = json.loads(one.stdout)
    assert report["facts"]["data"]["samples"] == 64
    assert "before" in report["facts"]["same top-1"]
    assert "with the trained statistics: output" in {c["name"] for c in report["checks"]}
    assert (
        run("convert", "net.pt", "--to", "gn", "--input", "2x3x8x8", "-o", "plain.pt").exit_code
        == 0
    )
    two = run(
        "calibrate",
        "plain.pt",
        "--reference",
        "net.pt",
        "--data",
        "images.pt",
        "--input",
        "2x3x8x8",
    )
    assert two.exit_code == 0, two.output
    a, b = nc.load("net.gn.pt"), nc.load("plain.calibrated.pt")
    assert all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_agreement_below_the_floor_exits_1(files: Path) -> None:
    words = ["convert", "net.pt", "--to", "gn", "--option", "eps=1e-5", "--option", "groups=16"]
    words += ["--input", "2x3x8x8", "--calib", "images.pt", "--min-agreement", "1"]
    result = run(*words)
    assert result.exit_code == 1, result.output
    assert not (files / "net.gn.pt").exists()
    assert (files / "net.gn.pt.rejected").exists()


def test_bad_data_exits_2_and_writes_nothing(files: Path) -> None:
    torch.save(torch.full((4, 3, 8, 8), float("nan")), files / "nan.pt")
    for data in ("nan.pt", "missing.zip"):
        result = run("convert", "net.pt", "--to", "gn", "--input", "2x3x8x8", "--calib", data)
        assert result.exit_code == 2, result.output
    assert run("calibrate", "net.pt", "--reference", "net.pt", "--data", "images.pt").exit_code == 2
    assert not list(files.glob("net.gn*"))


def test_recover_writes_what_it_taught(files: Path) -> None:
    assert run("convert", "net.pt", "--to", "gn", "--input", "2x3x8x8").exit_code == 0
    words = ["recover", "net.gn.pt", "--reference", "net.pt", "--data", "images.pt"]
    result = run(
        *words,
        "--lr",
        "1e-3",
        "--steps",
        "20",
        *("--every", "4", "--patience", "6", "--temperature", "3"),
        "--checkpoint",
        "lesson.pt",
        "--input",
        "2x3x8x8",
        "--json",
    )
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)["facts"]
    assert facts["steps"] == 20
    assert [step for step, _ in facts["agreement by step"]] == [0, 4, 8, 12, 16, 20]
    assert (files / "lesson.pt").exists()
    taught, before = nc.load("net.gn.recovered.pt"), nc.load("net.gn.pt")
    lesson = history_of(taught)[-1]["recover"]["lesson"]
    assert (lesson["every"], lesson["patience"], lesson["temperature"]) == (4, 6, 3.0)
    assert not torch.equal(taught[0].weight, before[0].weight)
    refused = run(*words, "--min-agreement", "1", "--lr", "1e30", "--input", "2x3x8x8")
    assert refused.exit_code == 1, refused.output
    assert (files / "net.gn.recovered.pt.rejected").exists()


def test_recover_on_convert_and_the_drift_as_a_picture(files: Path) -> None:
    words = ["convert", "net.pt", "--to", "gn", "--input", "2x3x8x8"]
    on_data = ["--calib", "images.pt", "--cache", "disk", "--recover", "5", "--data-use", "private"]
    result = run(*words, *on_data, "--batch-size", "16", "--plot", "drift.png", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["facts"]["recover"]["steps"] == 5
    assert report["facts"]["written"]["plot"] == "drift.png"
    assert (files / "drift.png").read_bytes()[1:4] == b"PNG"
    assert any("privacy accountant" in note for note in report["notes"])
    for more in (["--recover", "5"], ["--plot", "drift.png"]):
        assert run(*words, *more).exit_code == 2
    for more in (["--data-use", "none"], ["--cache", "tape"], ["--device", "toaster"]):
        refused = run(*words, "--calib", "images.pt", "-o", "other.pt", *more)
        assert refused.exit_code == 2, refused.output
    assert not list(files.glob("other*"))


def test_no_input_is_written_over(files: Path) -> None:
    assert run("convert", "net.pt", "--to", "gn", "--input", "2x3x8x8").exit_code == 0
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    convert = ["convert", "net.pt", "--to", "gn", "--input", "2x3x8x8", "--calib", "images.pt"]
    taught = ["recover", "net.gn.pt", "--reference", "net.pt", "--data", "images.pt"]
    for words in (
        [*convert, "-o", "images.pt"],
        [*taught, "-o", "net.pt"],
        [*taught, "--checkpoint", "net.pt"],
        [*taught, "--lr", "-1"],
    ):
        assert run(*words).exit_code == 2, words
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before

"""`normconv compare`: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from normconv.calibration import Share
from normconv.cli.app import app
from normconv.training.recipes import RECIPES

OWN = (
    "import torch\n"
    "from torch import nn\n"
    "def make(units=8):\n"
    "    return nn.Sequential(nn.Linear(6, units), nn.BatchNorm1d(units), nn.Linear(units, 3))\n"
    "def data():\n"
    "    rng = torch.Generator().manual_seed(0)\n"
    "    x, y = torch.randn(96, 6, generator=rng), torch.arange(96) % 3\n"
    "    x[:, :3] += 3 * nn.functional.one_hot(y, 3)\n"
    "    return x[:64], y[:64], x[64:], y[64:]\n"
)
RUN = ["--limit", "64", "--epochs", "2", "--width", "0.25", "--batch-sizes", "16,32"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def compare(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["compare", *words])
    assert result.exit_code == code, result.output
    return result.output


def test_a_recipe_on_digits() -> None:
    words = ["digits", *RUN, "--normalizations", "plain,wn", "--seeds", "2", "--timing", "0.01"]
    shown = compare(*words)
    folder = Path("compare-digits")
    assert {path.name for path in folder.iterdir()} == {
        "comparison.json",
        "curves.csv",
        "curves.png",
        "runs",
    }
    document = json.loads((folder / "comparison.json").read_text())
    assert len(document["rows"]) == 2 * 2 * 2 * 2
    assert {time["batch_size"] for time in document["step_times"]} == {16, 32}
    with (folder / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    assert float(rows[3]["test_loss"]) == document["rows"][3]["test_loss"]
    lines = [line.split() for line in shown.splitlines() if line.startswith(("plain ", "wn "))]
    assert [line[:2] for line in lines] == [[n, b] for b in ("16", "32") for n in ("plain", "wn")]
    first = document["summary"][0]
    assert lines[0][2] == f"{first['test_accuracy']:.1%}"
    assert lines[0][-1] == "1.00"
    again = json.loads(compare(*words, "--json"))
    assert again["rows"] == document["rows"], "nothing was trained again"
    assert again["written"]["csv"] == str(folder / "curves.csv")
    assert "epochs=2" in compare(*words, "--epochs", "3", code=2)


def test_a_network_and_data_of_ones_own() -> None:
    Path("own_net.py").write_text(OWN)
    words = ["--model", "own_net:make", "--data", "own_net:data", "--lr", "0.01", "--timing", "0"]
    shown = compare(*words, "--batch-sizes", "8", "--epochs", "4", "--model-arg", "units=16")
    assert "own_net:data: 64 to train, 32 to test" in shown
    document = json.loads(Path("compare-own_net-make/comparison.json").read_text())
    names = list(dict.fromkeys(row["normalization"] for row in document["rows"]))
    assert names == ["plain", "bn", "wn", "wn+mobn", "gn", "gn+ws"]
    for name in names:
        losses = [r["train_loss"] for r in document["rows"] if r["normalization"] == name]
        assert losses[-1] < 0.8 * losses[0], (name, losses)


def test_names_are_no_markup() -> None:
    words = ["--epochs", "1", "--limit", "32", "--batch-sizes", "16", "--timing", "0"]
    shown = compare(
        "digits", *words, "--normalizations", "plain", "--seeds", "1", "-o", ":x:[b]y[/]"
    )
    assert f"csv: {Path(':x:[b]y[/]') / 'curves.csv'}" in shown


def test_list_shows_every_recipe() -> None:
    shown = compare("--list")
    assert all(name in shown for name in RECIPES)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tfa-tutorials"], "did you mean tfa-tutorial"),
        (["tfa-tutorial"], "--data-dir DIR"),
        (["tfa-tutorial", "--data-dir", "nowhere"], "there is no nowhere"),
        (["digits", "--batch-sizes", "2,x"], "no list of different whole numbers"),
        (["digits", "--batch-sizes", "8,8"], "no list of different whole numbers"),
        (["digits", "--width", "nan"], "no positive number"),
        (["digits", "--normalizations", "bn,brn"], "'brn' is unknown"),
        (["--model", "own_net:make"], "nothing says what it is trained on"),
        (["--model", "own_net:make", "--data", "digits", "--lr", "nan"], "no positive number"),
        (["digits", "--model", "own_net:make", "--data", "digits"], "RECIPE: --model takes"),
        (["digits", "--lr", "0.1"], "--lr: it goes with --model"),
        (["--model-arg", "units=4"], "--model-arg: it goes with --model"),
        (["digits", "--data-dir", "."], "digits has no such folder"),
        (["digits", "--test-share", "0.2"], "digits: it has a part of its own to test on"),
        (["digits", "--download"], "digits is none of mnist"),
        (["digits", "--batch-sizes", "4096"], "fewer than 4096 training samples"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    words: list[str], message: str
) -> None:
    shown = compare(*words, code=2)
    assert message in " ".join(shown.split())
    assert not list(Path.cwd().iterdir())


def test_of_two_processes_the_one_that_ends_last_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, written in ((1, False), (0, True)):
        share = Share(rank, 2, torch.device("cpu"))
        monkeypatch.setattr("normconv.calibration.join_processes", lambda device, s=share: s)
        compare("digits", *RUN, "--normalizations", "plain,bn", "--timing", "0")
        assert Path("compare-digits/curves.csv").exists() is written
    document = json.loads(Path("compare-digits/comparison.json").read_text())
    assert {row["normalization"] for row in document["rows"]} == {"plain", "bn"}

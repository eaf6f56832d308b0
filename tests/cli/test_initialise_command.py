"""`normconv initialise`, and `nc.convert(..., init="data")`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    images = torch.randn(40, 3, 8, 8) * 9 + 4
    torch.save(images, tmp_path / "images.pt")
    monkeypatch.chdir(tmp_path)
    return images


def untrained() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)
    ).eval()


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["initialise", "wn.pt", "--data", "images.pt", *words])


def test_the_command_does_what_the_call_does(images: Tensor) -> None:
    model = nc.convert(untrained(), "wn", layers="all", example_inputs=(images[:2],)).model
    torch.save(model, "wn.pt")
    done = run("--v-std", "0.05", "--seed", "1", "--batch-size", "7", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)["facts"]
    assert facts["data"]["samples"] == 40
    assert facts["v"] == {"std": 0.05, "seed": 1}
    made = nc.load("wn.initialised.pt")
    wanted = nc.initialise(model, [images], v_std=0.05, seed=1).model
    assert torch.allclose(made(images), wanted(images), atol=1e-4)


def test_a_trained_model_needs_the_word(images: Tensor) -> None:
    net = untrained().train()
    net(images)
    torch.save(nc.convert(net.eval(), "wn", example_inputs=(images[:2],)).model, "wn.pt")
    refused = run()
    assert refused.exit_code == 2
    assert "trained statistics" in " ".join(refused.stderr.split())
    assert not Path("wn.initialised.pt").exists()
    assert run("--fresh").exit_code == 0


def test_convert_initialises_too(images: Tensor) -> None:
    result = nc.convert(
        untrained(), "wn", layers="all", example_inputs=(images[:2],), data=[images], init="data"
    )
    y = result.model(images).transpose(0, 1).flatten(1)
    assert y.mean(1).abs().max() < 1e-3
    assert (y.std(1) - 1).abs().max() < 1e-3
    assert result.report.passed
    assert result.report.facts["initialise"]["data"]["purpose"] == "init"
    assert any(check.name == "largest |mean| of a channel" for check in result.report.checks)
    with pytest.raises(nc.UsageError, match="init"):
        nc.convert(untrained(), "wn", example_inputs=(images[:2],), init="data")

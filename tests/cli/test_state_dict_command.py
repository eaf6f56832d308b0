"""`normconv state-dict convert`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import normconv as nc
from normconv.cli.app import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["state-dict", "convert", *words])


def test_there_and_back() -> None:
    save_file(nn.Conv1d(3, 4, 2).state_dict(), "plain.safetensors")
    there = ["plain.safetensors", "wn.safetensors", "--from", "plain", "--to", "torch-wn"]
    refused = run(*there)
    assert refused.exit_code == 2
    assert "--like FILE" in " ".join(refused.stderr.split())
    save_file(
        {f"up.{k}": v for k, v in load_file("plain.safetensors").items()}, "plain.safetensors"
    )
    done = run(*there, "--layers", "up", "--dim", "1")
    assert done.exit_code == 0, done.output
    assert load_file("wn.safetensors")["up.parametrizations.weight.original0"].shape == (1, 3, 1)
    done = run(*there, "--layers", "up=2")
    assert load_file("wn.safetensors")["up.parametrizations.weight.original0"].shape == (1, 1, 2)
    done = run("wn.safetensors", "back.safetensors", "--json")
    document = json.loads(done.stdout)
    assert document["facts"]["from"] == "torch-wn"
    assert document["facts"]["written"] == "back.safetensors"
    assert list(document["facts"]["passed through"]) == ["up.bias"]
    torch.testing.assert_close(load_file("back.safetensors"), load_file("plain.safetensors"))


def test_a_plan_folds_norms() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    nc.make_plan(net, "plain", example_inputs=(torch.ones(1, 3, 2, 2),)).write("plan.json")
    torch.save({"state_dict": net.state_dict()}, "bn.pt")
    words = ["bn.pt", "plain.safetensors", "--plan", "plan.json"]
    done = run(*words)  # the plan says the eps
    assert done.exit_code == 0, done.output
    assert "5 keys of norms are gone" in " ".join(done.output.split())
    assert set(load_file("plain.safetensors")) == {"0.weight", "0.bias"}
    by_glob = run(*words, "--eps", "2*=1e-5", "--eps", "1=1e-3", "--json")
    assert json.loads(by_glob.stdout)["facts"]["eps"] == {"2*": 1e-5, "1": 1e-3}


def test_exit_codes() -> None:
    save_file({"a.weight_g": torch.ones(2, 1)}, "half.safetensors")
    refused = run("half.safetensors", "out.safetensors")
    assert refused.exit_code == 3
    assert "a.weight_g: its v is missing" in " ".join(refused.stderr.split())
    assert not Path("out.safetensors").exists()
    assert run("none.safetensors", "out.safetensors").exit_code == 2
    assert run("half.safetensors", "half.safetensors").exit_code == 2
    same = run("half.safetensors", "a.pt", "--to", "torch-wn", "--like", "a.pt")
    assert same.exit_code == 2
    assert run("half.safetensors", "out.pt", "--layers", "a=b").exit_code == 2
    assert run("half.safetensors", "out.pt", "--eps", "small").exit_code == 2

"""`normconv audit`: what it prints and how it exits."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import normconv as nc
from tests.cli.test_commands import invoke, invoke_json


def written(folder: Path, norm: nn.Module) -> Path:
    path = folder / "model.pt"
    nc.save(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU()), path)
    return path


def test_a_model_with_batch_norm_exits_1_and_names_layer_and_target(tmp_path: Path) -> None:
    path = written(tmp_path, nn.BatchNorm2d(4))
    out = invoke("audit", path, "--input", "2x3x8x8", code=1)
    assert "1 (BatchNorm2d) lets samples see each other in train mode" in out
    assert "--to wn, plain, frozen" in out
    document = invoke_json("audit", path, "--input", "2x3x8x8", code=1)
    assert not document["passed"]
    assert document["verb"] == "audit"
    assert [(row["site"], row["action"]) for row in document["sites"]] == [
        ("1", "couples"),
        ("1", "keeps statistics"),
    ]
    assert document["facts"]["findings"]["1"]["couples"]["modes"] == ["train"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_clean_model_exits_0(tmp_path: Path) -> None:
    path = written(tmp_path, nn.GroupNorm(2, 4))
    assert "no sample sees another" in invoke("audit", path, "--input", "2x3x8x8")
    document = invoke_json("audit", path)
    assert document["passed"]
    assert document["sites"] == []


def test_one_mode(tmp_path: Path) -> None:
    path = written(tmp_path, nn.BatchNorm2d(4))
    words = ("audit", path, "--input", "2x3x8x8")
    assert invoke_json(*words, "--mode", "eval")["passed"]
    invoke(*words, "--mode", "train", code=1)
    invoke(*words, "--mode", "both", code=2)


@pytest.mark.parametrize(("shape", "code"), [("2x7x8x8", 3), ("2x3x8x0", 2)])
def test_inputs_that_do_not_fit(tmp_path: Path, shape: str, code: int) -> None:
    path = written(tmp_path, nn.BatchNorm2d(4))
    document = invoke_json("audit", path, "--input", shape, code=code)
    assert document["exit_code"] == code

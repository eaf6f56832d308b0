"""`normconv doctor`: what it tries, what it says of what fails, and its exit code."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Any

import pytest
from typer.testing import CliRunner

from normconv.cli import diagnosis
from normconv.cli.app import app
from normconv.cli.diagnosis import ABSENT, BROKEN, WORKS, diagnose, extras
from normconv.report import Report

RUNNER = CliRunner()


def runtimes(report: Report) -> dict[str, dict[str, Any]]:
    return {row["part"]: row for row in report.facts["runtimes"]}


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long; one test does the main job."""
    monkeypatch.setattr(diagnosis, "_compile", lambda: "")
    monkeypatch.setattr(diagnosis, "_main_job", lambda: "done")


def test_the_main_job_is_done_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> str:
        raise diagnosis._Broken("no C++ compiler", "install g++")

    monkeypatch.setattr(diagnosis, "_compile", no_compiler)
    result = RUNNER.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output  # torch.compile is not what the main job needs
    document = json.loads(result.stdout)
    found = {row["part"]: row for row in document["facts"]["runtimes"]}
    assert found["the main job"]["state"] == WORKS
    assert "converted, exported and compared" in found["the main job"]["detail"]
    assert found["torch.compile"]["way_out"] == "install g++"
    assert found["ONNX Runtime on cpu"]["state"] == WORKS
    assert document["passed"]


def test_every_provider_that_is_listed_is_tried(
    light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    listed = ["CUDAExecutionProvider", "OddExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(
        "normconv.deploy.probing.provider_problem", lambda p: "" if p == "cpu" else f"no {p}"
    )
    found = runtimes(diagnose())
    assert found["ONNX Runtime on cpu"]["state"] == WORKS
    assert found["ONNX Runtime on cuda"]["detail"] == "no cuda"
    assert found["ONNX Runtime on cuda"]["way_out"].startswith("it needs a GPU, its driver")
    assert found["ONNX Runtime on OddExecutionProvider"]["state"] == ABSENT


def test_two_distributions_in_one_folder(light: None, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": ["onnxruntime-gpu", "onnxruntime"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: both)
    found = runtimes(diagnose())["ONNX Runtime's distributions"]
    assert found["state"] == BROKEN
    assert "overwritten the other" in found["detail"]
    assert found["way_out"].startswith(
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install"
    )


def test_without_a_runtime_the_main_job_cannot_run(
    light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    result = RUNNER.invoke(app, ["doctor"], env={"COLUMNS": "160"})
    assert result.exit_code == 1, result.output
    assert "does not run here: ONNX Runtime" in result.output
    assert "pip install 'normconv[gpu]' or 'normconv[cpu]'" in result.output


def test_a_library_that_breaks_in_its_own_way_is_a_finding(
    light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> str:
        raise OSError("libcudart.so.13: cannot open\nmore")

    monkeypatch.setattr(diagnosis, "_torch_cpu", broken)
    report = diagnose()
    assert not report.passed
    found = runtimes(report)["torch on the CPU"]
    assert (found["state"], found["detail"]) == (BROKEN, "OSError: libcudart.so.13: cannot open")


def test_extras_are_read_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"timm": "1.0.9", "pillow": "12.0+local", "onnx": "1.20"}

    def version(name: str) -> str:
        if name not in have:
            raise metadata.PackageNotFoundError(name)
        return have[name]

    monkeypatch.setattr(metadata, "version", version)
    found = {
        each.part: each
        for each in extras(
            [
                "onnx>=1.18",
                "onnxruntime-gpu>=1.23; extra == 'gpu'",
                "pillow>=11; extra == 'images'",
                'timm>=1.0.20; extra == "zoo"',
                'transformers>=4.57; extra == "zoo"',
                "scikit-learn>=1.5; extra == 'demo'",
                "onnxruntime>=1.23; (platform_machine != 'x86_64') and extra == 'demo'",
                "normconv[demo,zoo]; extra == 'test'",
                "pytest>=8.3; extra == 'test'",
            ]
        )
    }
    assert {name: each.state for name, each in found.items()} == {
        "images": WORKS,
        "zoo": ABSENT,
        "demo": ABSENT,
    }
    assert (
        found["zoo"].detail == "transformers not installed; timm 1.0.9, 1.0.20 or later is needed"
    )
    assert found["zoo"].way_out == "pip install 'normconv[zoo]'"

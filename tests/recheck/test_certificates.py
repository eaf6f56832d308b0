"""Certificates: what is not as certified is found, by name, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normconv as nc
from normconv.report.certificate import certificate_path

NO_TORCH = """
import sys
for name in ("torch", "torchvision", "timm", "transformers", "onnxscript"):
    sys.modules[name] = None  # importing it raises ImportError
from normconv.cli import main
sys.argv = ["normconv", *sys.argv[1:]]
main()
"""


def verify(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", NO_TORCH, "verify", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval()
    x = (torch.randn(2, 3, 6, 6),)
    nc.export_onnx(net, folder / "net.onnx", example_inputs=x, golden=folder / "g.npz")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def served(exported: dict[str, bytes], tmp_path: Path) -> Path:
    for name, content in exported.items():
        (tmp_path / name).write_bytes(content)
    return certificate_path(tmp_path / "net.onnx")


def failures(certificate: Path, **options: object) -> dict[str, str]:
    report = nc.verify_certificate(certificate, **options)
    return {check.name: check.describe() for check in report.failed_checks}


def test_what_was_certified_passes_without_torch(served: Path) -> None:
    done = verify("--certificate", served, "--runtime", "ort-cpu", "--json")
    assert done.returncode == 0, done.stderr
    names = {check["name"] for check in json.loads(done.stdout)["checks"]}
    assert {"seals", "weights", "norm nodes", "cpu output", "cpu output top-1"} <= names


def test_a_changed_weight_is_named(served: Path) -> None:
    path = served.with_name("net.onnx")
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == "3.weight")
    tensor.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), "3.weight")
    )
    onnx.save(model, path)
    done = verify("--certificate", served)
    assert done.returncode == 1
    failed = failures(served)
    assert failed["weight 3.weight"] == "has other values"
    assert "weight 0.weight" not in failed


@pytest.mark.parametrize(
    ("section", "key", "place"),
    [("errors", "error", "errors[0].error"), ("golden", "bounds", "golden.bounds.output")],
)
def test_an_edited_number_is_named(section: str, key: str, place: str, served: Path) -> None:
    document = json.loads(served.read_text())
    if section == "errors":
        document["errors"][0][key] = 1e-12
    else:
        document["golden"][key]["output"] = 1.0
    served.write_text(json.dumps(document))
    assert any(name.startswith(f"seal of {place}") for name in failures(served))
    assert verify("--certificate", served).returncode == 1


def test_other_golden_data_are_found(served: Path) -> None:
    other = served.with_name("other.npz")
    np.savez(other, x=np.ones(2))
    assert "file other.npz" in failures(served, golden=other)


@pytest.mark.parametrize("name", ["net.onnx", "g.npz"])
def test_a_missing_file_is_a_failed_check(name: str, served: Path) -> None:
    served.with_name(name).unlink()
    assert "missing" in failures(served)[f"file {name}"]


def test_a_file_that_is_no_onnx(served: Path) -> None:
    served.with_name("net.onnx").write_bytes(b"no model")
    assert "cannot be read" in failures(served)["file net.onnx is ONNX"]


def test_an_absent_provider_is_refused(served: Path) -> None:
    done = verify("--certificate", served, "--runtime", "ort-cuda")
    assert done.returncode == 3
    assert "cuda" in done.stderr


def test_what_is_no_certificate_is_refused(served: Path) -> None:
    served.write_text("{}")
    with pytest.raises(nc.LoadError, match="no certificate"):
        nc.verify_certificate(served)


def test_the_published_schema_is_the_shipped_one() -> None:
    root = Path(__file__).resolve().parents[2]
    published = root / "docs/certificate.schema.json"
    assert published.read_bytes() == (root / "normconv/report/certificate.schema.json").read_bytes()

"""The main job on real architectures: convert, compare in float64 and float32, export, run in ORT.

    python -m benchmarks.main_job --out docs/results/main-job.json

Each architecture has random weights and statistics that let the comparison see
(`normconv.proof.randomise_norms_`); which norms an end-to-end comparison could not see is counted, and
all norms are compared at their own output as well. A run resumes from the results file.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normconv as nc
from benchmarks.machine import machine
from normconv.errors import CheckFailed, NormconvError
from normconv.graph import is_norm
from normconv.proof import blind_sites, randomise_norms_
from normconv.report import Report, jsonable

MODELS = (
    "torchvision:resnet18",
    "torchvision:resnet50",
    "torchvision:mobilenet_v3_large",
    "torchvision:densenet121",
    "torchvision:googlenet",
    "timm:tf_efficientnet_b0",
    "timm:resnetv2_50",
    "timm:regnety_016",
    "timm:repvgg_a0",
    "timm:hrnet_w18_small",
)
TARGETS = ("wn", "plain", "frozen")


def run_one(spec: str) -> dict[str, Any]:
    """Measure one architecture: every target, both dtypes, and the exported file."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nc.load(spec, random_weights=True).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    wide = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    randomise_norms_(model, (wide,))
    plan = nc.make_plan(model, "wn", example_inputs=(x,))
    called = tuple(step.site for step in plan.steps if step.phase == "eval")
    blind = blind_sites(model, called, (x,))
    result: dict[str, Any] = {
        "norms": sum(is_norm(module) for module in model.modules()),
        "capture": plan.capture,
        "actions": plan.counts(),
        "training only": len(plan.steps) - len(called),
        "blind end to end": len(blind),
    }
    for target in TARGETS:
        result[target] = {
            "float32": _converted(model, target, x),
            "float64": _converted(model.double(), target, x.double()),
        }
        model.float()
        result[target]["onnx"] = _exported(model, target, x)
        gc.collect()
    return result


def _converted(model: nn.Module, target: str, x: torch.Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        converted, report = nc.convert(model, target, example_inputs=(x,))
        left = sum(is_norm(module) for module in converted.modules())
    except CheckFailed as error:
        report, left = error.report, -1
    except NormconvError as error:
        return {"refused": str(error)}
    return {**_worst(report), "norms left": left, "seconds": round(time.perf_counter() - start, 2)}


def _worst(report: Report) -> dict[str, Any]:
    outputs = [check for check in report.checks if check.measured is not None]
    sites = [row for row in report.sites if row.error is not None and row.bound is not None]
    worst = max(sites, key=lambda row: (row.error or 0.0) / (row.bound or 1.0))
    return {
        "passed": report.passed,
        "error": max((c.measured for c in outputs if c.measured is not None), default=None),
        "bound": min((c.bound for c in outputs if c.bound is not None), default=None),
        "sight": report.facts["sight"],
        "sites": len(sites),
        "worst site": worst.site,
        "worst site ratio": (worst.error or 0.0) / (worst.bound or 1.0),
    }


def _exported(model: nn.Module, target: str, x: torch.Tensor) -> dict[str, Any]:
    converted, _ = nc.convert(model, target, example_inputs=(x,))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = nc.export_onnx(converted, Path(folder) / "m.onnx", example_inputs=(x,))
        except CheckFailed as error:
            report = error.report
        except NormconvError as error:
            return {"refused": str(error)}
    numbers = [c for c in report.checks if "output" in c.name and c.measured is not None]
    return {
        "passed": report.passed,
        "failed": [f"{c.name}: {c.describe()}" for c in report.failed_checks],
        "error": max((c.measured or 0.0 for c in numbers), default=None),
        "bound": min((c.bound or 0.0 for c in numbers), default=None),
        "norm nodes": report.facts.get("norm_nodes"),
        "nodes": report.facts.get("nodes"),
        "seconds": round(time.perf_counter() - start, 2),
    }


def main() -> None:
    """Run what the results file does not have yet, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/main-job.json"))
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--again", action="store_true", help="measure what is there already, too")
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "models": {}}
    if options.out.exists() and not options.again:
        results["models"] = json.loads(options.out.read_text())["models"]
    for spec in options.models:
        if spec in results["models"]:
            continue
        start = time.perf_counter()
        results["models"][spec] = run_one(spec)
        seconds = time.perf_counter() - start
        options.out.write_text(json.dumps(jsonable(results), indent=1) + "\n")
        print(f"{spec}: {results['models'][spec]['actions']} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""What the proof costs: `convert` + `export_onnx` against `torch.onnx.export` alone.

    python -m benchmarks.export_cost --pairs 5

Each runs in a child process of its own, in turn. Time is wall time of the work, imports and building
the model excluded. Memory is the peak resident size of the process during the work, and the same beyond
what it held after the imports, which counts the model and all that is made of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.machine import machine

SPEC = "torchvision:resnet50"
_IMPORTED = (
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torch._dynamo",
    "torch.export",
    "torch.onnx",
    "torchvision",
    "normconv.api",
    "normconv.deploy",
)


def child(which: str, spec: str) -> None:
    """Do one job and print its seconds and its peak memory in MiB."""
    for name in _IMPORTED:  # imports are not what is measured
        importlib.import_module(name)
    import torch

    import normconv as nc

    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    bare = _held()
    model = nc.load(spec, random_weights=True).eval()
    x = torch.randn(2, 3, 224, 224)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _reset_peak()
        start = time.perf_counter()
        if which == "normconv":
            model, report = nc.convert(model, "wn", example_inputs=(x,))
            report = nc.export_onnx(model, path, example_inputs=(x,))
            assert report.passed
        else:
            batch = {"x": {0: torch.export.Dim("batch")}}
            torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=batch, verbose=False)
        seconds = time.perf_counter() - start
    peak = _peak()
    measured = {
        "seconds": seconds,
        "peak MiB": peak / 2**20,
        "peak beyond imports MiB": (peak - bare) / 2**20,
    }
    print(json.dumps(measured))


def _reset_peak() -> None:
    """Forget the peak so far, where the system lets one (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def _held() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _run(which: str, spec: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.export_cost", "--child", which, "--spec", spec]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def main() -> None:
    """Run the pairs and print medians and ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", choices=["normconv", "torch"])
    parser.add_argument("--spec", default=SPEC)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.spec)
        return
    pairs = []
    for number in range(options.pairs):
        order = ("normconv", "torch") if number % 2 else ("torch", "normconv")
        pairs.append({which: _run(which, options.spec) for which in order})
        print(json.dumps(pairs[-1]), file=sys.stderr, flush=True)
    document: dict[str, Any] = {"machine": machine(), "spec": options.spec, "pairs": pairs}
    for figure in ("seconds", "peak MiB", "peak beyond imports MiB"):
        ours = [pair["normconv"][figure] for pair in pairs]
        theirs = [pair["torch"][figure] for pair in pairs]
        document[figure] = {
            "normconv": statistics.median(ours),
            "torch": statistics.median(theirs),
            "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        }
    text = json.dumps(document, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""A pretrained network on all its test images: before, after `--to wn`, folded, and in ONNX Runtime.

    python -m benchmarks.pretrained --out docs/results/pretrained.json

Needs the CIFAR-10 images and the ResNet-32 weights in the folder that NORMCONV_DATA names.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import normconv as nc
from benchmarks.machine import machine
from normconv.deploy import Session
from normconv.numerics import relative_l2
from tests.networks import resnet32

_BATCH = 250


def _all(compute: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([compute(batch) for batch in images.split(_BATCH)])


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/pretrained.json"))
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    model = nc.load(resnet32.WEIGHTS, model=resnet32.ResNet32).eval()
    images, labels = resnet32.images(options.limit)
    converted, report = nc.convert(model, "wn", example_inputs=(images[:8],))
    folded, _ = nc.fold(converted)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet32.onnx"
        exported = nc.export_onnx(converted, path, example_inputs=(images[:8],))
        session = Session(path, "cpu")

        def in_session(batch: Tensor) -> Tensor:
            return torch.from_numpy(session.run({"x": batch})["output"])

        stages: dict[str, Callable[[Tensor], Tensor]] = {
            "original": model,
            "converted (wn)": converted,
            "folded": folded,
            "ONNX Runtime (CPU)": in_session,
        }
        outputs = {name: _all(compute, images) for name, compute in stages.items()}
    reference = _all(model.double(), images.double())
    top = reference.topk(2, dim=1).values
    margin = top[:, 0] - top[:, 1]
    rows: dict[str, Any] = {}
    for name, logits in outputs.items():
        error = (logits.double() - reference).abs().max().item()
        changed = logits.argmax(1) != reference.argmax(1)
        rows[name] = {
            "right": int((logits.argmax(1) == labels).sum()),
            "predictions other than float64's": int(changed.sum()),
            "of those with a margin above the error": int((changed & (margin > 2 * error)).sum()),
            "rel-L2 error": relative_l2(logits, reference),
            "max abs error": error,
        }
    document = {
        "machine": machine(),
        "images": len(labels),
        "sites": len(report.sites),
        "norm nodes in the file": exported.facts["norm_nodes"],
        "smallest margin": margin.min().item(),
        "models": rows,
    }
    text = json.dumps(document, indent=1)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

"""BatchNorm to GroupNorm on a pretrained network: without data, and calibrated on a few images.

    python -m benchmarks.group_norm --out docs/results/gn-ws.json

Needs the CIFAR-10 images and the ResNet-32 weights in the folder that NORMCONV_DATA names. Calibration
images come from the training images, without labels, another draw for each seed. Methods and settings
were chosen with --select, on training images that calibration does not use; the test images were run
once, for the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import normconv as nc
from benchmarks.machine import machine
from normconv.calibration import wilson_interval
from normconv.sources import Transform
from tests.networks import resnet32

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gn, one group": ("gn", {"groups": 1}),
    "gn, 16 channels a group": ("gn", {"channels_per_group": 16}),
    "gn+ws, one group": ("gn+ws", {"groups": 1}),
    "gn+ws, 16 channels a group": ("gn+ws", {"channels_per_group": 16}),
    "gn, one group, eps 1e-5": ("gn", {"groups": 1, "eps": 1e-5}),
    "gn, 16 channels a group, eps 1e-5": ("gn", {"channels_per_group": 16, "eps": 1e-5}),
    "wn+mobn": ("wn+mobn", {}),
}
TRAIN = ("cifar10-jpeg-train-1.zip", "cifar10-jpeg-train-2.zip")
_BATCH = 250


def images_of(archive: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images of a zip, normalised, with their labels."""
    transform = Transform(
        tuple(resnet32.MEAN.flatten().tolist()), tuple(resnet32.STD.flatten().tolist())
    )
    from PIL import Image

    with zipfile.ZipFile(resnet32.DATA / archive) as opened:
        names = sorted(name for name in opened.namelist() if name.endswith(".jpg"))
        classes = sorted({Path(name).parent.name for name in names})
        chosen = [names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]]
        pixels = torch.stack([transform(Image.open(opened.open(name))) for name in chosen])
    return pixels, torch.tensor([classes.index(Path(name).parent.name) for name in chosen])


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Run a model in eval mode."""
    with torch.no_grad():
        return torch.cat([model.eval()(batch) for batch in images.split(_BATCH)])


def opacus_fixed(model: nn.Module) -> nn.Module | None:
    """What Opacus's own fixer makes; None where it is not installed."""
    try:
        from opacus.validators import ModuleValidator
    except ImportError:
        return None
    fixed: nn.Module = ModuleValidator.fix(model)
    return fixed


class Yardstick:
    """Labelled images, and what the original says of them."""

    def __init__(self, original: nn.Module, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.expected = logits(original, images).argmax(1)
        self.right = float((self.expected == labels).double().mean()) * 100

    def of(self, model: nn.Module) -> dict[str, Any]:
        """Return the share that is right, the drop in points, and the agreement."""
        got = logits(model, self.images).argmax(1)
        same = int((got == self.expected).sum())
        right = float((got == self.labels).double().mean()) * 100
        interval = wilson_interval(same, len(got))
        return {
            "right": right,
            "drop": self.right - right,
            "agreement": same / len(got),
            "interval": list(interval),
        }


def main() -> None:
    """Convert, calibrate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gn-ws.json"))
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--select", action="store_true", help="training images as the yardstick")
    options = parser.parse_args()
    original = nc.load(resnet32.WEIGHTS, model=resnet32.ResNet32).eval()
    labelled = images_of(TRAIN[1], 2000, 1) if options.select else resnet32.images()
    yardstick = Yardstick(original, *labelled)
    print(f"original: {yardstick.right:.2f} % right", flush=True)
    draws = [
        list(images_of(TRAIN[0], options.count, seed)[0].split(64)) for seed in range(options.seeds)
    ]
    rows: dict[str, Any] = {}
    for name, (target, settings) in CASES.items():
        plan = nc.make_plan(original, target, example_inputs=(draws[0][0][:2],), options=settings)
        model = nc.apply_plan(original, plan).model
        row: dict[str, Any] = {"no data": yardstick.of(model)}
        if target != "wn+mobn":
            row["calibrated"] = []
            for data in draws:
                start = time.perf_counter()
                result = nc.calibrate(model, plan, data, reference=original)
                seconds = time.perf_counter() - start
                row["calibrated"].append(yardstick.of(result.model) | {"seconds": seconds})
            drops = [each["drop"] for each in row["calibrated"]]
            row["mean drop"], row["worst drop"] = statistics.mean(drops), max(drops)
        rows[name] = row
        print(name, f"{row['no data']['drop']:.2f}", row.get("mean drop"), flush=True)
    if (fixed := opacus_fixed(original)) is not None:
        rows["Opacus's fixer"] = {"no data": yardstick.of(fixed)}
    document = {
        "machine": machine(),
        "command": f"--count {options.count} --seeds {options.seeds}"
        + " --select" * options.select,
        "images": len(yardstick.labels),
        "original right": yardstick.right,
        "rows": rows,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

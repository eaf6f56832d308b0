"""BatchNorm to GroupNorm on a pretrained network: no data, calibrated, recovered, fine-tuned, folded.

    python -m benchmarks.group_norm --out docs/results/gn-ws.json

Needs the CIFAR-10 images and the ResNet-32 weights in the folder that NORMCONV_DATA names. Calibration
and recovery take training images without labels, another draw for each seed. Methods and settings were
chosen with --select, on training images that neither uses; the test images were run once, for the table.
What is measured is written as it is found, and a run goes on from that.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normconv as nc
from benchmarks.machine import machine
from normconv.calibration import Lesson, wilson_interval
from normconv.files import write_json
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


@dataclass
class Bench:
    """What every measurement shares.

    Args:
        original: the network with BatchNorm.
        yardstick: labelled images.
        calibration: for each seed a few batches of unlabelled images.
        lessons: for each seed many.
        steps: of a lesson.
    """

    original: nn.Module
    yardstick: Yardstick
    calibration: list[list[Tensor]]
    lessons: list[list[Tensor]]
    steps: int

    def plan(self, target: str, settings: dict[str, Any]) -> nc.Plan:
        """Return the plan of a case."""
        inputs = (self.calibration[0][0][:2],)
        return nc.make_plan(self.original, target, example_inputs=inputs, options=settings)

    def conversion(self, target: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Measure a target: no data, calibrated, recovered; one row for each seed."""
        plan = self.plan(target, settings)
        model = nc.apply_plan(self.original, plan).model
        row: dict[str, Any] = {"no data": self.yardstick.of(model)}
        if all(step.fidelity == "exact" for step in plan.converted):
            return row
        row |= {"calibrated": [], "recovered": []}
        for seed, data in enumerate(self.calibration):
            start = time.perf_counter()
            result = nc.calibrate(model, plan, data, reference=self.original)
            seconds = {"seconds": time.perf_counter() - start}
            row["calibrated"].append(self.yardstick.of(result.model) | seconds)
            if "eps" not in settings:  # the usual eps is shown for what it does without a lesson
                row["recovered"].append(self.recovered(result.model, seed))
        return row

    def recovered(self, student: nn.Module, seed: int) -> dict[str, Any]:
        """Teach a student for the steps of a lesson and measure it."""
        start = time.perf_counter()
        lesson = Lesson(steps=self.steps, seed=seed)
        result = nc.recover(student, self.original, self.lessons[seed], lesson=lesson)
        seconds = time.perf_counter() - start
        return self.yardstick.of(result.model) | {
            "seconds": seconds,
            "best at step": result.report.facts["best at step"],
        }

    def other_tool(self) -> dict[str, Any] | None:
        """Measure what Opacus's own fixer makes, and that taught in the same way."""
        if (fixed := opacus_fixed(self.original)) is None:
            return None
        seeds = range(len(self.lessons))
        row: dict[str, Any] = {"no data": self.yardstick.of(fixed)}
        return row | {"recovered": [self.recovered(fixed, seed) for seed in seeds]}

    def tuned(
        self, target: str | None, settings: dict[str, Any], clip: float | None
    ) -> dict[str, Any]:
        """Fine-tune at batch size 2 for 500 steps; the original for no target."""
        row: dict[str, Any] = {"start": [], "end": []}
        for seed, data in enumerate(self.calibration):
            model = copy.deepcopy(self.original)
            if target is not None:
                plan = self.plan(target, settings)
                model = nc.apply_plan(self.original, plan).model
                if target.startswith("gn"):
                    model = nc.calibrate(model, plan, data, reference=self.original).model
            row["start"].append(self.yardstick.of(model))
            fine_tune_(model, *images_of(TRAIN[0], 1000, 100 + seed), clip)
            row["end"].append(self.yardstick.of(model))
        drops = [a["right"] - b["right"] for a, b in zip(row["start"], row["end"], strict=True)]
        return row | {"mean loss": statistics.mean(drops), "worst loss": max(drops)}

    def folded(self) -> dict[str, Any]:
        """Fold a calibrated gn+ws model and hold torch and ONNX Runtime to the noise floor."""
        plan = self.plan("gn+ws", {})
        model = nc.apply_plan(self.original, plan).model
        data = self.calibration[0]
        model = nc.calibrate(model, plan, data, reference=self.original).model
        plain = nc.fold(model).model
        kinds = Counter(type(module).__name__ for module in plain.modules())
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            nc.export_onnx(model, path, example_inputs=(data[0],))
            reports = {
                "torch": nc.verify(model, plain, (data[0],)),
                "ONNX Runtime": nc.verify(model, path, (data[0],)),
            }
        checks = {
            name: [vars(check) for check in report.checks] for name, report in reports.items()
        }
        passed = all(report.passed for report in reports.values())
        return {"modules": dict(kinds), "checks": checks, "passed": passed}


def fine_tune_(model: nn.Module, images: Tensor, labels: Tensor, clip: float | None) -> None:
    """500 steps at batch size 2: SGD, learning rate 1e-3, momentum 0.9, cross-entropy.

    Args:
        model: changed.
        images: 1,000.
        labels: theirs.
        clip: a bound on the gradient's norm over all parameters; None for none.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()
    for step in range(500):
        x, y = images[2 * step : 2 * step + 2], labels[2 * step : 2 * step + 2]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


TUNED: dict[str, tuple[str | None, dict[str, Any]]] = {
    "bn, the original": (None, {}),
    "gn": ("gn", {}),
    "gn+ws": ("gn+ws", {}),
    "wn": ("wn", {}),
    "wn+mobn": ("wn+mobn", {}),
}


def drops(rows: list[dict[str, Any]]) -> str:
    """Say the mean and the worst drop."""
    found = [row["drop"] for row in rows]
    return f"{statistics.mean(found):.2f} (worst {max(found):.2f})" if found else ""


def main() -> None:
    """Convert, calibrate, recover, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/gn-ws.json"))
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--steps", type=int, default=400, help="of a lesson of batches of 64")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--select", action="store_true", help="training images as the yardstick")
    options = parser.parse_args()
    original = nc.load(resnet32.WEIGHTS, model=resnet32.ResNet32).eval()
    labelled = images_of(TRAIN[1], 2000, 1) if options.select else resnet32.images()
    yardstick = Yardstick(original, *labelled)
    print(f"original: {yardstick.right:.2f} % right", flush=True)
    seeds = range(options.seeds)
    few = [list(images_of(TRAIN[0], options.count, seed)[0].split(64)) for seed in seeds]
    pool = images_of(TRAIN[0], 25000, 1000)[0]
    many = list(pool.split(64))
    bench = Bench(original, yardstick, few, [many] * options.seeds, options.steps)
    command = f"--count {options.count} --steps {options.steps} --seeds {options.seeds}"
    document: dict[str, Any] = {
        "machine": machine(),
        "command": "python -m benchmarks.group_norm " + command + " --select" * options.select,
        "images": len(yardstick.labels),
        "original right": yardstick.right,
        "rows": {},
        "fine-tuned": {},
        "fine-tuned, clipped": {},
    }
    if options.out.exists():
        found = json.loads(options.out.read_text())
        if found.get("command") == document["command"]:
            document = found

    def write() -> None:
        write_json(options.out, document)

    for name, case in CASES.items():
        if name not in document["rows"]:
            row = document["rows"][name] = bench.conversion(*case)
            said = [drops(row.get(stage, [])) for stage in ("calibrated", "recovered")]
            print(name, f"{row['no data']['drop']:.2f}", *said, sep=" | ", flush=True)
            write()
    if "Opacus's fixer" not in document["rows"] and (other := bench.other_tool()) is not None:
        document["rows"]["Opacus's fixer"] = other
        print("Opacus", other["no data"]["drop"], drops(other["recovered"]), sep=" | ", flush=True)
        write()
    for part, clip in (("fine-tuned", None), ("fine-tuned, clipped", 1.0)):
        for name, (target, settings) in TUNED.items():
            if name not in document[part]:
                row = document[part][name] = bench.tuned(target, settings, clip)
                print(part, name, row["mean loss"], row["worst loss"], flush=True)
                write()
    document["folded"] = bench.folded()
    write()
    print("folded", document["folded"]["passed"])


if __name__ == "__main__":
    main()

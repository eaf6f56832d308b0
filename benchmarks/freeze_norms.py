"""GroupNorms of trained networks become constants: what that costs, and what a lesson gives back.

    python -m benchmarks.freeze_norms --out docs/results/freeze-norms.json

Needs the CIFAR-10 images and the ResNet-32 weights in the folder that NORMCONV_DATA names. Two networks
are trained from scratch at batch size 2, one with GroupNorm, one with standardized weights as well; the
pretrained ResNet-32 is converted to `gn+ws` and fine-tuned with labels at batch size 2. Then each is
frozen on training images without labels, taught by itself, and run on the test images. What is measured
is written as it is found, and a run goes on from that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normconv as nc
from benchmarks.group_norm import TRAIN, Yardstick, images_of
from benchmarks.machine import machine
from benchmarks.markers import RESULTS, fill
from normconv.deploy import norm_nodes
from normconv.files import write_json
from tests.networks import resnet32

GOAL = 0.8  # points that the frozen network may lose against the one with norms
_EXAMPLE = torch.zeros(2, 3, 32, 32)


class ResNet14(resnet32.ResNet32):
    """Two blocks a stage instead of five."""

    @staticmethod
    def _stage(width_in: int, width: int, stride: int) -> nn.Sequential:
        first = resnet32.Block(width_in, width, stride)
        return nn.Sequential(first, resnet32.Block(width, width, 1))


def trained_(model: nn.Module, images: Tensor, labels: Tensor, steps: int, lr: float) -> nn.Module:
    """Train at batch size 2: SGD with momentum 0.9, cosine, clipped gradients, mirrored images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(labels), (2,), generator=rng)
        x = images[chosen]
        x = x.flip(-1) if torch.rand((), generator=rng) < 0.5 else x
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 2000 == 1999:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def from_scratch(target: str, steps: int) -> nn.Module:
    """A small network with GroupNorm, 16 channels a group, trained on 25,000 images."""
    torch.manual_seed(0)
    plain = ResNet14()
    options = {"channels_per_group": 16}
    model = nc.convert(plain, target, example_inputs=(_EXAMPLE,), options=options).model
    return trained_(model, *images_of(TRAIN[0], 25000, 0), steps, 5e-3)


def fine_tuned(steps: int) -> nn.Module:
    """The pretrained network as `gn+ws`, calibrated, then fine-tuned."""
    original = nc.load(resnet32.WEIGHTS, model=resnet32.ResNet32).eval()
    data = list(images_of(TRAIN[0], 256, 0)[0].split(64))
    model = nc.convert(original, "gn+ws", example_inputs=(data[0],), data=data).model
    return trained_(model, *images_of(TRAIN[0], 25000, 1), steps, 1e-3)


def measured(model: nn.Module, yardstick: Yardstick, count: int, steps: int) -> dict[str, Any]:
    """Freeze a network, teach it, and compare both with it; count the norms of the files."""
    data = list(images_of(TRAIN[1], count, 2)[0].split(64))
    lesson = list(images_of(TRAIN[1], 25000, 3)[0].split(64))
    row: dict[str, Any] = {"norms": yardstick.of(model)}
    for name, recover in (("frozen", 0), ("recovered", steps)):
        start = time.perf_counter()
        result = nc.freeze_norms(model, data, recover=recover, recover_data=lesson)
        row[name] = yardstick.of(result.model) | {"seconds": time.perf_counter() - start}
        row[name]["norm nodes"] = _norm_nodes(result.model)
        print(f"  {name}: {row[name]['drop']:.2f} lost", flush=True)
    row["norms"]["norm nodes"] = _norm_nodes(model)
    return row


def _norm_nodes(model: nn.Module) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        nc.export_onnx(model, path, example_inputs=(_EXAMPLE,))
        return len(norm_nodes(path))


def rows_of(document: dict[str, Any]) -> list[str]:
    """Return the table."""
    rows = [
        "| network | with its norms | frozen | lost | taught by itself | lost | norm nodes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in document["rows"].items():
        norms, frozen, recovered = row["norms"], row["frozen"], row["recovered"]
        lost = f"{recovered['drop']:.2f}"
        lost = lost if recovered["drop"] <= GOAL else f"**{lost}**"
        rows.append(
            f"| {name} | {norms['right']:.2f} % | {frozen['right']:.2f} % | {frozen['drop']:.2f} | "
            f"{recovered['right']:.2f} % | {lost} | {norms['norm nodes']} → {recovered['norm nodes']} |"
        )
    return rows


def main() -> None:
    """Train, freeze, teach, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "freeze-norms.json")
    parser.add_argument("--steps", type=int, default=25_000, help="of training from scratch")
    parser.add_argument("--tuning", type=int, default=2_000, help="steps of fine-tuning")
    parser.add_argument("--count", type=int, default=512, help="images to set constants on")
    parser.add_argument("--recover", type=int, default=400, help="steps of a lesson")
    options = parser.parse_args()
    said = f"--steps {options.steps} --tuning {options.tuning} --count {options.count}"
    command = f"python -m benchmarks.freeze_norms {said} --recover {options.recover}"
    document: dict[str, Any] = {"machine": machine(), "command": command, "rows": {}}
    if options.out.exists():
        found = json.loads(options.out.read_text())
        document = found if found.get("command") == command else document
    cases: dict[str, Callable[[], nn.Module]] = {
        "ResNet-32, `gn+ws`, fine-tuned at batch 2": lambda: fine_tuned(options.tuning),
        "ResNet-14, `gn`, trained at batch 2": lambda: from_scratch("gn", options.steps),
        "ResNet-14, `gn+ws`, trained at batch 2": lambda: from_scratch("gn+ws", options.steps),
    }
    images, labels = resnet32.images()
    for name, made in cases.items():
        if name in document["rows"]:
            continue
        print(name, flush=True)
        model = made()
        yardstick = Yardstick(model, images, labels)
        document["rows"][name] = measured(model, yardstick, options.count, options.recover)
        write_json(options.out, document)
    if options.out == RESULTS / "freeze-norms.json":
        fill(RESULTS / "deploy.md", {"frozen norms": lambda: rows_of(document)})


if __name__ == "__main__":
    main()

"""Time of `make_plan` against the number of sites and of parameters.

    python -m benchmarks.planning --out docs/results/planning.json

Synthetic chains of convolution, BatchNorm and ReLU with 10 to 2000 sites, and timm models from small to
large with random weights. Processor seconds on one thread; the best of up to three runs counts. The page
beside the JSON file is written from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normconv as nc
from benchmarks.machine import machine
from benchmarks.markers import page_of
from normconv.graph import survey

CHAINS = {"fx": (10, 30, 100, 300, 1000, 2000), "export": (10, 30, 100, 300, 1000)}
MODELS = {
    "fx": (
        "mobilenetv3_small_050",
        "resnet18",
        "resnet50",
        "resnet152",
        "tf_efficientnet_b0",
        "densenet201",
        "regnety_640",
    ),
    "export": ("resnet18", "resnet50", "tf_efficientnet_b0"),
}


def chain(sites: int) -> nn.Module:
    """A net of that many convolutions, each with a norm."""
    layers: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(sites - 1):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def measure(name: str, model: nn.Module, args: tuple[Any, ...], method: str) -> dict[str, Any]:
    """Time the plan, or for a capture that would not come first, what a plan is made of."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < 20:
        start = time.process_time()
        if method == "fx":
            sites = len(nc.make_plan(model, "wn", example_inputs=args).steps)
        else:
            sites = len(survey(model, args, methods=(method,)).sites)
        seconds.append(time.process_time() - start)
    return {
        "model": name,
        "capture": method,
        "sites": sites,
        "modules": sum(1 for _ in model.modules()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": min(seconds),
        "milliseconds a site": 1e3 * min(seconds) / max(1, sites),
    }


def page(document: dict[str, Any]) -> str:
    """Return the page for the measurements."""
    rows = [
        "| model | capture | sites | modules | parameters | seconds | ms a site |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in document["cases"]:
        cells = [
            case["model"],
            case["capture"],
            case["sites"],
            case["modules"],
            f"{case['parameters'] / 1e6:.2f} M",
            f"{case['seconds']:.2f}",
            f"{case['milliseconds a site']:.1f}",
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    text = [
        '`nc.make_plan(model, "wn", ...)`; with `export` the survey of sites that a plan is made',
        "from, by that capture alone. Processor seconds on one thread, best of up to three runs.",
    ]
    command = "OMP_NUM_THREADS=1 python -m benchmarks.planning --out docs/results/planning.json"
    return page_of("Time of planning", text, command, document["machine"], rows)


def main() -> None:
    """Run all cases, write the JSON file and the page beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/planning.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm

    torch.set_num_threads(1)
    cases = []
    x = torch.randn(2, 3, 16, 16)
    measure("warm-up", chain(2), (x,), "fx")
    measure("warm-up", chain(2), (x,), "export")
    for method in ("fx", "export"):
        for sites in CHAINS[method]:
            cases.append(measure("chain", chain(sites), (x,), method))
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
        for name in MODELS[method]:
            model = timm.create_model(name).eval()
            cases.append(measure(f"timm {name}", model, (torch.randn(2, 3, 224, 224),), method))
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    document = {"machine": machine(), "cases": cases}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()

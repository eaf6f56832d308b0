"""Peak memory of the in-place conversion beyond the model, against the model's largest layer.

    python -m benchmarks.in_place --out docs/results/in-place.json

Each case runs in a child process of its own: the model is built with random weights, a small model is
converted first so that no import is measured, then `convert_(prove=False)` runs. Two figures are taken in
two runs: the growth of the process's resident size at its peak (Linux), and the most that torch's own
allocator held beyond what it held before. The page beside the JSON file is written from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normconv as nc
from benchmarks.export_cost import _held, _peak, _reset_peak
from benchmarks.machine import machine
from benchmarks.markers import page_of
from normconv.numerics import give_back_memory

BOUND = 1.2
MODELS = ("wide", "wide transposed", "timm:regnety_640")
TARGETS = ("wn", "plain")


def build(spec: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Return a model of about 1 GB and a small input."""
    torch.manual_seed(0)
    if spec.startswith("timm:"):
        return nc.load(spec, random_weights=True).eval(), (torch.randn(1, 3, 64, 64),)
    convolution = nn.ConvTranspose2d if spec == "wide transposed" else nn.Conv2d
    widths = [3, *[1024] * 25, 2560]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [
            convolution(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers).eval(), (torch.randn(1, 3, 8, 8),)


def child(spec: str, to: str, how: str) -> dict[str, Any]:
    """Convert one model in place and return what it took, in bytes and seconds."""
    small = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nc.convert_(small, to, example_inputs=(torch.zeros(1, 3, 8, 8),), prove=False)
    model, args = build(spec)
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    give_back_memory(cycles=True)
    measured: dict[str, Any] = {"model": sum(sizes), "largest layer": max(sizes)}
    before = _held()
    _reset_peak()
    start = time.perf_counter()
    if how == "resident":
        report = nc.convert_(model, to, example_inputs=args, prove=False).report
        measured["seconds"] = time.perf_counter() - start
        measured["beyond the model"] = _peak() - before
    else:
        with torch.profiler.profile(profile_memory=True) as profile:
            report = nc.convert_(model, to, example_inputs=args, prove=False).report
        measured["beyond the model"] = _most_allocated(profile)
    measured["actions"] = report.facts["actions"]
    return measured


def _most_allocated(profile: Any) -> int:
    """The peak of what torch allocated and did not free since the profile began, in bytes."""
    held = most = 0
    nodes = list(profile.profiler.kineto_results.experimental_event_tree())
    events = []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == "[memory]":
            events.append((node.start_time_ns, node.extra_fields.alloc_size))
    for _, size in sorted(events):
        held += size
        most = max(most, held)
    return most


def _run(spec: str, to: str, how: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.in_place", "--child", spec, to, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def page(document: dict[str, Any]) -> str:
    """Return the page for the measurements."""
    rows = [
        "| model | target | model MB | largest layer MB | resident MB (ratio) | torch MB (ratio) "
        "| seconds | bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in document["cases"]:
        largest = case["largest layer"]
        figures = [
            f"{case[how] / 1e6:.1f} ({case[how] / largest:.2f})" for how in ("resident", "torch")
        ]
        verdict = "pass" if case["resident"] <= BOUND * largest else "miss"
        cells = [
            case["spec"],
            case["to"],
            f"{case['model'] / 1e6:.0f}",
            f"{largest / 1e6:.1f}",
            *figures,
            f"{case['seconds']:.1f}",
            verdict,
        ]
        rows.append("| " + " | ".join(cells) + " |")
    text = [
        "`nc.convert_(model, to, prove=False)` may take 1.2 times the largest layer beyond the",
        "model.",
        "Resident is the growth of the process's resident size at its peak, torch the peak of what",
        "torch's allocator held beyond the model; in brackets each over the largest layer.",
    ]
    command = "python -m benchmarks.in_place --out docs/results/in-place.json"
    return page_of("Memory of the in-place conversion", text, command, document["machine"], rows)


def main() -> None:
    """Run the cases, write the JSON file and the page beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "TARGET", "HOW"))
    parser.add_argument("--out", type=Path, default=Path("docs/results/in-place.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    cases = []
    for spec in MODELS:
        for to in TARGETS:
            resident, allocated = _run(spec, to, "resident"), _run(spec, to, "torch")
            cases.append(
                {
                    "spec": spec,
                    "to": to,
                    **resident,
                    "resident": resident.pop("beyond the model"),
                    "torch": allocated["beyond the model"],
                }
            )
            cases[-1].pop("beyond the model", None)
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    document = {"machine": machine(), "bound": BOUND, "cases": cases}
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()

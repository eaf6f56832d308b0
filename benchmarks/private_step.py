"""Time of a private step on reparametrised networks against the same network of plain layers.

    OMP_NUM_THREADS=1 python -m benchmarks.private_step --out docs/results/private-step.json

A step is forward, backward with the gradient of every sample, and clearing them, under Opacus's
`GradSampleModule`; clipping and noise are the same work for any network and left out. The networks have
the same convolutions and GroupNorms: plain, weight-normed, weight-standardized, and plain of a class that
Opacus has no sampler for and takes through `torch.func`. `ghost` is the step that wants norms alone. Each
round runs all of them, in an order that moves on from round to round; a ratio is the median over the
rounds of the time over that of plain layers in the same round. Time is the processor's, so that other
work on the machine does not count; it is that of all threads, hence one thread. The page beside the JSON
file is written from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import machine
from benchmarks.markers import page_of
from normconv.layers import weight_norm_, weight_standardize_
from normconv.privacy import register_grad_samplers, without_in_place

BOUND = 1.2


class Unregistered(nn.Conv2d):
    """A convolution that Opacus does not know."""


def _unregistered_(layer: nn.Module) -> nn.Module:
    layer.__class__ = Unregistered
    return layer


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "weight norm": weight_norm_,
    "weight standardization": weight_standardize_,
    "torch.func": _unregistered_,
}
JUDGED = ("weight norm", "weight standardization")


def small() -> nn.Module:
    """Four convolutions as private training commonly uses them, for 32 x 32 images."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def grouped() -> nn.Module:
    """Inverted bottlenecks: 1 x 1, depthwise, 1 x 1."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU()]
    for before, after in ((16, 24), (24, 32)):
        wide = 4 * before
        layers += [nn.Conv2d(before, wide, 1), nn.GroupNorm(8, wide), nn.ReLU()]
        layers += [nn.Conv2d(wide, wide, 3, 2, 1, groups=wide), nn.GroupNorm(8, wide), nn.ReLU()]
        layers += [nn.Conv2d(wide, after, 1), nn.GroupNorm(8, after)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def resnet18() -> nn.Module:
    """Torchvision's, with GroupNorm and without writing into activations."""
    from torchvision import models

    model = models.resnet18(norm_layer=lambda width: nn.GroupNorm(16, width))
    return without_in_place(model, example_inputs=(torch.zeros(1, 3, 32, 32),)).model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small": small,
    "grouped": grouped,
    "resnet18": resnet18,
}


def variants(network: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Make a network of each kind, with the same weights to begin with."""
    torch.manual_seed(0)
    original, made = network(), {}
    for kind, convert_ in KINDS.items():
        model = copy.deepcopy(original)
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d):
                convert_(module)
        made[kind] = model
    return made


def step_of(model: nn.Module, mode: str, images: torch.Tensor) -> Callable[[], float]:
    """Wrap a model as Opacus does, and return a step that gives its seconds."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping

    wrapper = GradSampleModule if mode == "hooks" else GradSampleModuleFastGradientClipping
    watched = wrapper(model.train(), loss_reduction="sum")

    def step() -> float:
        start = time.process_time()
        watched(images).square().sum().backward()
        if mode == "ghost":
            watched.get_norm_sample()
        watched.zero_grad(set_to_none=True)
        return time.process_time() - start

    return step


def measure(name: str, mode: str, *, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Time the kinds of one network, each once a round."""
    images = torch.randn(batch, 3, size, size)
    steps = {kind: step_of(m, mode, images) for kind, m in variants(NETWORKS[name]).items()}
    for step in steps.values():
        step()  # first calls choose kernels
    kinds, seconds = list(steps), {kind: list[float]() for kind in steps}
    for turn in range(rounds):
        first = turn % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            seconds[kind].append(steps[kind]())
    ratios = {
        kind: statistics.median(t / p for t, p in zip(times, seconds["plain"], strict=True))
        for kind, times in seconds.items()
    }
    return {
        "network": name,
        "mode": mode,
        "batch": batch,
        "size": size,
        "rounds": rounds,
        "milliseconds": {kind: 1e3 * statistics.median(times) for kind, times in seconds.items()},
        "ratio": ratios,
        "within the bound": all(ratios[kind] <= BOUND for kind in JUDGED),
    }


def page(document: dict[str, Any]) -> str:
    """Return the page for the measurements."""
    rows = [
        "| network | mode | batch | plain ms | " + " | ".join(list(KINDS)[1:]) + " | bound |",
        "|---|---|---|---|" + "---|" * len(KINDS),
    ]
    for case in document["cases"]:
        cells = [
            f"{case['network']}, {case['size']} x {case['size']}",
            case["mode"],
            case["batch"],
            f"{case['milliseconds']['plain']:.1f}",
            *(f"{case['ratio'][kind]:.2f}" for kind in list(KINDS)[1:]),
            "pass" if case["within the bound"] else "miss",
        ]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    text = [
        "Forward, backward with per-sample gradients (`hooks`) or their norms alone (`ghost`), under",
        "Opacus, in processor time. Ratios to the network of plain layers, medians of interleaved",
        "rounds; weight norm",
        f"and weight standardization may take {BOUND} times as long. `torch.func` is a plain layer",
        "of a class that Opacus has no sampler for.",
    ]
    command = (
        f"OMP_NUM_THREADS={document['threads']} python -m benchmarks.private_step "
        "--out docs/results/private-step.json"
    )
    return page_of("Time of a private step", text, command, document["machine"], rows)


def main() -> None:
    """Run all cases, write the JSON file and the page beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/private-step.json"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    register_grad_samplers()
    cases = []
    for name in options.networks:
        for mode in ("hooks", "ghost"):
            cases.append(
                measure(
                    name,
                    mode,
                    batch=options.batch,
                    size=options.size,
                    rounds=options.rounds,
                )
            )
            print(json.dumps(cases[-1]), file=sys.stderr, flush=True)
    document = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "bound": BOUND,
        "cases": cases,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(page(document))


if __name__ == "__main__":
    main()

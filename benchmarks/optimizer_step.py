"""Time of a step of rows against torch's own, on the weights of a network.

    python -m benchmarks.optimizer_step --out docs/results/optimizer-step.json

Gradients are random and stay; nothing but the step is timed, on a CPU by the processor's time. Every way
steps a copy of the same network; each round runs all of them, in an order that moves on from round to
round. `more` is the median over the rounds of the time above that of torch's step in the same round; of
`in graph` it is what computed weights cost in a training step: computing all of them once, and their
backward pass.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import machine
from normconv.layers import Reparametrised, weight_norm_, weight_standardize_
from normconv.training import reparametrise

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-3}),
    "SGD, momentum": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-4, "weight_decay": 0.01}),
}
WAYS = ("loop", "foreach", "compile")


def network(name: str) -> nn.Module:
    """Return an architecture of torchvision without its norms."""
    from torchvision import models

    torch.manual_seed(0)
    model: nn.Module = models.get_model(name, norm_layer=lambda width: nn.Identity())
    return model


def with_gradients(model: nn.Module, device: str) -> nn.Module:
    """Put a model on a device, with random gradients."""
    model.to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return model


def in_graph(model: nn.Module, form: str) -> Callable[[], None]:
    """Return the work of computed weights in one training step."""
    wrap_: Callable[[nn.Module], nn.Module] = weight_norm_ if form == "wn" else weight_standardize_
    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            wrap_(layer)
    layers = [m for m in model.modules() if isinstance(m, Reparametrised)]
    grads = [torch.randn_like(layer.computed()) for layer in layers]

    def work() -> None:
        for layer, grad in zip(layers, grads, strict=True):
            layer.computed().backward(grad)
        model.zero_grad()

    return work


def steps(name: str, form: str, optimizer: str, device: str) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    make, options = OPTIMIZERS[optimizer]
    original = network(name)
    plain = with_gradients(copy.deepcopy(original), device)
    found: dict[str, Callable[[], Any]] = {"torch": make(plain.parameters(), **options).step}
    for way in WAYS:
        model = with_gradients(copy.deepcopy(original), device)
        to: Any = form
        rows = reparametrise(make(model.parameters(), **options), model, to, fused=way)
        found[way] = rows.step
    found["in graph"] = in_graph(copy.deepcopy(original).to(device), form)
    return found


def measure(name: str, form: str, optimizer: str, *, rounds: int, device: str) -> dict[str, Any]:
    """Time all ways, each once a round."""
    work = steps(name, form, optimizer, device)
    first = {}
    for kind, step in work.items():
        first[kind] = _seconds(step, device)  # state is made, and code compiled
        _seconds(step, device)
    kinds, seconds = list(work), {kind: list[float]() for kind in work}
    for turn in range(rounds):
        start = turn % len(kinds)
        for kind in kinds[start:] + kinds[:start]:
            seconds[kind].append(_seconds(work[kind], device))
    base = seconds["torch"]
    more = {
        kind: statistics.median(t - b for t, b in zip(times, base, strict=True))
        for kind, times in seconds.items()
        if kind not in ("torch", "in graph")
    }
    more["in graph"] = statistics.median(seconds["in graph"])
    return {
        "network": name,
        "weights": sum(p.numel() for p in network(name).parameters()),
        "form": form,
        "optimizer": optimizer,
        "device": device,
        "rounds": rounds,
        "milliseconds": {kind: 1e3 * statistics.median(times) for kind, times in seconds.items()},
        "more": {kind: 1e3 * value for kind, value in more.items()},
        "first step, seconds": first,
    }


def _seconds(step: Callable[[], Any], device: str) -> float:
    """Seconds of a call; on the processor those of one core's work, which others do not lengthen."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    _wait(device)
    start = clock()
    step()
    _wait(device)
    return clock() - start


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure all cases and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results/optimizer-step.json"))
    parser.add_argument("--networks", nargs="+", default=["resnet18"])
    parser.add_argument("--forms", nargs="+", choices=("wn", "ws"), default=["wn", "ws"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    cases = []
    for name in options.networks:
        for form in options.forms:
            for optimizer in options.optimizers:
                case = measure(name, form, optimizer, rounds=options.rounds, device=options.device)
                cases.append(case)
                print(json.dumps(case), file=sys.stderr, flush=True)
    document = {"machine": machine(), "threads": torch.get_num_threads(), "cases": cases}
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()

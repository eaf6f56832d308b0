"""Federated averaging of weight-normed models: the average of weights against that of g and v.

    python -m benchmarks.averaging --out docs/results/averaging.json

A small network on scikit-learn's digits, with weight norm in place of its BatchNorm. Each of four clients
holds two thirds of two or three classes and some of the others, and trains two epochs a round; the server
averages. Both ways start from the same weights and see the same batches. In the second case two of the
clients fold and refactor their model before they send it: the same function, with other lengths of v.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normconv as nc
from benchmarks.machine import machine
from normconv.demo.digits import accuracy, load_digits
from normconv.files import write_json
from normconv.numerics import relative_l2
from normconv.training import average, param_groups

CLIENTS, ROUNDS, EPOCHS, BATCH = 4, 5, 2, 32
RATE = 1e-3
SEEDS = range(4)


def network() -> nn.Module:
    """Three convolutions with BatchNorm and a Linear: 21,000 weights."""
    layers: list[nn.Module] = []
    for given, made, stride in ((1, 16, 1), (16, 32, 2), (32, 48, 2)):
        layers += [
            nn.Conv2d(given, made, 3, stride, 1, bias=False),
            nn.BatchNorm2d(made),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10))


def of_parts(models: list[Any]) -> nn.Module:
    """The average of everything as it is stored, g and v included."""
    twin: nn.Module = copy.deepcopy(models[0])
    states = [model.state_dict() for model in models]
    for name, tensor in twin.state_dict().items():
        if tensor.is_floating_point():
            mean = sum(state[name].double() for state in states) / len(states)
            tensor.copy_(mean)
    return twin


def of_weights(models: list[Any]) -> nn.Module:
    """The average that `normconv.training.average` takes."""
    return average(models).model


def split_by_class(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Send two thirds of each class to one client and the rest to any."""
    generator = torch.Generator().manual_seed(0)
    anyone = torch.randint(0, CLIENTS, labels.shape, generator=generator)
    own = torch.rand(labels.shape, generator=generator) < 2 / 3
    client = torch.where(own, labels % CLIENTS, anyone)
    return [(images[client == number], labels[client == number]) for number in range(CLIENTS)]


def trained(model: nn.Module, data: tuple[Tensor, Tensor], seed: int) -> nn.Module:
    """A copy of a model after a client's epochs."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.Adam(param_groups(model, 0.0), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    images, labels = data
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def sent(model: nn.Module, client: int, refactored: bool) -> nn.Module:
    """What a client sends: its model, or the same function folded and split again."""
    if refactored and client % 2:
        return nc.refactor(nc.fold(model).model, like=model).model
    return model


def one_run(seed: int, refactored: bool) -> dict[str, Any]:
    """Both ways over all rounds."""
    torch.manual_seed(seed)
    digits = load_digits()
    net = network().eval()
    images = digits.train_images[:256]
    plain = nc.convert(net, "wn", example_inputs=(images[:2],), layers="all").model
    start = nc.initialise(plain, [images], fresh=True).model
    parts = split_by_class(digits.train_images, digits.train_labels)
    found: dict[str, Any] = {}
    for name, way in (("weights", of_weights), ("g and v", of_parts)):
        model, rounds = start, []
        for number in range(ROUNDS):
            clients = [
                sent(trained(model, part, 100 * seed + 10 * number + client), client, refactored)
                for client, part in enumerate(parts)
            ]
            if number == 0 and name == "weights":
                found["distance after one round"] = _distance(clients)
            model = way(clients)
            with torch.no_grad():
                rounds.append(accuracy(model(digits.test_images), digits.test_labels))
        found[name] = rounds
    return found


def _distance(clients: list[nn.Module]) -> float:
    """How far the weights of the one average are from those of the other, rel-L2."""
    ours, theirs = (nc.fold(way(clients)).model for way in (of_weights, of_parts))
    flat = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ours, theirs)]
    return relative_l2(flat[1], flat[0])


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    begun = time.process_time()
    torch.set_num_threads(1)
    cases = {
        "as trained": [one_run(seed, refactored=False) for seed in SEEDS],
        "two clients folded and refactored": [one_run(seed, refactored=True) for seed in SEEDS],
    }
    document = {
        "machine": machine(),
        "clients": CLIENTS,
        "rounds": ROUNDS,
        "epochs a round": EPOCHS,
        "seeds": len(SEEDS),
        "cases": cases,
        "processor seconds": round(time.process_time() - begun, 1),
    }
    write_json(out, document)
    for case, runs in cases.items():
        for name in ("weights", "g and v"):
            last = torch.tensor([run[name] for run in runs])
            print(case, name, [f"{x:.3f}" for x in last.mean(0).tolist()])
        print("distance", [round(run["distance after one round"], 4) for run in runs])


if __name__ == "__main__":
    main()

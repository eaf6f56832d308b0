"""Time, memory and launches of a training step, against the same network without norms.

    python -m benchmarks.training_speed --out docs/results/training-speed.json
    python -m benchmarks.training_tables

A step is clearing gradients, forward, backward and the optimizer's step (SGD with momentum and weight
decay, or AdamW), on the same inputs for every contender. Each round runs all of them, in an order that
moves on from round to round; a ratio is the median over the rounds of the time over that of the floor in
the same round. The floor is the network after ``--to plain``; of weight standardization, the one with
GroupNorm alone. Activations are checked to be finite before and after. With ``--micro 8`` a step is eight
forward and backward passes. Memory is the peak of a step above what is there before it, and what the
optimizer keeps beyond torch's on the floor. Cases that the file has are not measured again.

The default runs the two networks and the batches that bounds are given for, with one LSTM, in about
twenty minutes on two cores. On CUDA:

    python -m benchmarks.training_speed --device cuda --batches 1 8 64 --compile no yes
    python -m benchmarks.training_speed --device cuda --batches 1 8 64 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import machine
from benchmarks.markers import RESULTS
from benchmarks.training_contenders import CONTENDERS, FLOORS, NETWORKS, loss_of
from normconv.files import write_json
from normconv.training import cached_weights

DEFAULT = (("resnet18", 8, 1), ("resnet50", 2, 1), ("lstm", 8, 1), ("resnet18", 8, 8))
LEAST, MOST = 5, 60


class Case(NamedTuple):
    """What is measured at once.

    Args:
        network: a name of `NETWORKS`.
        batch: samples a forward pass.
        micro: forward and backward passes a step.
        rule: ``sgd`` or ``adamw``.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, or what autocast computes in.
        compiled: whether the model is.
        size: of the image side, 0 for the network's own.
    """

    network: str
    batch: int
    micro: int = 1
    rule: str = "sgd"
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False
    size: int = 0

    @property
    def name(self) -> str:
        """The key in the file."""
        return "/".join(str(value) for value in self)

    def contenders(self) -> list[str]:
        """Return the names of those that take part."""
        found = []
        for name in CONTENDERS:
            on_norms = name == "bn" or name.startswith(("gn", "ws"))
            if on_norms and not NETWORKS[self.network].normed:
                continue
            if "cached" in name and self.micro == 1:
                continue
            # Attention reads the weight of its last Linear without calling it: the hook never runs.
            if name == "wn, torch's hook" and self.network == "vit-hybrid":
                continue
            found.append(name)
        return found


class Training:
    """One contender, ready to step."""

    def __init__(self, case: Case, name: str, network: nn.Module, inputs: Tensor) -> None:
        self.case, self.contender = case, CONTENDERS[name]
        self.model = self.contender.make(network, inputs.cpu()).to(case.device).train()
        self.optimizer = self.contender.optimizer(self.model, case.rule)
        self.called: Any = torch.compile(self.model) if case.compiled else self.model
        rng = torch.Generator().manual_seed(1)
        labels = torch.randint(10, (len(inputs),), generator=rng)
        self.inputs, self.labels = inputs.to(case.device), labels.to(case.device)

    def step(self) -> Tensor:
        """Take one step, and return the loss of its last micro-batch."""
        case = self.case
        self.optimizer.zero_grad()
        caching = self.contender.cached
        with cached_weights(self.model) if caching else contextlib.nullcontext():
            for _ in range(case.micro):
                with torch.autocast(case.device, torch.bfloat16, case.dtype == "bfloat16"):
                    loss = loss_of(self.called, self.inputs, self.labels)
                (loss / case.micro).backward()
        self.optimizer.step()
        return loss.detach()

    def check(self) -> None:
        """Refuse to time a network whose numbers are not finite.

        Raises:
            FloatingPointError: the loss or a gradient is not.
        """
        finite = bool(self.step().isfinite())
        if not finite or any(
            p.grad is not None and not bool(p.grad.isfinite().all())
            for p in self.model.parameters()
        ):
            raise FloatingPointError(f"{self.case.name}: activations or gradients are not finite")

    def kept(self) -> int:
        """Bytes of parameters and of the optimizer's state."""
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        tensors = [*self.model.parameters(), *(v for v in state if isinstance(v, Tensor))]
        return sum(t.numel() * t.element_size() for t in tensors)


def network_of(case: Case) -> tuple[nn.Module, Tensor]:
    """Return the network with its norms, and inputs."""
    made = NETWORKS[case.network]
    shape = made.sample
    if case.size and made.resizable:
        shape = (shape[0], case.size, case.size)
    torch.manual_seed(0)
    return made.make(), torch.randn(case.batch, *shape)


def seconds_of(step: Callable[[], Any], device: str) -> float:
    """Return the wall time of a call, whatever it left running on the device included."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Time all contenders of a case, each once a round, for about so many seconds."""
    network, inputs = network_of(case)
    ready = {name: Training(case, name, network, inputs) for name in case.contenders()}
    for training in ready.values():
        training.check()  # state is made, and code compiled
        training.step()
    names, times = list(ready), {name: list[float]() for name in ready}
    start, turn = time.perf_counter(), 0
    while turn < LEAST or (turn < MOST and time.perf_counter() - start < seconds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds_of(ready[name].step, case.device))
        turn += 1
    for training in ready.values():
        training.check()
    used = {name: profiled(training.step, case.device) for name, training in ready.items()}
    rows = {name: _row(name, times, used, ready) for name in names}
    return {**case._asdict(), "rounds": turn, "threads": torch.get_num_threads(), "rows": rows}


def _row(
    name: str,
    times: dict[str, list[float]],
    used: dict[str, dict[str, int]],
    ready: dict[str, Training],
) -> dict[str, Any]:
    floor = FLOORS.get(name[:2], "plain")
    base = {"over floor": floor, "over plain": "plain", "over bn": "bn"}
    ratios = {
        label: statistics.median(t / b for t, b in zip(times[name], times[other], strict=True))
        for label, other in base.items()
        if other in times
    }
    mine: Any = ready[name].optimizer
    return {
        "milliseconds": 1e3 * statistics.median(times[name]),
        "compared with": floor,
        **ratios,
        "kept more, bytes": ready[name].kept() - ready[floor].kept(),
        **used[name],
        "way": getattr(mine, "way", "torch"),
    }


def profiled(step: Callable[[], Any], device: str) -> dict[str, int]:
    """Return the peak of memory of one step above what is there before it, and what it launches."""
    on_cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    gc.collect()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with profile(activities=activities, profile_memory=not on_cuda) as seen:
        seconds_of(step, device)
    events = seen.profiler.kineto_results.events()
    moved = [e for e in events if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(moved, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    if on_cuda:
        peak = torch.cuda.max_memory_allocated() - before
    kernels = [e for e in events if e.device_type().name == "CUDA" and e.name() != "[memory]"]
    calls = [e for e in events if e.name().startswith("aten::")]
    return {"peak, bytes": peak, "calls of torch": len(calls), "kernels": len(kernels)}


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return what the command asks for."""
    if options.networks is None and options.batches is None and options.micro is None:
        asked = list(DEFAULT)
    else:
        asked = [
            (network, batch, micro)
            for network in options.networks or NETWORKS
            for batch in options.batches or (1, 2, 8, 64)
            for micro in options.micro or (1,)
        ]
    return [
        Case(network, batch, micro, rule, options.device, dtype, compiled == "yes", options.size)
        for network, batch, micro in asked
        for rule in options.optimizers
        for dtype in options.dtype
        for compiled in options.compile
    ]


def main() -> None:
    """Measure the cases that the file lacks, and write it after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "training-speed.json")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--micro", nargs="+", type=int, help="forward and backward passes a step")
    parser.add_argument("--optimizers", nargs="+", choices=("sgd", "adamw"), default=["sgd"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    parser.add_argument("--compile", nargs="+", choices=("no", "yes"), default=["no"])
    parser.add_argument("--size", type=int, default=0, help="of images; 0 for the network's own")
    parser.add_argument("--seconds", type=float, default=240, help="of rounds, for each case")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {}
    found.setdefault("cases", {})
    if options.device == "cuda" and not torch.cuda.is_available():
        print("CUDA cases are left out: torch sees no CUDA device", file=sys.stderr)
        return
    warnings.simplefilter("ignore")
    for case in cases_of(options):
        if case.name in found["cases"]:
            print(f"{case.name} is there", file=sys.stderr, flush=True)
            continue
        try:
            row = measure(case, options.seconds)
        except (torch.OutOfMemoryError, FloatingPointError) as reason:
            print(f"{case.name} is left out: {reason}", file=sys.stderr, flush=True)
            continue
        found["cases"][case.name] = {**row, "machine": _where(options.device)}
        write_json(options.out, found)
        ratios = {k: round(r["over floor"], 3) for k, r in row["rows"].items()}
        print(f"{case.name}: {row['rounds']} rounds, {ratios}", file=sys.stderr, flush=True)


def _where(device: str) -> dict[str, Any]:
    where: dict[str, Any] = dict(machine())
    if device == "cuda":
        where["device"] = torch.cuda.get_device_name()
    return where


if __name__ == "__main__":
    main()

"""Random networks in number: every target on each, one target of many through export and ONNX Runtime.

    python -m benchmarks.random_networks --count 2000 --seed 0 --out docs/results/random-networks.json

The same strategy and the same checks as in `tests/test_random_networks.py`. What fails is written with
the program that makes it again: ``check(Program(...))``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from benchmarks.machine import machine
from normconv.report import jsonable
from tests.random_networks import Checked, Program, check_drawn, programs
from tests.random_networks.layers import NORMS, OPERATORS

_BATCH = 40
_TASKS = 250  # of one process; torch keeps something of every export


@dataclass(frozen=True)
class Outcome:
    """What became of one network; `failure` is empty where every promise holds."""

    checked: Checked | None
    failure: str
    seconds: float


def drawn(count: int, seed: int) -> list[Program]:
    """Draw so many different networks, the same for the same seed."""
    found: dict[str, Program] = {}
    batch = 0
    # Within one batch hypothesis also varies what it has drawn: many batches differ more.
    while len(found) < count:
        for program in _batch(seed * 1_000_000 + batch):
            if len(found) < count:
                found.setdefault(repr(program), program)
        batch += 1
    return list(found.values())


def _batch(seed: int) -> list[Program]:
    found: list[Program] = []

    @seeded(seed)
    @settings(
        max_examples=_BATCH,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def draw(program: Program) -> None:
        found.append(program)

    draw()
    return found


def run_one(program: Program, captures: int, exports: int) -> Outcome:
    """Check one network; whatever is raised is its failure."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    checked, failure = None, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            checked = check_drawn(program, captures=captures, exports=exports)
        except Exception as reason:
            failure = f"{type(reason).__name__}: {reason}"
    return Outcome(checked, failure, time.perf_counter() - start)


def outcomes(networks: list[Program], options: argparse.Namespace) -> Iterator[Outcome]:
    """Check all of them, in order, on several processes."""
    check = partial(run_one, captures=options.captures, exports=options.exports)
    with get_context("spawn").Pool(options.workers, maxtasksperchild=_TASKS) as pool:
        yield from pool.imap(check, networks)


def composition(networks: list[Program]) -> dict[str, Any]:
    """Count what the networks are made of."""
    layers = [layer for program in networks for layer in program.layers]
    marks = Counter(mark for layer in layers for mark in (layer.touch, layer.mode) if mark)
    marks.update(f"not trained: {layer.frozen}" for layer in layers if layer.frozen)
    marks.update("tied" for layer in layers if layer.tie)
    marks.update("two names" for layer in layers if layer.aliases)
    marks.update("hook" for layer in layers if layer.hook)
    marks.update("branch of training" for program in networks if program.aux)
    marks.update("float32 norms in half" for program in networks if program.float_norms)
    marks.update("two inputs" for program in networks if len(program.inputs) > 1)
    marks.update(
        "layer called more than once"
        for program in networks
        for times in Counter(v.path for _, _, v in program.calls(aux=True)).values()
        if times > 1
    )
    others = (layer.kind for layer in layers if layer.kind not in NORMS | OPERATORS)
    functions = (op.kind for program in networks for op in program.ops if op.kind != "call")
    return {
        "norms": Counter(layer.kind for layer in layers if layer.kind in NORMS),
        "operators": Counter(layer.kind for layer in layers if layer.kind in OPERATORS),
        "other layers": Counter(others),
        "functions": Counter(functions),
        "marks": marks,
        "dtypes": Counter(program.dtype for program in networks),
        "outputs": Counter(len(program.outputs) for program in networks),
        "operations a network": statistics.mean(len(program.ops) for program in networks),
    }


def verdicts(done: list[Checked]) -> dict[str, Any]:
    """Count what became of the networks."""
    actions: dict[str, Counter[str]] = {}
    for checked in done:
        for target, counts in checked.actions.items():
            actions.setdefault(target, Counter()).update(counts)
    refusals = [set(reasons) for c in done for reasons in c.refusals.values()]
    return {
        "converted": sum(bool(checked.actions) for checked in done),
        "refused as they must be": sum(bool(checked.refusals) for checked in done),
        "sites by action": actions,
        "reasons of refusals": Counter(_kind(why) for reasons in refusals for why in reasons),
        "captures": Counter(name for checked in done for name in checked.captures),
        "captures compared": sum(len(checked.captures) > 1 for checked in done),
        "exports": Counter(checked.export for checked in done if checked.export),
        "sites nobody can see": [checked.blind for checked in done if checked.blind],
    }


def _kind(reason: str) -> str:
    """A reason without its numbers."""
    return "".join(letter for letter in reason if not letter.isdigit())[:120]


def main() -> int:
    """Draw, check, write; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--captures", type=int, default=1, help="compare them on one in so many")
    parser.add_argument("--exports", type=int, default=3, help="export one float32 one in so many")
    parser.add_argument("--out", type=Path, default=Path("docs/results/random-networks.json"))
    options = parser.parse_args()
    start = time.perf_counter()
    networks = drawn(options.count, options.seed)
    print(f"{len(networks)} networks drawn in {time.perf_counter() - start:.0f} s", flush=True)
    found: list[Outcome] = []
    for program, outcome in zip(networks, outcomes(networks, options), strict=True):
        found.append(outcome)
        if outcome.failure:
            print(f"FAILED {outcome.failure}\n{program!r}", flush=True)
        if len(found) % 100 == 0:
            failed = sum(bool(o.failure) for o in found)
            seconds = time.perf_counter() - start
            print(f"{len(found)} checked, {failed} failed, {seconds:.0f} s", flush=True)
    failures = [
        {"failure": outcome.failure, "program": repr(program)}
        for program, outcome in zip(networks, found, strict=True)
        if outcome.failure
    ]
    each = [outcome.seconds for outcome in found]
    document = {
        "machine": machine(),
        "command": f"--count {options.count} --seed {options.seed} --captures {options.captures} "
        f"--exports {options.exports} --workers {options.workers}",
        "networks": len(networks),
        "failed": len(failures),
        "failures": failures,
        "seconds": round(time.perf_counter() - start),
        "seconds a network": {"median": statistics.median(each), "most": max(each)},
        **verdicts([outcome.checked for outcome in found if outcome.checked is not None]),
        "made of": composition(networks),
    }
    options.out.write_text(json.dumps(jsonable(document), indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

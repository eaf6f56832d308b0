"""The same architectures through torch.fx's fuse, Opacus's fixer and normconv, side by side.

    python -m benchmarks.other_tools --library timm --sample 53

Every tool gets the same float64 model in eval mode, with the same random weights and statistics. Counted
are the norms it took out, those it left, and those in models that came out computing something else
(rel-L2 above 1e-10 from the original). Opacus does not promise the function; what it left in place while
its own validator calls the model valid is counted as well. One process an architecture and tool.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import machine
from benchmarks.zoo_inputs import SAMPLES
from benchmarks.zoo_listing import Entry, listing, representatives
from benchmarks.zoo_models import build, calls, preload
from benchmarks.zoo_pool import Limits, Outcome, Tell, run_all
from normconv.files import write_json
from normconv.graph import is_norm
from normconv.numerics import relative_l2
from normconv.proof import cast_inputs, evaluate, randomise_norms_

__all__ = ["TOOLS"]

BOUND = 1e-10
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _fx_fuse(model: nn.Module, inputs: Inputs) -> nn.Module:
    from torch.fx.experimental.optimization import fuse

    fused: nn.Module = fuse(model)
    return fused


def _opacus(model: nn.Module, inputs: Inputs) -> nn.Module:
    from opacus.validators import ModuleValidator

    fixed: nn.Module = ModuleValidator.fix(model.train())
    model.eval()
    return fixed.eval().double()  # what it puts in is float32


def _normconv(model: nn.Module, inputs: Inputs) -> nn.Module:
    import normconv as nc

    args, kwargs = inputs
    plan = nc.make_plan(model, "wn", example_inputs=args, example_kwargs=kwargs)
    return nc.apply_plan(model, plan).model


TOOLS: dict[str, Callable[[nn.Module, Inputs], nn.Module]] = {
    "torch.fx fuse": _fx_fuse,
    "Opacus fixer": _opacus,
    "normconv wn": _normconv,
}


def _measure(library: str, name: str, tool: str, tell: Tell) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = build(library, name)
    inputs: Inputs | None = None
    for _, make in calls(library, name, model):
        try:
            randomise_norms_(model, *make(SAMPLES))
            args, kwargs = make(2)
            model.double()
            args, kwargs = cast_inputs((args, kwargs), torch.float64)
            reference = evaluate(model, args, kwargs)
            inputs = (args, kwargs)
            break
        except Exception:
            model.float()
    if inputs is None:
        return
    before = sum(is_norm(module) for module in model.modules())
    tell({"norms": before, "failure": "it raised in the process"})
    try:
        made = TOOLS[tool](model, inputs)
        left = sum(is_norm(module) for module in made.modules())
        outputs = evaluate(made, *inputs)
        error = max(relative_l2(outputs[key], reference[key]) for key in reference)
    except Exception as reason:
        text = str(reason).strip().splitlines() or [""]
        tell({"failure": f"{type(reason).__name__}: {text[0]}"[:200]})
        return
    told: dict[str, Any] = {"left": left, "handled": before - left, "error": error, "failure": ""}
    if tool.startswith("Opacus") and left:
        from opacus.validators import ModuleValidator

        told["left and declared valid"] = left if ModuleValidator.is_valid(made.train()) else 0
    tell(told)


def _totals(records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    done = [record for record in records.values() if not record.get("failure")]
    wrong = [record for record in done if not record["error"] <= BOUND]
    return {
        "architectures": len(records),
        "stopped": len(records) - len(done),
        "norms": sum(record.get("norms", 0) for record in records.values()),
        "handled": sum(record["handled"] for record in done),
        "left": sum(record["left"] for record in done),
        "models changed": len(wrong),
        "handled in models changed": sum(record["handled"] for record in wrong),
        "left and declared valid": sum(r.get("left and declared valid", 0) for r in done),
        "worst error": max((record["error"] for record in done), default=None),
    }


def main() -> None:
    """Run every tool on the sample and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", nargs="*", default=["timm", "torchvision"])
    parser.add_argument("--sample", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("docs/results/other-tools.json"))
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, Any]]] = {tool: {} for tool in TOOLS}
    for library in options.library:
        preload(library)
        sample = representatives(listing(library, options.workers))[: options.sample]
        jobs = [(entry, tool) for entry in sample for tool in TOOLS]

        def work(job: tuple[Entry, str], tell: Tell, library: str = library) -> None:
            _measure(library, job[0].name, job[1], tell)

        outcome: Outcome[tuple[Entry, str]]
        for outcome in run_all(jobs, work, Limits(120, 8 * 2**30), options.workers):
            entry, tool = outcome.job
            record = dict(outcome.told) or {"failure": "it could not be called"}
            if outcome.ended:
                record["failure"] = f"{outcome.ended} ({record.get('failure', '')})"
            results[tool][f"{library}:{entry.name}"] = record
            print(f"{library}:{entry.name} {tool} {json.dumps(record)[:150]}", flush=True)
    totals = {tool: _totals(records) for tool, records in results.items()}
    write_json(options.out, {"machine": machine(), "totals": totals, "models": results})
    print(json.dumps(totals, indent=1))


if __name__ == "__main__":
    main()

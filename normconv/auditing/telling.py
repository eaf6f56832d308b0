"""The report of an audit: what the runs of each mode show, as findings, checks and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normconv.auditing.batches import Batch
from normconv.auditing.findings import (
    Finding,
    Kind,
    checks_of,
    is_known_coupler,
    merged,
    rows_of,
    way_out,
)
from normconv.auditing.mode import Seen
from normconv.auditing.slots import bound_of
from normconv.auditing.twin import Twin
from normconv.graph import couples_in_training
from normconv.graph.families import has_known_forward
from normconv.report import Check, Report

__all__ = ["report_of"]


def report_of(
    model: nn.Module, source: nn.Module, twin: Twin, batch: Batch, seen: Mapping[str, Seen]
) -> Report:
    """Put together what an audit found.

    Args:
        model: as it was given.
        source: the same with shapes in place of lazy parameters.
        twin: the copy that was run.
        batch: what it was run on.
        seen: what the runs show, by mode.
    """
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    found = [one for mode in seen for one in _found_in(mode, seen, source, classes, twin)]
    found += _not_called(source, classes, seen)
    findings = merged(found)
    passing = tuple(
        Check(f"{mode} mode", True, detail=_verdict(one))
        for mode, one in seen.items()
        if not any(finding.fails and mode in finding.modes for finding in findings)
    )
    dtype = "its own dtype" if twin.dtype is None else str(twin.dtype).removeprefix("torch.")
    facts = {
        "modes": list(seen),
        "samples": batch.samples,
        "run in": dtype,
        "modules called": {mode: len(one.record.training) for mode, one in seen.items()},
        "functional batch norms": {
            mode: one.batch_norms for mode, one in seen.items() if one.batch_norms
        },
        "findings": {one.module or "(the model)": _plain(one, findings) for one in findings},
    }
    return Report(
        "audit",
        subject=type(model).__name__,
        sites=rows_of(findings),
        checks=passing + checks_of(findings),
        facts=facts,
        notes=_notes(batch, seen, twin),
    )


def _plain(finding: Finding, findings: Sequence[Finding]) -> dict[str, Any]:
    """Findings of one module by kind, for the JSON."""
    same = [one for one in findings if one.module == finding.module]
    return {one.kind: {"modes": list(one.modes), "size": one.size} for one in same}


def _verdict(seen: Seen) -> str:
    called, reached = len(seen.record.training), len(seen.reached)
    return f"no sample sees another: {called} modules called, a changed sample arrived at {reached}"


def _found_in(
    mode: str,
    seen: Mapping[str, Seen],
    source: nn.Module,
    classes: Mapping[str, str],
    twin: Twin,
) -> list[Finding]:
    one = seen[mode]
    modules = dict(source.named_modules())
    found: list[Finding] = []
    in_eval = {name for name, _ in seen["eval"].blames} if "eval" in seen else set()

    def add(name: str, kind: Kind, size: float | None, why: str, way: str) -> None:
        bound = None if size is None else _bound(twin)
        found.append(Finding(name, classes.get(name, ""), kind, (mode,), size, bound, why, way))

    for (name, kind), blame in one.blames.items():
        if kind == "random":
            add(name, "not judged", None, _RANDOM_WHY, _RANDOM_OUT)
            continue
        functions = one.functions.get(name, ())
        why = _why(modules[name], functions, blame.gathered_by)
        add(name, "couples", blame.size, why, way_out(modules[name], functions, name in in_eval))
    for name in one.record.training:
        if name not in one.reached and _couples_by_class(name, modules[name], one):
            add(name, "couples", None, _BY_CLASS, way_out(modules[name]))
    for name, module_state in _state_by_module(one).items():
        size, tensors = module_state
        why = f"{', '.join(tensors)} written from the batch: later samples see it"
        add(name, "keeps statistics", size, why, way_out(modules[name]))
    if one.batch_norms and not any("batch_norm" in f for fs in one.functions.values() for f in fs):
        add("", "couples", None, _BY_GRAPH, _BY_GRAPH_OUT)
    for failure in one.failures:
        add("", "not judged", None, failure, "give other example inputs")
    if one.sizes_vary:
        add(
            "",
            "not judged",
            None,
            _SIZES,
            "give inputs for which they do not, or audit a part of it",
        )
    elif not (one.responds or one.failures or one.blames or _all_reached(one, source)):
        add("", "not judged", None, _BLIND, "give inputs on which the outputs depend")
    return found


_RANDOM_WHY = (
    "it does not repeat itself under a fixed seed, or draws another number of random values when a "
    "sample changes"
)
_RANDOM_OUT = "make what it draws depend on shapes alone, or audit it with the randomness off"
_BY_CLASS = "it normalizes with the batch by its class; no changed sample arrived, nothing measured"
_BY_GRAPH = (
    "its graph calls F.batch_norm on activations with their own batch; no changed sample arrived "
    "there, nothing measured"
)
_BY_GRAPH_OUT = 'convert the model with output="graph" (--output graph), or rewrite it'
_SIZES = "the sizes of its outputs depend on the values, so that rows cannot be compared"
_BLIND = "no output changes when a sample does, so that nothing could be seen"


def _bound(twin: Twin) -> float:
    dtype = twin.dtype or next(
        (p.dtype for p in twin.model.parameters() if p.is_floating_point()), torch.float32
    )
    return bound_of(torch.empty(0, dtype=dtype))


def _why(module: nn.Module, functions: Sequence[str], gathered_by: Sequence[str]) -> str:
    if functions and not couples_in_training(module):
        text = f"other samples change with one; it calls {', '.join(functions)}"
    elif couples_in_training(module):
        text = "normalizes with the statistics of the batch"
    else:
        text = "other samples change with one, in its own code"
    return f"{text}; {', '.join(gathered_by)} gathers the samples" if gathered_by else text


def _couples_by_class(name: str, module: nn.Module, seen: Seen) -> bool:
    """Whether a norm that no change reached takes its statistics from the batch, as torch wrote it."""
    if not couples_in_training(module) or not has_known_forward(module):
        return False
    no_statistics = getattr(module, "running_mean", None) is None
    return seen.record.training[name] or no_statistics


def _all_reached(seen: Seen, model: nn.Module) -> bool:
    """Whether a change arrived at every layer: then an output of zeros (a fresh head) hides none."""
    parts = [name for name, module in model.named_modules() if name and not list(module.children())]
    given = [
        n for n in parts if n in seen.record.training and seen.record.moments[n, 1, "in"].tensors
    ]
    return bool(given) and all(name in seen.reached for name in given)


def _state_by_module(seen: Seen) -> dict[str, tuple[float, list[str]]]:
    found: dict[str, tuple[float, list[str]]] = {}
    for path, size in seen.state.items():
        owner, _, tensor = path.rpartition(".")
        most, tensors = found.get(owner, (0.0, []))
        found[owner] = (max(most, size), [*tensors, tensor])
    return found


def _not_called(
    source: nn.Module, classes: Mapping[str, str], seen: Mapping[str, Seen]
) -> list[Finding]:
    called = {name for one in seen.values() for name in one.record.training}
    return [
        Finding(
            name,
            classes.get(name, type(module).__name__),
            "not called",
            tuple(seen),
            why="no run calls it; it would let samples see each other in training",
            way_out=way_out(module),
        )
        for name, module in source.named_modules()
        if is_known_coupler(module) and name not in called
    ]


def _notes(batch: Batch, seen: Mapping[str, Seen], twin: Twin) -> tuple[str, ...]:
    notes = []
    if batch.enlarged:
        notes.append(f"a batch of {batch.samples} was made of the one sample given")
    if twin.dtype is None:
        notes.append("it could not be run in float64: small couplings hide below the bound")
    for mode, one in seen.items():
        if not (one.responds or one.sizes_vary or one.blames):
            notes.append(f"{mode}: no output changes when a sample does (a layer of zeros?)")
        if one.gathered_outputs:
            notes.append(
                f"{mode}: an output has no axis of samples (a loss, a mean): it takes them all "
                "together and was not judged"
            )
        if one.opaque:
            shown = ", ".join(name or "(the model)" for name in sorted(one.opaque)[:5])
            notes.append(
                f"{mode}: what is called inside {shown} depends on the values: judged by its outputs"
            )
    return tuple(notes)

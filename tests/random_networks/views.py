"""Whether a network is seen: by the proof, by each capture alike, and by ONNX Runtime."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import normconv as nc
from normconv.errors import NormconvError, Refused
from normconv.graph import NormState, norm_state, survey
from normconv.graph.capturing import METHODS
from normconv.numerics import evaluating, relative_l2
from normconv.plan import Plan
from normconv.proof import prove, record_outputs
from normconv.surgery import apply_plan
from tests.random_networks.subject import Subject

__all__ = ["check_captures", "check_export", "check_sight"]


def check_sight(subject: Subject, plan: Plan, site: int) -> str:
    """The proof of a conversion with one norm's μ off by 0.01 σ (in half precision σ) fails.

    Returns:
        Empty; or why nobody could see it: what the norm is judged by hardly moves (its γ is 0, its
        own activation or the layer it is folded into lets nothing through, the dtype is too coarse).
    """
    steps = [step for step in plan.converted if step.phase == "eval"]
    if not steps:
        return ""
    step = steps[site % len(steps)]
    name = step.site
    by = 1.0 if subject.program.dtype.endswith("16") else 0.01
    moved = copy.deepcopy(subject.model)
    state = norm_state(moved.get_submodule(name))
    assert isinstance(state, NormState)
    with torch.no_grad():
        state.mean.add_(by * (state.var + state.eps).sqrt())
    result = apply_plan(moved, plan).model
    proof = prove(subject.model, result, plan.converted, subject.args, subject.kwargs)
    if any(not check.passed for check in proof.checks):
        return ""
    bound = next(row.bound for row in proof.rows if row.site == name) or 0.0
    # A norm folded forward is in the layers after it: where they let nothing through, nobody sees it.
    change = _change(subject, moved, step.consumers or (name,))
    assert change <= 2 * bound, (
        f"the proof does not see {name} moved: its output changes by {change:.3g}"
    )
    return f"{name} ({step.action}): its output changes by {change:.2g} only"


def _change(subject: Subject, moved: nn.Module, names: tuple[str, ...]) -> float:
    """How much the output of some layers changes where the norm's μ does."""
    seen = []
    for model in (subject.model, moved):
        with evaluating(model), record_outputs(model, names) as outputs:
            model(*subject.args, **subject.kwargs)
        seen.append([output for name in names for output in outputs[name]])
    return max(relative_l2(b, a) for a, b in zip(*seen, strict=True))


def check_captures(subject: Subject) -> tuple[str, ...]:
    """Every capture tells the same; only fx may stop, at control flow."""
    told: dict[str, list[Any]] = {}
    stops = {"fx"} if any(op.kind == "branch" for op in subject.program.ops) else set()
    for method in [entry[0] for entry in METHODS]:
        try:
            found = survey(subject.model, subject.args, subject.kwargs, methods=(method,))
        except Refused:
            if method not in stops:
                raise
            continue
        assert found.method == method, f"asked for {method}, got {found.method}"
        told[method] = sorted(
            (s.name, s.producers, s.op, s.phase, s.shape, bool(s.refusal)) for s in found.sites
        )
    first = next(iter(told))
    for method, sites in told.items():
        differing = [pair for pair in zip(told[first], sites, strict=False) if pair[0] != pair[1]]
        same = sites == told[first]
        assert same, f"{first} and {method} differ: {differing or (told[first], sites)}"
    return tuple(told)


def check_export(subject: Subject, target: str) -> str:
    """What a target makes is exported and right in ONNX Runtime.

    Returns:
        ``proved``; or why the original itself cannot be exported either.
    """
    result = apply_plan(subject.model, subject.plan(target)).model
    if not (reason := _exported(result, subject)):
        return "proved"
    original = _exported(subject.model, subject)
    assert original, f"{target}, exported: {reason}"
    return f"nor the original: {original}"


def _exported(model: nn.Module, subject: Subject) -> str:
    """Export; return why it fails, if so."""
    inputs: dict[str, Any] = {"example_inputs": subject.args, "example_kwargs": subject.kwargs}
    with tempfile.TemporaryDirectory() as folder:
        try:
            nc.export_onnx(copy.deepcopy(model).eval(), Path(folder) / "net.onnx", **inputs)
        except NormconvError as error:
            return str(error).strip().replace("\n", "; ")[:300]
    return ""

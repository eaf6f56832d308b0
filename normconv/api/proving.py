"""The proof of a conversion, put into its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normconv.errors import CaptureError, CheckFailed, Problem
from normconv.graph import trace
from normconv.graph.passes import FunctionalNormsToModules
from normconv.numerics import evaluating
from normconv.plan import Plan
from normconv.proof import (
    Proof,
    prove_converted,
    record_original_within,
    with_trained_statistics,
)
from normconv.proof import prove as prove_models
from normconv.report import Report
from normconv.surgery import Result

__all__ = ["META", "is_meta", "prove_conversion", "proved", "to_graph", "unproved"]

META = "nothing was proved: a model on the meta device has no values"


def prove_conversion(
    original: nn.Module,
    result: Result,
    plan: Plan,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    origin: str = "given",
    traced: nn.Module | None = None,
) -> Result:
    """Prove a result of `apply_plan` against its original and put the proof into its report.

    Raises:
        CheckFailed: some check failed.
    """
    facts = {"example inputs": origin, "result class": type(result.model).__name__}
    if is_meta(original):
        return unproved(result, facts, META)
    recording = record_original_within(traced or original, plan.at, plan.steps, args, kwargs)
    proof = prove_converted(recording, result.model)
    checks = proof.checks
    if traced is not None:  # and the whole against the model itself, not only against its trace
        sampled = any(step.fidelity != "exact" for step in plan.converted)
        whole = with_trained_statistics(result.model, plan.steps) if sampled else result.model
        if not any(step.action in ("fresh", "insert") for step in plan.steps):
            checks += prove_models(original, whole, (), args, kwargs).checks
    return proved(result, replace(proof, checks=checks), facts)


def is_meta(model: nn.Module) -> bool:
    """Say whether a model has shapes and no values."""
    return any(parameter.is_meta for parameter in model.parameters())


def unproved(result: Result, facts: Mapping[str, Any], note: str) -> Result:
    """Put into the report why nothing was proved."""
    report = _as_convert(result.report.extended(facts=facts, notes=(note,)))
    return Result(result.model, report)


def proved(result: Result, proof: Proof, facts: Mapping[str, Any]) -> Result:
    """Put a proof into the report.

    Raises:
        CheckFailed: some check failed.
    """
    report = _as_convert(
        result.report.extended(
            sites=proof.rows, checks=proof.checks, facts={**facts, **proof.facts}, notes=proof.notes
        )
    )
    if not report.passed:
        raise CheckFailed(report, result.model)
    return Result(result.model, report)


def _as_convert(report: Report) -> Report:
    return replace(report, verb="convert")


def to_graph(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> torch.fx.GraphModule:
    """Trace a model in eval mode into a GraphModule in which every norm is a module.

    Raises:
        CaptureError: symbolic tracing failed.
    """
    try:
        with evaluating(model):
            traced = trace(model, args, kwargs)
    except Exception as reason:  # whatever the user's forward raises under a proxy
        raise CaptureError(
            Problem(
                type(model).__name__,
                f"torch.fx cannot trace it ({type(reason).__name__}: {reason})",
                'use output="module", which also takes models with control flow',
            )
        ) from reason
    sources = dict(model.named_modules())
    for name, module in traced.named_modules():
        module.training = sources.get(name, model).training
    FunctionalNormsToModules()(traced)
    return traced

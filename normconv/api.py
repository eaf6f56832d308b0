"""`convert`: plan, apply and prove in one call, composed from the rooms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from normconv.errors import CaptureError, CheckFailed, Problem, UsageError
from normconv.graph import trace
from normconv.graph.passes import FunctionalNormsToModules
from normconv.numerics import evaluating, give_back_memory
from normconv.plan import Plan, Recipe, Rule
from normconv.proof import prove
from normconv.report import Report
from normconv.sources import example_inputs as inputs_for
from normconv.surgery import Result, apply_plan, checked_inputs, make_plan

__all__ = ["convert", "prove_conversion", "to_graph"]


def convert(
    model: nn.Module,
    to: str | Rule | Recipe | Sequence[Rule] | Plan = "wn",
    *,
    example_inputs: tuple[Any, ...] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
    strict: bool = True,
    drop_unreached: bool = False,
    output: Literal["module", "graph"] = "module",
) -> Result:
    """Return a copy of the model with its norms rewritten, proved to compute the same.

    The result is of the same class with the same attribute names; training flags, dtype and device
    stay. The proof runs both models in eval mode on the example inputs.

    Args:
        model: any module with BatchNorm; not changed.
        to: a target name (``wn``, ``plain``, ``frozen``), rules, a `Recipe`, or a `Plan` to carry out.
        example_inputs: positional inputs; None takes the model's own config, else what its first
            layer takes, and the report says what was used.
        example_kwargs: keyword inputs.
        include: globs of sites to convert; all by default.
        exclude: globs of sites to keep.
        options: the target's options.
        strict: refuse when a norm would stay that was not excluded.
        drop_unreached: empty the slots of norms that neither eval nor train mode calls.
        output: ``graph`` returns an `fx.GraphModule` rewritten by FX passes.

    Raises:
        PlanError: some norm cannot be converted; names each, with the reason and the way out.
        CaptureError: no dataflow graph could be made of the model.
        CheckFailed: the proof failed; carries the report and the rejected model.
        UsageError: unknown target or option, a rule that matches nothing.

    >>> import normconv as nc
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> model, report = nc.convert(net, to="wn", example_inputs=(torch.randn(2, 3, 8, 8),))
    >>> report.passed, type(model[0]).__name__, type(model[1]).__name__
    (True, 'WNConv2d', 'Identity')
    """
    if output not in ("module", "graph"):
        raise UsageError(Problem("output", f"it is 'module' or 'graph', not {output!r}"))
    origin = "given"
    if example_inputs is None and example_kwargs is None and isinstance(model, nn.Module):
        found = inputs_for(model)
        example_inputs, example_kwargs, origin = found.args, found.kwargs, found.origin
    args, kwargs = checked_inputs(model, example_inputs, example_kwargs)
    base = to_graph(model, args, kwargs) if output == "graph" else model
    if isinstance(to, Plan):
        plan = to
    else:
        plan = make_plan(
            base,
            to,
            example_inputs=args,
            example_kwargs=kwargs,
            include=include,
            exclude=exclude,
            options=options,
            strict=strict,
            drop_unreached=drop_unreached,
        )
    result = apply_plan(base, plan)
    # The sites of a graph are those of the trace: it may have norms that the model calls as functions.
    traced = base if base is not model else None
    del base
    give_back_memory(cycles=True)  # other traces, which hold the original
    result = prove_conversion(model, result, plan, args, kwargs, origin=origin, traced=traced)
    give_back_memory()
    return result


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
    if any(parameter.is_meta for parameter in original.parameters()):
        note = "nothing was proved: a model on the meta device has no values"
        report = _as_convert(result.report.extended(facts=facts, notes=(note,)))
        return Result(result.model, report)
    proof = prove(traced or original, result.model, plan.steps, args, kwargs)
    checks = proof.checks
    if traced is not None:  # and the whole against the model itself, not only against its trace
        checks += prove(original, result.model, (), args, kwargs).checks
    report = _as_convert(
        result.report.extended(
            sites=proof.rows, checks=checks, facts={**facts, **proof.facts}, notes=proof.notes
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

"""Proof that a converted model computes what the original computes: end to end and site by site.

Everything is judged against a float64 run of the original, and held to what rounding explains: four
times the larger of the dtype's eps and the original's own error in that dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from normconv.graph import is_norm
from normconv.numerics import evaluating, noise_bound, relative_l2, unprovable
from normconv.plan import Step
from normconv.proof.outputs import cast_inputs, flat_outputs, map_floats, run_in
from normconv.proof.recorder import record_outputs
from normconv.report import Check, SiteRow

__all__ = ["Proof", "branches_training", "coarsest_dtype", "prove"]

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_SIGHT = 1e-2
_RANDOM = (nn.modules.dropout._DropoutNd,)


@dataclass(frozen=True)
class Proof:
    """What a proof gives to a report.

    Args:
        checks: every check, passed or not.
        rows: the plan's rows with each site's error and bound.
        facts: how it was measured.
        notes: what the reader should know of it.
    """

    checks: tuple[Check, ...]
    rows: tuple[SiteRow, ...]
    facts: Mapping[str, Any]
    notes: tuple[str, ...]


@dataclass
class _Run:
    """One forward pass: named outputs, and what the sites put out."""

    outputs: dict[str, Tensor]
    sites: dict[str, list[Tensor]]
    failure: str = ""


def prove(
    original: nn.Module,
    candidate: nn.Module,
    steps: Sequence[Step],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> Proof:
    """Compare two models in eval mode on the same inputs; neither is changed.

    Args:
        original: the reference; it is run in float64 as well.
        candidate: of the same dtype.
        steps: the plan's steps: the sites to compare at their own output.
        args: positional inputs in the models' dtype.
        kwargs: keyword inputs.
    """
    inputs = (args, dict(kwargs or {}))
    dtype = coarsest_dtype(original)
    eval_steps = [step for step in steps if step.phase == "eval"]
    train_steps = [step for step in steps if step.phase == "train"]
    runs = _runs(original, candidate, eval_steps, inputs, dtype, training=False)
    first = runs.reference if dtype == torch.float64 else runs.own[0]
    checks = [_repeats(original, inputs, first.outputs)]
    outputs, rows = _judged(runs, eval_steps, dtype)
    checks += outputs
    if train_steps:
        in_training = _runs(original, candidate, train_steps, inputs, dtype, training=True)
        rows |= _judged(in_training, train_steps, dtype)[1]
    ordered = tuple(rows.get(step.site, step.row()) for step in steps)
    if steps:
        checks += _site_checks(ordered)
    sight, notes = _sight(runs.reference.outputs)
    facts = {
        "dtype": str(dtype).removeprefix("torch."),
        "sight": sight,
        "sites compared": sum(row.error is not None for row in ordered),
    }
    return Proof(tuple(checks), ordered, facts, notes)


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """Return the floating dtype of the model's tensors with the largest eps; float32 without any."""
    dtypes = {t.dtype for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    return max(dtypes, key=lambda d: torch.finfo(d).eps, default=torch.float32)


@dataclass
class _Runs:
    """The original in float64, the original as it is, the candidate as it is.

    `own` may hold several runs of the original: the worst of their errors is its own error. `again`
    runs it once more, on inputs moved by one ulp.
    """

    reference: _Run
    own: list[_Run]
    candidate: _Run
    again: Callable[[], _Run]


def _runs(
    original: nn.Module,
    candidate: nn.Module,
    steps: Sequence[Step],
    inputs: _Inputs,
    dtype: torch.dtype,
    *,
    training: bool,
) -> _Runs:
    names = {step.site: (step.site,) for step in steps}
    places = _places(candidate, steps)

    def again() -> _Run:
        return _run(original, _one_ulp_up(inputs), names, training)

    if dtype == torch.float64:
        reference, own = _run(original, inputs, names, training), again()
    else:
        own = _run(original, inputs, names, training)
        wide = cast_inputs(inputs, torch.float64)
        reference = run_in(original, torch.float64, lambda m: _run(m, wide, names, training))
    try:
        made = _run(candidate, inputs, places, training)
    except Exception as reason:  # the forward is the user's, and may need what the norm had
        made = _Run({}, {}, f"it raises {type(reason).__name__}: {reason}")
    return _Runs(reference, [own], made, again)


def _judged(
    runs: _Runs, steps: Sequence[Step], dtype: torch.dtype
) -> tuple[list[Check], dict[str, SiteRow]]:
    """Compare outputs and sites; on a miss once more with a second look at the original's own error.

    On few numbers the original's rounding error can be small by luck. Its response to a change of the
    input by one ulp is rounding as well, and is asked for only then.
    """
    checks = _output_checks(runs, dtype)
    rows = {step.site: _site_row(step, runs, dtype) for step in steps}
    if all(check.passed for check in checks) and not any(_missed(row) for row in rows.values()):
        return checks, rows
    runs.own.append(runs.again())
    return _output_checks(runs, dtype), {step.site: _site_row(step, runs, dtype) for step in steps}


def _missed(row: SiteRow) -> bool:
    return row.error is None or row.bound is None or not row.error <= row.bound


def _places(candidate: nn.Module, steps: Sequence[Step]) -> dict[str, tuple[str, ...]]:
    """Where each site's output is to be seen in the candidate: the slot, or what feeds it.

    A pass over a GraphModule takes empty slots out of the graph; the producers' outputs are then the
    site's.
    """
    if not isinstance(candidate, torch.fx.GraphModule):
        return {step.site: (step.site,) for step in steps}
    called = {node.target for node in candidate.graph.nodes if node.op == "call_module"}
    return {s.site: (s.site,) if s.site in called else s.producers for s in steps}


def _run(
    model: nn.Module,
    inputs: _Inputs,
    places: Mapping[str, tuple[str, ...]],
    training: bool,
) -> _Run:
    names = [name for group in places.values() for name in group]
    mode = branches_training(model) if training else evaluating(model)
    with mode, record_outputs(model, names) as seen:
        args, kwargs = inputs
        outputs = flat_outputs(model(*args, **kwargs))
        outputs = {name: tensor.clone() for name, tensor in outputs.items()}
    sites = {
        site: [output for name in group for output in seen.get(name, [])]
        for site, group in places.items()
    }
    return _Run(outputs, sites)


@contextmanager
def branches_training(model: nn.Module) -> Iterator[None]:
    """Training mode for the sake of its branches: norms and dropout stay as in eval mode."""
    with evaluating(model):
        model.train()
        for module in model.modules():
            if is_norm(module) or isinstance(module, _RANDOM):
                module.eval()
        yield


def _one_ulp_up(inputs: _Inputs) -> _Inputs:
    return map_floats(lambda tensor: tensor * (1 + torch.finfo(tensor.dtype).eps), inputs)


def _repeats(original: nn.Module, inputs: _Inputs, first: Mapping[str, Tensor]) -> Check:
    """A model that differs from itself under a fixed seed can prove nothing."""
    second = _run(original, inputs, {}, False).outputs
    differing = [name for name in first if not _same(first[name], second[name])]
    return Check(
        "the original repeats itself",
        not differing,
        detail=f"two runs differ in {', '.join(differing)}" if differing else "",
        way_out="make it deterministic in eval mode (a random or stateful operation is left)",
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


def _output_checks(runs: _Runs, dtype: torch.dtype) -> list[Check]:
    expected, got = runs.reference.outputs, runs.candidate.outputs
    if not expected:
        return [
            Check("outputs", False, detail="the model returns no tensor that could be compared")
        ]
    if runs.candidate.failure:
        return [Check("the converted model runs", False, detail=runs.candidate.failure)]
    if list(expected) != list(got):
        detail = f"the original returns {list(expected)}, the converted model {list(got)}"
        return [Check("outputs", False, detail=detail)]
    checks = []
    for name, reference in expected.items():
        own = max(relative_l2(run.outputs[name], reference) for run in runs.own)
        if got[name].shape != reference.shape:
            shapes = f"{tuple(got[name].shape)} instead of {tuple(reference.shape)}"
            checks.append(Check(name, False, detail=f"shape {shapes}"))
            continue
        if not reference.numel():
            checks.append(Check(name, False, detail="it has no elements to compare"))
            continue
        error = relative_l2(got[name], reference)
        way_out = "prove it in float64: convert model.double()" if unprovable(dtype, own) else ""
        bound = noise_bound(dtype, own)
        checks.append(Check.at_most(name, error, bound, unprovable(dtype, own), way_out))
    return checks


def _site_row(step: Step, runs: _Runs, dtype: torch.dtype) -> SiteRow:
    """Compare a site at its own output; the worst of its calls counts."""
    every = (runs.reference, runs.candidate, *runs.own)
    calls = [run.sites.get(step.site, []) for run in every]
    if len({len(outputs) for outputs in calls}) != 1 or not any(o.numel() for o in calls[0]):
        return replace(step.row(), error=float("nan"), bound=float("nan"))
    error = bound = 0.0
    for reference, candidate, *owns in zip(*calls, strict=True):
        if reference.shape != candidate.shape:
            return replace(step.row(), error=float("nan"), bound=float("nan"))
        this = relative_l2(candidate, reference)
        this_bound = noise_bound(dtype, max(relative_l2(own, reference) for own in owns))
        if not this * bound <= error * this_bound or not bound:
            error, bound = this, this_bound
    return replace(step.row(), error=error, bound=bound)


def _site_checks(rows: tuple[SiteRow, ...]) -> list[Check]:
    measured = [row for row in rows if row.error is not None and row.bound is not None]
    failed = [row for row in measured if _missed(row)]
    if failed:
        return [_site_failure(row) for row in failed]
    return [Check("every site at its own output", True, detail=f"{len(measured)} sites compared")]


def _site_failure(row: SiteRow) -> Check:
    error, bound = row.error or 0.0, row.bound or 0.0
    detail = row.action
    if error != error and bound != bound:
        detail += ": it is not called as often as in the original, or with nothing to compare"
    return Check.at_most(f"site {row.site}", error, bound, detail)


def _sight(outputs: Mapping[str, Tensor]) -> tuple[float | None, tuple[str, ...]]:
    """How much two samples differ at the outputs: does the end-to-end comparison see anything?"""
    sights = [
        relative_l2(tensor[1], tensor[0])
        for tensor in outputs.values()
        if tensor.dim() > 1 and tensor.shape[0] > 1 and tensor.is_floating_point()
    ]
    if not sights:
        return None, ()
    sight = max(sights)
    if sight >= _SIGHT:
        return sight, ()
    note = (
        f"the outputs for two inputs differ by only {sight:.1e}: the end-to-end comparison is nearly "
        "blind here, the comparison site by site carries the proof"
    )
    return sight, (note,)

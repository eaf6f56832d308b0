"""Verifying that one model computes what another does, whichever form each of them has."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normconv.deploy.compare import Reference, compare
from normconv.deploy.parity import backend_errors
from normconv.deploy.runners import Model, ModuleRunner, OnnxRunner, Runner, open_runner
from normconv.errors import MissingDependency, NormconvError, Problem, Refused, UsageError
from normconv.numerics.error import relative_l2
from normconv.report import Check, Report

__all__ = ["batches_of", "verify"]

#: Two inputs must move the output by this much (rel-L2), or an equal output proves little.
SIGHT = 1e-2

_SEED = 0

Batch = tuple[tuple[Any, ...], dict[str, Any]]


def verify(
    reference: Model,
    candidate: Model,
    inputs: Any,
    *,
    provider: str | None = None,
    max_error: float | None = None,
    min_agreement: float | None = None,
) -> Report:
    """Check that `candidate` computes what `reference` computes, up to rounding.

    Each output is held against a float64 run of the reference with the noise-floor criterion:
    ‖y − y₆₄‖₂ / ‖y₆₄‖₂ ≤ 4 · max(eps, own), own being the reference's error in its own dtype on
    torch; where a file misses that, also on the file's backend, up to ten times as much.

    A module is copied and cast for the float64 run, a ``.pt2`` file read again and cast. Where that
    cannot be had (an ``.onnx`` reference, a dtype written into the model), the reference's own run
    is the truth, and its response to a change of every input by one rounding step stands for
    own.

    Args:
        reference: a module, or the path of an ``.onnx`` or ``.pt2`` file.
        candidate: likewise.
        inputs: a tensor, a tuple of tensors, ``(tuple, dict)`` of positional and keyword inputs, a
            dict of keyword inputs, or a list of such batches.
        provider: where the candidate has to run, ``"cpu"`` or ``"cuda"``; None takes the best there
            is for a file, and what it is on for a module.
        max_error: the largest rel-L2 error that passes, instead of the noise floor (for conversions
            that promise no equality).
        min_agreement: the smallest share of rows with the same first class, instead of none that
            differ beyond rounding.

    Returns:
        The report. A candidate that is wrong in any way is a failed check, not an exception.

    Raises:
        UsageError: no such file, no batch, an unknown provider.
        Refused: the reference cannot be run.
        MissingDependency: a file has to be run and there is no ONNX Runtime.
    """
    batches = batches_of(inputs)
    truth = _Truth(open_runner(reference, "cpu"))
    report = Report("verify", subject=f"{_name(candidate)} against {truth.subject}")
    try:
        runner = open_runner(candidate, provider)
    except NormconvError as error:
        if not _is_finding(error):
            raise
        return report.extended(checks=(Check("candidate", False, detail=str(error)),))
    report = report.extended(checks=_provider_checks(runner, provider))
    args, kwargs = batches[0]
    report = report.extended(checks=(truth.repeats(args, kwargs),))
    if not report.passed:
        return report
    rows: dict[str, Any] = {}
    for index, (args, kwargs) in enumerate(batches):
        label = f"batch {index} " if len(batches) > 1 else ""
        step = _Step(truth, runner, args, kwargs, label, max_error, min_agreement)
        checks, facts = step.outcome()
        report = report.extended(checks=checks)
        rows.update(facts)
    report = report.extended(facts=_facts(truth, runner, rows, len(batches)))
    return _with_sight(report, truth, *batches[0])


def batches_of(inputs: Any) -> list[Batch]:
    """Return the batches that `inputs` stands for.

    >>> x = torch.zeros(1)
    >>> [len(batches_of(given)) for given in (x, (x, x), ((x,), {"y": x}), [x, x])]
    [1, 1, 1, 2]
    """
    if isinstance(inputs, list) or (
        isinstance(inputs, Iterable) and not isinstance(inputs, (tuple, Mapping, Tensor))
    ):
        batches = [batch for item in inputs for batch in batches_of(item)]
    elif isinstance(inputs, Mapping):
        batches = [((), dict(inputs))]
    elif not isinstance(inputs, tuple):
        batches = [((inputs,), {})]
    elif len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        batches = [(inputs[0], dict(inputs[1]))]
    else:
        batches = [(inputs, {})]
    if not batches:
        raise UsageError(Problem("inputs", "there is no batch"))
    return batches


class _Truth:
    """The reference, and its float64 run where it has one."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.subject = runner.subject
        self._exact = runner.exact()

    @property
    def kind(self) -> str:
        """How the truth was computed."""
        if self._exact is not None:
            return "float64 run"
        return "own dtype; the bound is its response to a change of one rounding step"

    def repeats(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Check:
        """Check that the reference, run twice under one seed, gives the same twice."""
        first, second = self.runner.run(args, kwargs), self.runner.run(args, kwargs)
        differing = [
            name
            for name, value in first.items()
            if name not in second or not torch.equal(_plain(value), _plain(second[name]))
        ]
        detail = (
            f"{self.subject} differs from itself in {', '.join(differing)}, in eval mode under one "
            "seed"
            if differing
            else "two runs under one seed give the same"
        )
        way_out = "take its source of randomness out, or feed it as an input" if differing else ""
        return Check("reference repeats", not differing, detail=detail, way_out=way_out)

    def on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reference:
        """Return the right outputs for one batch."""
        native = self.runner.run(args, kwargs)
        exact = self._exact_run(args, kwargs, native)
        if exact is not None:
            return Reference(exact, native)
        nudged = self.runner.run(*_nudged(args, dict(kwargs)))
        response = {name: relative_l2(nudged[name], value) for name, value in native.items()}
        return Reference(native, native, response)

    def _exact_run(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], native: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        if self._exact is None:
            return None
        try:
            exact = self._exact.run(args, kwargs)
        except (RuntimeError, AssertionError, TypeError, ValueError):
            exact = {}
        finer = [
            exact[name].dtype == torch.float64
            for name, value in native.items()
            if value.is_floating_point() and name in exact
        ]
        if exact and all(finer):
            return exact
        self._exact = None
        return None


@dataclass(frozen=True)
class _Step:
    """One batch."""

    truth: _Truth
    runner: Runner
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    label: str
    max_error: float | None
    min_agreement: float | None

    def outcome(self) -> tuple[tuple[Check, ...], dict[str, Any]]:
        """Run both and compare."""
        reference = self.truth.on(self.args, self.kwargs)
        try:
            outputs = self.runner.run(self.args, self.kwargs)
        except Exception as error:
            # Whatever a candidate raises on good inputs is its fault, and a finding.
            line = (str(error).strip().splitlines() or [""])[0]
            detail = line if isinstance(error, Refused) else f"{type(error).__name__}: {line}"
            return (Check(self.label + "candidate runs", False, detail=detail),), {}
        hold = functools.partial(
            compare,
            outputs,
            reference,
            label=self.label,
            max_error=self.max_error,
            min_agreement=self.min_agreement,
        )
        result = hold()
        if result.missed and self.max_error is None:
            forgiven = self._backend_errors(reference)
            result = hold(backend_errors=forgiven)
        return result.checks, {self.label + name: row for name, row in result.facts.items()}

    def _backend_errors(self, reference: Reference) -> dict[str, float]:
        runner = self.truth.runner
        if not isinstance(self.runner, OnnxRunner) or type(runner) is not ModuleRunner:
            return {}
        return backend_errors(
            runner.model,
            self.args,
            self.kwargs,
            reference.exact,
            reference.native,
            self.runner.provider,
        )


def _is_finding(error: NormconvError) -> bool:
    """Tell a candidate that does not work (a finding) from a call that cannot be answered."""
    return isinstance(error, Refused) and not isinstance(error, MissingDependency)


def _provider_checks(runner: Runner, provider: str | None) -> tuple[Check, ...]:
    if provider is None:
        return ()
    detail = f"the candidate ran on {runner.provider}, asked for was {provider}"
    return (Check("provider", runner.provider == provider, detail=detail),)


def _facts(truth: _Truth, runner: Runner, rows: dict[str, Any], batches: int) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "reference": truth.kind,
        "provider": runner.provider,
        "batches": batches,
        "outputs": rows,
    }
    if isinstance(runner, OnnxRunner):
        facts["nodes_by_provider"] = runner.session.nodes_per_provider()
    return facts


def _with_sight(
    report: Report, truth: _Truth, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Report:
    """Say how much another input moves the reference's outputs."""
    try:
        here = truth.runner.run(args, kwargs)
        there = truth.runner.run(*_other_inputs(args, kwargs))
        moves = {
            name: relative_l2(there[name], value)
            for name, value in here.items()
            if value.is_floating_point()
        }
    except (RuntimeError, ValueError, IndexError, KeyError, NormconvError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return report.extended(
            notes=(f"how much the outputs depend on the input: unknown ({line})",)
        )
    notes = tuple(
        f"the check is nearly blind: another input moves {name} by {move:.1e} only"
        for name, move in moves.items()
        if not move >= SIGHT
    )
    return report.extended(facts={"sight": moves}, notes=notes)


def _other_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Return inputs of the same shapes and moments: noise for floats, the rest in flipped order."""
    generator = torch.Generator().manual_seed(_SEED)

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim or not leaf.numel():
            return leaf
        if not leaf.is_floating_point():
            return leaf.flip(-1)
        noise = torch.randn(leaf.shape, generator=generator).to(leaf)
        spread = leaf.std(correction=0)
        return noise * (spread if spread > 0 else torch.ones_like(spread)) + leaf.mean()

    other_args, other_kwargs = pytree.tree_map(other, (args, kwargs))
    return other_args, other_kwargs


def _nudged(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Batch:
    """Move every float by one rounding step, up or down by chance."""
    generator = torch.Generator().manual_seed(_SEED)

    def nudge(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        sign = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
        return leaf * (1 + sign * torch.finfo(leaf.dtype).eps)

    new_args, new_kwargs = pytree.tree_map(nudge, (args, kwargs))
    return new_args, new_kwargs


def _plain(value: Tensor) -> Tensor:
    """Let NaN equal NaN: a reference that gives NaN twice does repeat itself."""
    return torch.nan_to_num(value) if value.is_floating_point() else value


def _name(model: Model) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else str(model)

"""One architecture, measured: made, randomised, planned, converted, proved, and checked once more.

The check that counts is this file's own: outputs of the converted float64 model against those of the
original in float64. What the package says of itself is recorded beside it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import normconv as nc
from benchmarks.zoo_inputs import SAMPLES, Call, Make
from benchmarks.zoo_judge import (
    BOUND,
    SIGHT,
    TEXT,
    Outputs,
    error_of,
    judge_narrow,
    judge_wide,
    line_of,
    refusal_of,
    run_wide,
    sight_of,
    verdict,
    widening,
    worst_of,
)
from benchmarks.zoo_models import build, calls
from benchmarks.zoo_pool import Tell
from normconv.errors import CheckFailed, NormconvError, PlanError
from normconv.graph import is_norm
from normconv.numerics import give_back_memory
from normconv.plan import Plan
from normconv.proof import cast_inputs, evaluate, randomise_norms_

__all__ = ["TARGETS", "measure"]

TARGETS = ("wn", "plain")
_UNREACHED = "called neither in eval nor in training mode"
_WORST = ("converted", "refused", "wrong", "crashed")
_LEAN = 250_000_000  # parameters from which on no two models are held at once


class _Clock:
    """Tells a phase when it begins and its seconds when it ends."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._tell({"phase": phase})
        start = time.perf_counter()
        yield
        self.seconds[phase] = round(time.perf_counter() - start, 2)
        self._tell({"seconds": self.seconds})


class _Original:
    """The original: kept, or made anew for each conversion in place where two are too many."""

    def __init__(self, library: str, name: str) -> None:
        self._library, self._name = library, name
        self.model: nn.Module = build(library, name)
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.norms = sum(is_norm(module) for module in self.model.modules())
        self.lean = self.parameters >= _LEAN
        self._make: Make | None = None

    def randomise(self) -> tuple[str, Call]:
        """Set the norms' statistics with the first inputs that pass; return two of the samples.

        Other samples than those that made the statistics may be far off them where the maps are small,
        and blow up from norm to norm.

        Raises:
            ValueError: no inputs pass; says why the last did not.
        """
        failure = "no inputs are known"
        for label, make in calls(self._library, self._name, self.model):
            try:
                randomise_norms_(self.model, *make(SAMPLES))
                call = make(2)
                outputs = evaluate(self.model, *call)
            except Exception as error:
                failure = line_of(error)
                continue
            if all(bool(torch.isfinite(o).any()) for o in outputs.values() if o.numel()):
                self._make = make
                return label, call
            failure = "its outputs are not finite"
        raise ValueError(failure)

    def renew(self, dtype: torch.dtype) -> None:
        """Make the original again after it was converted in place."""
        if not self.lean:
            return
        assert self._make is not None
        del self.model
        give_back_memory(cycles=True)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        self.model = build(self._library, self._name)
        randomise_norms_(self.model, *self._make(SAMPLES))
        torch.set_default_dtype(default)
        self.model.to(dtype)


def measure(library: str, name: str, targets: Sequence[str], tell: Tell) -> None:
    """Measure one architecture and tell its record in parts, the status last."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    clock = _Clock(tell)
    try:
        with clock("build"):
            original = _Original(library, name)
        tell({"parameters": original.parameters, "norms": original.norms})
        if not original.norms:
            tell({"status": "no norms"})
            return
        with clock("randomise"):
            label, call = original.randomise()
        tell({"input": label})
    except Exception as error:
        tell({"status": "build failed", "reason": line_of(error)})
        return
    results: dict[str, dict[str, Any]] = {target: {} for target in targets}
    plans = {}
    with clock("plan"):
        # Where a norm goes does not depend on which of the exact targets asks: one is planned.
        plan = _planned(original.model, targets[0], call, results[targets[0]], tell)
        for target in targets:
            results[target] |= results[targets[0]]
            if plan is not None:
                plans[target] = _retargeted(plan, target)
    tell({"targets": results})
    if plans:
        _convert_all(original, plans, call, results, tell, clock)
    worst = max((r["status"] for r in results.values()), key=_WORST.index)
    tell({"targets": results, "status": worst, "phase": None})


def _retargeted(plan: Plan, target: str) -> Plan:
    steps = (step if step.action == "keep" else replace(step, target=target) for step in plan.steps)
    return replace(plan, steps=tuple(steps), targets=(target,))


def _planned(
    model: nn.Module, target: str, call: Call, result: dict[str, Any], tell: Tell
) -> Plan | None:
    """Make the plan as a user would: strictly, then the way out for norms that are never called."""
    given: dict[str, Any] = {"example_inputs": call.args, "example_kwargs": call.kwargs}
    try:
        try:
            plan = nc.make_plan(model, target, **given)
        except PlanError as error:
            if not all(_UNREACHED in problem.what for problem in error.problems):
                raise
            plan = nc.make_plan(model, target, **given, drop_unreached=True)
    except NormconvError as error:
        result |= {"status": "refused", **refusal_of(error)}
        return None
    except Exception as error:
        result |= {"status": "crashed", "reason": f"make_plan raises {line_of(error)}"}
        return None
    failed = [note for note in plan.notes if note.startswith("capture by")]
    tell({"capture": plan.capture, "captures failed": [note[:TEXT] for note in failed]})
    result |= {
        "sites": len(plan.steps),
        "actions": plan.counts(),
        "train only": sum(step.phase == "train" for step in plan.steps),
    }
    return plan


def _convert_all(
    original: _Original,
    plans: dict[str, Plan],
    call: Call,
    results: dict[str, dict[str, Any]],
    tell: Tell,
    clock: _Clock,
) -> None:
    """Convert in float32, then the same weights in float64."""
    narrow: dict[str, Outputs] = {}
    with clock("float32"):
        own = evaluate(original.model, *call)
        for target, plan in plans.items():
            results[target]["float32"], narrow[target] = _converted(original, plan, call)
            original.renew(torch.float32)
    tell({"targets": results})
    with clock("float64"):
        try:
            reference = _convert_wide(original, plans, call, results, tell)
        except RuntimeError as error:
            what = f"the original does not run in float64 ({line_of(error)})"
            for target in plans:
                results[target] |= {"status": "refused", "reason": what}
            return
    own_error = error_of(own, reference)
    for target in plans:
        result = results[target]
        judge_narrow(result["float32"], narrow[target], reference, own_error)
        result |= verdict(result)


def _convert_wide(
    original: _Original,
    plans: dict[str, Plan],
    call: Call,
    results: dict[str, dict[str, Any]],
    tell: Tell,
) -> Outputs:
    """Widen the original in place, convert it in float64, and return what it puts out itself."""
    wide = cast_inputs(call, torch.float64)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for the tensors that a forward makes
    try:
        original.model.double()
        reference, casts = run_wide(original.model, wide)
        sight = sight_of(reference)
        tell({"sight": sight, "blind": sight is not None and sight < SIGHT})
        convert = _applied if casts else _converted
        for number, (target, plan) in enumerate(plans.items()):
            said, outputs = convert(original, plan, wide)
            if number + 1 < len(plans) or not error_of(outputs, reference) <= BOUND:
                original.renew(torch.float64)
            judge_wide(said, original.model, wide, reference, outputs)
            results[target]["float64"] = said
    finally:
        torch.set_default_dtype(default)
    return reference


def _converted(original: _Original, plan: Plan, call: Call) -> tuple[dict[str, Any], Outputs]:
    """Convert and prove with the package; return what it says and what the result puts out."""
    convert = nc.convert_ if original.lean else nc.convert
    given: dict[str, Any] = {"example_inputs": call.args, "example_kwargs": call.kwargs}
    said: dict[str, Any] = {"passed": True}
    try:
        made, report = convert(original.model, plan, **given)
    except CheckFailed as error:
        failed: Any = error.model
        made, report = failed, error.report
        said = {"passed": False, "reason": str(error)[:TEXT]}
    except NormconvError as error:
        return {"passed": False, "refused": True, "reason": str(error)[:TEXT]}, {}
    except Exception as error:
        return {"passed": False, "crashed": True, "reason": f"convert raises {line_of(error)}"}, {}
    said |= worst_of(report) | _left(made, plan) | ({"in place": True} if original.lean else {})
    try:
        return said, evaluate(made, *call)
    except Exception as error:
        said["reason"] = f"the converted model raises {line_of(error)}"
        return said, {}


def _applied(original: _Original, plan: Plan, call: Call) -> tuple[dict[str, Any], Outputs]:
    """Convert without the package's proof, where the original itself does not run in float64."""
    made = nc.apply_plan(original.model, plan).model
    said = {
        "passed": True,
        "proof": "none: the original does not run in float64",
        **_left(made, plan),
    }
    with widening(made):
        return said, evaluate(made, *call)


def _left(made: nn.Module, plan: Plan) -> dict[str, int]:
    left = sum(is_norm(module) for module in made.modules())
    return {"left": left, "kept": sum(step.action == "keep" for step in plan.steps)}

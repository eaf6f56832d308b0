"""Judging what a runner gives against the truth: batches, sizes, the noise floor, half precision."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from normconv.deploy.compare import Comparison, Reference, compare
from normconv.deploy.floors import TF32_EPS, Floors
from normconv.deploy.localise import Place, first_to_leave
from normconv.deploy.rounded import (
    HALVES,
    Float64File,
    rounding_errors,
    structure_check,
    weights_dtype,
)
from normconv.deploy.runners import FileRunner, ModuleRunner, OnnxRunner, Runner
from normconv.deploy.sizes import Sized, other_sizes
from normconv.deploy.truth import Truth
from normconv.errors import Refused
from normconv.report import Check

__all__ = ["Judge", "Verdict"]


@dataclass
class Verdict:
    """What judging one runner gave.

    Args:
        checks: a check per batch, size and output.
        facts: the outputs' rows, nodes by provider, where the bound is left first.
        notes: what could not be judged, and why.
    """

    checks: tuple[Check, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Judge:
    """Holds candidates against one truth; the reference runs once for all of them.

    Args:
        truth: the reference.
        floors: what the reference itself does on a backend.
        batches: inputs.
        max_error: as `normconv.verify` takes it.
        min_agreement: likewise.
        other_sizes: also make inputs of other sizes, from the first batch.
    """

    def __init__(
        self,
        truth: Truth,
        floors: Floors,
        batches: list[tuple[tuple[Any, ...], dict[str, Any]]],
        max_error: float | None,
        min_agreement: float | None,
        other_sizes: bool,
    ) -> None:
        self.truth = truth
        self.batches = batches
        self._floors = floors
        self._hold = functools.partial(compare, max_error=max_error, min_agreement=min_agreement)
        self._by_floor = max_error is None
        self._other_sizes = other_sizes
        self._references: dict[str, Reference | str] = {}
        self.repeated = False
        self.asked = False

    @property
    def count(self) -> int:
        """How many batches there are."""
        return len(self.batches)

    def repeats(self) -> Check:
        """Check that the reference gives the same twice."""
        check = self.truth.repeats(*self.batches[0])
        self.repeated = check.passed
        return check

    def on(
        self, runner: Runner, backend: str, *, label: str = "", measure_floor: bool = False
    ) -> Verdict:
        """Judge a runner on every batch.

        Args:
            runner: the candidate.
            backend: what it is, of `normconv.deploy.forms.BACKENDS`.
            label: what every check's name begins with.
            measure_floor: run the reference on that backend in any case, not after a miss alone.
        """
        self.asked = True
        verdict = Verdict()
        rows: dict[str, Any] = {}
        places: dict[str, str] = {}
        step = _Step(self, runner, backend, measure_floor)
        verdict.checks, verdict.notes = step.before(label)
        for sized in self._sized(runner):
            reference = self._reference(sized)
            if isinstance(reference, str):
                verdict.notes += (f"{label}{sized.label}not run: the reference {reference}",)
                continue
            checks, facts, place = step.outcome(sized, reference, label)
            verdict.checks += checks
            rows.update(facts)
            if place is not None:
                places[sized.label.strip() or "the inputs"] = str(place)
        verdict.facts = {"outputs": rows}
        if places:
            verdict.facts["first to leave the bound"] = places
        if isinstance(runner, OnnxRunner):
            verdict.facts["nodes_by_provider"] = runner.session.nodes_per_provider()
        return verdict

    def _sized(self, runner: Runner) -> list[Sized]:
        several = len(self.batches) > 1
        found = [
            Sized(f"batch {index} " if several else "", *batch)
            for index, batch in enumerate(self.batches)
        ]
        if self._other_sizes:
            try:
                more = list(other_sizes(runner, *self.batches[0]))
            except Refused:  # the inputs do not fit: running it says so
                return found
            # Batches have numbers, sizes have names: they must not be taken for one another.
            found += [each._replace(label=f"size {each.label}") for each in more]
        return found

    def _reference(self, sized: Sized) -> Reference | str:
        """Return the right outputs; of a size that the reference does not take, what it says."""
        key = sized.label
        if key not in self._references:
            if not key.startswith("size "):
                self._references[key] = self.truth.on(sized.args, sized.kwargs)
            else:
                try:
                    self._references[key] = self.truth.on(sized.args, sized.kwargs)
                except Exception as error:
                    # A model may refuse a size in any way.
                    self._references[key] = f"does not take that size ({_line(error)})"
        return self._references[key]


@dataclass
class _Step:
    """One candidate on one backend."""

    judge: Judge
    runner: Runner
    backend: str
    measure_floor: bool

    def __post_init__(self) -> None:
        self._dtype = _dtype_of(self.runner)
        own = _dtype_of(self.judge.truth.runner)
        self._coarser = None
        if self._dtype is not None and own is not None:
            coarser = torch.finfo(self._dtype).eps > torch.finfo(own).eps
            self._coarser = self._dtype if coarser else None

    def before(self, label: str) -> tuple[tuple[Check, ...], tuple[str, ...]]:
        """Check the structure of a half-precision file on the processor; say what is judged of it."""
        runner = self.runner
        if not isinstance(runner, FileRunner) or runner.provider != "cpu":
            return (), ()
        if self._dtype not in HALVES:
            return (), ()
        name = str(self._dtype).removeprefix("torch.")
        reason = f"{label}skipped: on the CPU ONNX Runtime does not compute in {name}"
        judged = (
            "judged are its structure and its weights as they are stored, run in float64"
            if isinstance(runner, Float64File)
            else "judged is what ONNX Runtime makes of it in float32"
        )
        return (structure_check(runner.path, label),), (f"{reason}; {judged}",)

    def outcome(
        self, sized: Sized, reference: Reference, label: str
    ) -> tuple[tuple[Check, ...], dict[str, Any], Place | None]:
        """Run the candidate and compare."""
        name = label + sized.label
        try:
            outputs = self.runner.run(sized.args, sized.kwargs)
        except Exception as error:
            # Whatever a candidate raises on good inputs is its fault, and a finding.
            detail = _line(error)
            return (Check(name + "candidate runs", False, detail=detail),), {}, None
        reference = self._in_its_dtype(reference, sized)
        result, floor = self._held(outputs, reference, sized, name)
        rows = {name_: {**row, **floor.get(name_, {})} for name_, row in result.facts.items()}
        facts = {sized.label + output: row for output, row in rows.items()}
        failed = [check for check in result.checks if not check.passed]
        if not failed or not any(check.measured is not None for check in failed):
            return result.checks, facts, None
        place = first_to_leave(
            self.judge.truth.runner, self.runner, sized.args, sized.kwargs, self._eps()
        )
        return _told(result.checks, place), facts, place

    def _held(
        self, outputs: Mapping[str, Tensor], reference: Reference, sized: Sized, name: str
    ) -> tuple[Comparison, dict[str, dict[str, float]]]:
        hold = functools.partial(self.judge._hold, outputs, reference, label=name)
        result = hold()
        if isinstance(self.runner, Float64File) or not self.judge._by_floor:
            return result, {}
        if not result.missed and not self.measure_floor:
            return result, {}
        floor = self.judge._floors.errors(
            self.backend, self.runner, self._coarser, reference, sized.args, sized.kwargs
        )
        if result.missed:
            result = hold(backend_errors=floor)
        return result, {name: {"floor": error} for name, error in floor.items()}

    def _in_its_dtype(self, reference: Reference, sized: Sized) -> Reference:
        """Let the bound be that of the candidate's dtype, whatever dtype its outputs have."""
        if self._coarser is None:
            return reference
        native = {
            name: value.to(self._coarser) if value.is_floating_point() else value
            for name, value in reference.native.items()
        }
        original = self.judge.truth.runner
        if not isinstance(self.runner, Float64File) or type(original) is not ModuleRunner:
            return Reference(reference.exact, native, reference.response)
        rounded = rounding_errors(
            original.model,
            self._coarser,
            sized.args,
            sized.kwargs,
            reference,
            inputs_too=self.runner.takes_halves,
        )
        return Reference(reference.exact, native, rounded)

    def _eps(self) -> float:
        if self.judge._floors.tf32 and self.runner.provider != "cpu":
            return TF32_EPS
        dtype = self._coarser or torch.float32
        return float(torch.finfo(dtype).eps)


def _told(checks: tuple[Check, ...], place: Place | None) -> tuple[Check, ...]:
    """Say in each check that failed by a number where to look."""
    if place is None:
        return checks
    return tuple(
        replace(check, way_out=str(place))
        if not check.passed and check.measured is not None
        else check
        for check in checks
    )


def _dtype_of(runner: Runner) -> torch.dtype | None:
    """The coarsest floating dtype of a candidate's weights."""
    if isinstance(runner, FileRunner):
        return weights_dtype(runner.path)
    if not isinstance(runner, ModuleRunner):
        return None
    floats = [p.dtype for p in runner.model.parameters() if p.is_floating_point()]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, Refused) else f"{type(error).__name__}: {line}"

"""Comparing the outputs of two runs: the one place where answers are held against the truth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normconv.numerics.error import noise_bound, relative_l2, unprovable
from normconv.report import Check

__all__ = [
    "FLOAT64_BOUND",
    "Agreement",
    "Comparison",
    "Reference",
    "agreement",
    "compare",
    "onnx_name",
    "paired",
]

#: A float64 run has no finer reference; deep networks amplify its rounding to about this.
FLOAT64_BOUND = 1e-10

_MOST_FORGIVEN = 10.0


@dataclass(frozen=True)
class Reference:
    """What the right answer is, and how well the original itself meets it.

    Args:
        exact: the outputs of the float64 run.
        native: the outputs of the run in the original's own dtype.
        response: rel-L2 change of an output when every input moves by one rounding step; stands in
            for the original's own error where there is no float64 run.
    """

    exact: Mapping[str, Tensor]
    native: Mapping[str, Tensor]
    response: Mapping[str, float] | None = None

    def first(self, count: int, batch: int) -> Reference:
        """Return the first `count` samples of every output whose first axis is the batch."""

        def cut(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: value[:count] if value.ndim and value.shape[0] == batch else value
                for name, value in outputs.items()
            }

        return Reference(cut(self.exact), cut(self.native), self.response)

    def own_error(self, name: str) -> float:
        """Return the original's own rel-L2 error in its dtype."""
        measured = relative_l2(self.native[name], self.exact[name])
        return (
            max(measured, (self.response or {}).get(name, 0.0))
            if measured == measured
            else measured
        )

    def backend_error(self, name: str, own: Tensor, eps: float) -> float:
        """Return the original's own rel-L2 error on a backend, as far as it is forgiven.

        At most ten times max(eps, its error on torch): a backend that computes the original so much worse
        is a fault to see, not noise; it also keeps a fault of the exporter, which both files would have,
        out.
        """
        value = self.exact[name]
        limit = _MOST_FORGIVEN * max(eps, relative_l2(self.native[name], value))
        return min(relative_l2(own, value), limit)

    def bound(self, name: str, candidate: Tensor, backend_error: float = 0.0) -> float:
        """Return the largest error of `candidate` that rounding explains.

        4 · max(eps, own error, backend error), with the eps of the coarser of both dtypes; 0 for an
        output of integers.

        Source: the noise-floor criterion, `normconv.numerics.error.noise_bound`.
        """
        native = self.native[name]
        if not native.is_floating_point():
            return 0.0
        dtype = self.coarser(name, candidate)
        own = self.own_error(name)
        bound = noise_bound(dtype, own if own != own else max(own, backend_error))
        return max(bound, FLOAT64_BOUND) if dtype == torch.float64 else bound

    def coarser(self, name: str, candidate: Tensor) -> torch.dtype:
        """Return the coarser of the floating dtypes of an output and of a candidate for it."""
        dtypes = [v.dtype for v in (self.native[name], candidate) if v.is_floating_point()]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Agreement:
    """How often two sets of logits name the same class.

    Args:
        rows: how many rows there are.
        same: how many have the same first class.
        counted: disagreements that rounding does not explain: the reference's own lead of its first
            over its second class is more than the error could turn.
    """

    rows: int
    same: int
    counted: int

    @property
    def share(self) -> float:
        """The share of rows with the same first class."""
        return self.same / self.rows if self.rows else 1.0


@dataclass(frozen=True)
class Comparison:
    """The outcome of one comparison.

    Args:
        checks: a check per output, and per output of logits one of its first class.
        facts: per output: the dtype, error, cosine, largest error in units of the RMS, agreement.
        missed: the outputs that missed their bound by a finite number.
    """

    checks: tuple[Check, ...]
    facts: dict[str, dict[str, Any]]
    missed: tuple[str, ...]


def onnx_name(name: str) -> str:
    """Turn the name of a torch output into the name it has in a file.

    >>> [onnx_name(n) for n in ("output", "output.0", "output.logits", "output.aux.1")]
    ['output', 'output_0', 'logits', 'aux_1']
    """
    head, *rest = name.split(".")
    if rest and not rest[0].isdigit():
        return "_".join(rest)
    return "_".join([head, *rest])


def paired(
    candidate: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[Check]]:
    """Match the candidate's outputs with the reference's, by name, or by order if no name fits.

    Returns:
        The candidate's outputs under the reference's names, and a failed check for every output
        that is missing or too many.
    """
    keyed = {onnx_name(name): value for name, value in candidate.items()}
    if any(onnx_name(name) in keyed for name in reference):
        matched = {name: keyed[onnx_name(name)] for name in reference if onnx_name(name) in keyed}
        expected = {onnx_name(name) for name in reference}
        extra = [name for name in candidate if onnx_name(name) not in expected]
    else:
        matched = dict(zip(reference, candidate.values(), strict=False))
        extra = list(candidate)[len(reference) :]
    missing = [name for name in reference if name not in matched]
    gives = f"the candidate gives {', '.join(candidate) or 'none'}"
    problems = [Check(name, False, detail=f"this output is missing; {gives}") for name in missing]
    wants = f"the reference gives {', '.join(reference) or 'none'}"
    problems += [Check(name, False, detail=f"this output is too many; {wants}") for name in extra]
    return matched, problems


def compare(
    candidate: Mapping[str, Tensor],
    reference: Reference,
    *,
    label: str = "",
    max_error: float | None = None,
    min_agreement: float | None = None,
    backend_errors: Mapping[str, float] | None = None,
) -> Comparison:
    """Hold every output of a candidate against the float64 reference.

    Args:
        candidate: its outputs by name.
        reference: what they have to be.
        label: what every check's name begins with.
        max_error: the largest rel-L2 error that passes, instead of the noise floor (for conversions
            that promise no equality).
        min_agreement: the smallest share of equal first classes that passes, instead of none beyond
            rounding.
        backend_errors: the original's own error on the candidate's backend, where it was run there.

    Returns:
        Failed checks for missing, superfluous and wrongly shaped outputs too; nothing is raised.
    """
    matched, problems = paired(candidate, reference.native)
    checks = [Check(label + c.name, False, detail=c.detail) for c in problems]
    facts: dict[str, dict[str, Any]] = {}
    missed = []
    for name, value in matched.items():
        exact = reference.exact[name]
        if value.shape != exact.shape:
            detail = f"the shape is {list(value.shape)}, not {list(exact.shape)}"
            checks.append(Check(label + name, False, detail=detail))
            continue
        if not exact.numel():
            checks.append(Check(label + name, False, detail="it has no elements to compare"))
            continue
        if max_error is None:
            bound = reference.bound(name, value, (backend_errors or {}).get(name, 0.0))
        else:
            bound = max_error
        error = relative_l2(value, exact)
        checks.append(
            Check.at_most(label + name, error, bound, _detail(value, exact, reference, name))
        )
        if not error <= bound and error == error:
            missed.append(name)
        facts[name] = {
            "dtype": str(value.dtype).removeprefix("torch."),
            "error": error,
            "bound": bound,
        }
        facts[name].update(_closeness(value, exact))
        if _are_logits(exact):
            met = agreement(value, exact, bound)
            facts[name].update(top1=met.share, top1_rows=met.rows, top1_counted=met.counted)
            checks.append(_top1_check(label + name, met, min_agreement))
    return Comparison(tuple(checks), facts, tuple(missed))


def agreement(candidate: Tensor, exact: Tensor, bound: float) -> Agreement:
    """Count the rows whose first class is the same.

    A row's disagreement counts when the reference's margin (first minus second class) is larger
    than 2 · bound · ‖row‖₂: no error within the bound could have turned it.

    Args:
        candidate: (N, classes).
        exact: (N, classes), the float64 run.
        bound: the rel-L2 error that passes.
    """
    exact = exact.detach().cpu().double()
    candidate = candidate.detach().cpu().double()
    differs = candidate.argmax(dim=1) != exact.argmax(dim=1)
    top = exact.topk(2, dim=1).values
    turnable = 2.0 * bound * torch.linalg.vector_norm(exact, dim=1)
    # "not <=": a NaN margin or bound counts as a disagreement.
    counted = differs & ~(top[:, 0] - top[:, 1] <= turnable)
    rows = int(exact.shape[0])
    return Agreement(rows, rows - int(differs.sum()), int(counted.sum()))


def _top1_check(name: str, met: Agreement, min_agreement: float | None) -> Check:
    detail = f"{met.same} of {met.rows} rows have the same first class"
    if min_agreement is not None:
        passed = met.share >= min_agreement
        return Check(
            f"{name} top-1", passed, detail=f"{detail}; at least {min_agreement:.2%} asked for"
        )
    if met.counted:
        detail += f"; {met.counted} of the differences are beyond rounding"
    return Check(f"{name} top-1", met.counted == 0, detail=detail)


def _are_logits(exact: Tensor) -> bool:
    return (
        exact.ndim == 2 and exact.shape[0] > 0 and exact.shape[1] >= 2 and exact.is_floating_point()
    )


def _detail(value: Tensor, exact: Tensor, reference: Reference, name: str) -> str:
    for what, tensor in (("the candidate", value), ("the reference", exact)):
        bad = int(torch.isnan(tensor).sum()) if tensor.is_floating_point() else 0
        if bad:
            return f"{what} gives NaN in {bad} of {tensor.numel()} entries"
    own = reference.own_error(name)
    if own != own:
        return "the original itself breaks in its own dtype"
    if value.is_floating_point() and (reason := unprovable(reference.coarser(name, value), own)):
        return reason
    return "rel-L2 against float64"


def _closeness(value: Tensor, exact: Tensor) -> dict[str, float]:
    c, r = value.detach().cpu().double().flatten(), exact.detach().cpu().double().flatten()
    if not r.numel():
        return {}
    rms = float(r.square().mean().sqrt())
    worst = float((c - r).abs().max())
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(c, r, dim=0)),
        "max_abs_over_rms": worst / rms if rms else (0.0 if worst == 0.0 else float("inf")),
    }

"""What a converted network is held to: this file's own comparison, whatever the package says of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_inputs import Call
from normconv.errors import NormconvError
from normconv.numerics import NOISE_FACTOR, noise_bound, relative_l2, unprovable
from normconv.proof import cast_inputs, evaluate
from normconv.report import Report

__all__ = [
    "BOUND",
    "SIGHT",
    "TEXT",
    "Outputs",
    "error_of",
    "judge_narrow",
    "judge_wide",
    "line_of",
    "refusal_of",
    "run_wide",
    "sight_of",
    "verdict",
    "widening",
    "worst_of",
]

BOUND = 1e-10
CEILING = 1e-6
SIGHT = 1e-2
TEXT = 300

Outputs = dict[str, Tensor]


def run_wide(model: nn.Module, call: Call) -> tuple[Outputs, bool]:
    """Run the float64 original; a forward that makes float32 tensors itself gets them widened."""
    try:
        return evaluate(model, *call), False
    except RuntimeError:  # torch's dtype mismatches have no class of their own
        with widening(model):
            return evaluate(model, *call), True


@contextmanager
def widening(model: nn.Module) -> Iterator[None]:
    """Cast what each layer is given to float64."""

    def cast(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return cast_inputs((args, kwargs), torch.float64)

    handles = [
        module.register_forward_pre_hook(cast, with_kwargs=True)
        for module in model.modules()
        if module._parameters or module._buffers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def judge_wide(
    said: dict[str, Any], model: nn.Module, call: Call, reference: Outputs, outputs: Outputs
) -> None:
    """Hold the float64 outputs to 1e-10, or to what the original makes of an input one ulp away.

    A network that ends in float32 in a float64 run is held to what float32 rounds.
    """
    error, bound = error_of(outputs, reference), BOUND
    floats = [output for output in reference.values() if output.is_floating_point()]
    if any(bool((output == output.float()).all()) for output in floats):
        bound = NOISE_FACTOR * torch.finfo(torch.float32).eps
    if not error <= bound:
        eps = torch.finfo(torch.float64).eps
        moved, _ = run_wide(model, _moved(call, 1 + eps))
        response = error_of(moved, reference)
        said["response"] = response
        bound = max(bound, min(NOISE_FACTOR * response, CEILING))
    said |= {"error": error, "bound": bound}


def judge_narrow(
    said: dict[str, Any], outputs: Outputs, reference: Outputs, own_error: float
) -> None:
    """Hold the float32 outputs to the noise floor of the original's own error."""
    said |= {
        "error": error_of(outputs, reference),
        "own error": own_error,
        "bound": noise_bound(torch.float32, own_error),
        "unprovable": bool(unprovable(torch.float32, own_error)),
    }


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """Return the status of a target; `silent` where the package passed what is wrong."""
    wide, narrow = result["float64"], result["float32"]
    for said in (wide, narrow):
        if said.get("crashed"):
            return {"status": "crashed", "reason": said["reason"]}
        if said.get("refused"):
            return {"status": "refused", "reason": said["reason"]}
    right = wide["error"] <= wide["bound"] and wide["left"] == wide["kept"]
    if wide["passed"] and not right:
        what = f"error {wide['error']:.1e}, bound {wide['bound']:.1e}, {wide['left']} norms left"
        return {"status": "wrong", "silent": True, "reason": what}
    if not right:
        return {"status": "wrong", "reason": f"float64: {wide['reason']}"}
    if not wide["passed"]:
        return {"status": "refused", "reason": f"float64: {wide['reason']}"}
    if not narrow["passed"] and not narrow["unprovable"]:
        return {"status": "refused", "reason": f"float32: {narrow['reason']}"}
    return {"status": "converted"}


def _moved(call: Call, factor: float) -> Call:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value * factor if value.is_floating_point() else value
        if isinstance(value, dict):
            return {key: move(item) for key, item in value.items()}
        return type(value)(map(move, value)) if isinstance(value, (list, tuple)) else value

    return Call(tuple(map(move, call.args)), move(call.kwargs))


def error_of(outputs: Outputs, reference: Outputs) -> float:
    """Return the worst rel-L2 error; infinity for other outputs, other shapes, or nothing at all."""
    if list(outputs) != list(reference) or not any(t.numel() for t in reference.values()):
        return float("inf")
    errors = []
    for key, expected in reference.items():
        if outputs[key].shape != expected.shape:
            return float("inf")
        errors.append(relative_l2(outputs[key], expected) if expected.numel() else 0.0)
    return float("nan") if any(e != e for e in errors) else max(errors)


def sight_of(outputs: Outputs) -> float | None:
    """Return by how much two samples differ at the outputs, at most."""
    found = [
        relative_l2(tensor[1], tensor[0])
        for tensor in outputs.values()
        if tensor.dim() > 1 and tensor.shape[0] > 1 and tensor.is_floating_point()
    ]
    return max(found, default=None)


def worst_of(report: Report) -> dict[str, Any]:
    """Return the package's own errors with their bounds: of outputs, and of the worst site."""
    outputs = [c for c in report.checks if c.measured is not None and c.name.startswith("output")]
    sites = [row for row in report.sites if row.error is not None and row.bound is not None]
    found: dict[str, Any] = {"sites compared": len(sites)}
    if outputs:
        found["proof error"] = max(c.measured for c in outputs if c.measured is not None)
    if sites:
        worst = max(sites, key=lambda row: (row.error or 0.0) / (row.bound or 1.0))
        found |= {"worst site": worst.site, "site error": worst.error, "site bound": worst.bound}
    return found


def refusal_of(error: NormconvError) -> dict[str, Any]:
    """Return what a refusal says: its text, how many problems it names, what they are."""
    whats = list(dict.fromkeys(problem.what for problem in error.problems))
    return {
        "kind": type(error).__name__,
        "reason": str(error)[:TEXT],
        "problems": len(error.problems),
        "whats": [what[:TEXT] for what in whats[:5]],
    }


def line_of(error: BaseException) -> str:
    """Return an exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:TEXT]

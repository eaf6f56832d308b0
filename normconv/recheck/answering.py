"""Running a file on golden data and judging its answers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from normconv.deploy.golden import Golden
from normconv.deploy.session import Session
from normconv.deploy.values import BFLOAT16
from normconv.recheck.closeness import agreement, relative_l2
from normconv.report import Check

__all__ = ["answers"]

_FLOATS: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    BFLOAT16: ml_dtypes.bfloat16,
}


def answers(session: Session, golden: Golden) -> tuple[list[Check], dict[str, dict[str, Any]]]:
    """Run a session on golden inputs; hold each output against the certified one.

    Returns:
        A check for every output and for its first classes, and a row of numbers for each.

    Raises:
        Refused: the file does not take these inputs.
    """
    types = {spec.name: spec.type for spec in session.inputs}
    given = {name: _cast(value, types.get(name, "")) for name, value in golden.inputs.items()}
    outputs = session.run(given)
    checks: list[Check] = []
    rows: dict[str, dict[str, Any]] = {}
    for name, exact in golden.outputs.items():
        what, value, bound = f"{session.provider} {name}", outputs.get(name), golden.bounds[name]
        if value is None or value.shape != exact.shape:
            seen = "is missing" if value is None else f"has the shape {list(value.shape)}"
            detail = f"it {seen}, certified is {list(exact.shape)}"
            checks.append(Check(what, False, detail=detail))
            continue
        error = relative_l2(value, exact)
        detail = "rel-L2 against the original in float64"
        checks.append(Check.at_most(what, error, bound, detail))
        rows[what] = {"dtype": str(value.dtype), "error": error, "bound": bound}
        if (met := agreement(value, exact, bound)) is not None:
            count, same, counted = met
            rows[what].update(top1=same / count, top1_rows=count, top1_counted=counted)
            detail = f"{same} of {count} rows have the same first class"
            checks.append(Check(f"{what} top-1", counted == 0, detail=detail))
    return checks, rows


def _cast(value: Any, type_name: str) -> Any:
    dtype = _FLOATS.get(type_name)
    return value.astype(dtype) if dtype is not None and value.dtype.kind == "f" else value

"""How far an answer is from the certified one, in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["agreement", "relative_l2"]

Array = np.ndarray[Any, Any]


def relative_l2(candidate: Array, reference: Array) -> float:
    """Return ‖candidate − reference‖₂ / ‖reference‖₂ in float64, as `normconv.numerics` does on torch.

    The same infinity on both sides counts as equal; any other value that is not finite gives NaN. A
    zero reference gives 0 when the candidate is zero too, else infinity.

    Args:
        candidate: any shape.
        reference: the same shape.

    >>> relative_l2(np.array([1.0, 1.0]), np.array([1.0, 0.0]))
    1.0
    """
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes differ: {candidate.shape} and {reference.shape}")
    c, r = candidate.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    same_infinity = np.isinf(r) & (c == r)
    c, r = c[~same_infinity], r[~same_infinity]
    with np.errstate(invalid="ignore", over="ignore"):
        difference, scale = float(np.linalg.norm(c - r)), float(np.linalg.norm(r))
        if scale == 0.0:
            return 0.0 if difference == 0.0 else difference * float("inf")
        return float(np.float64(difference) / np.float64(scale))


def agreement(candidate: Array, exact: Array, bound: float) -> tuple[int, int, int] | None:
    """Count rows, those with the same first class, and those whose other class rounding cannot explain.

    A difference counts when the margin (first minus second class) is larger than 2 · bound · ‖row‖₂.

    Args:
        candidate: (N, classes).
        exact: (N, classes).
        bound: the rel-L2 error that passes.

    Returns:
        None for what are no logits.

    >>> agreement(np.array([[1.0, 2.0]]), np.array([[3.0, 2.0]]), 1e-6)
    (1, 0, 1)
    """
    if exact.ndim != 2 or not exact.shape[0] or exact.shape[1] < 2 or exact.dtype.kind != "f":
        return None
    differs = candidate.argmax(axis=1) != exact.argmax(axis=1)
    top = np.sort(exact.astype(np.float64), axis=1)[:, -2:]
    turnable = 2.0 * bound * np.linalg.norm(exact.astype(np.float64), axis=1)
    # "not <=": a NaN counts as a disagreement.
    counted = differs & ~(top[:, 1] - top[:, 0] <= turnable)
    rows = int(exact.shape[0])
    return rows, rows - int(differs.sum()), int(counted.sum())

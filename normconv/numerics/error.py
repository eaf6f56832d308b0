"""How far one tensor is from another, and how far it may be."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NOISE_FACTOR", "noise_bound", "relative_l2", "unprovable"]

NOISE_FACTOR = 4.0
FLOAT64_FLOOR = 1e-12
# An original that is off by more than this from its own float64 run proves nothing: four times as
# much would let anything pass.
_CEILINGS = {torch.float64: 1e-6, torch.float32: 1e-2}
_CEILING = 0.1


def relative_l2(candidate: Tensor, reference: Tensor) -> float:
    """Return ‖candidate − reference‖₂ / ‖reference‖₂, computed in float64.

    Entries that are the same infinity on both sides count as equal (masked logits). Any other
    non-finite entry gives NaN, which passes no bound. A zero reference gives 0 when the candidate is
    zero too, else infinity.

    Args:
        candidate: any shape, real or integer.
        reference: the same shape.

    Raises:
        ValueError: the shapes differ; broadcasting would hide the fault.

    >>> relative_l2(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0]))
    1.0
    >>> relative_l2(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    nan
    """
    if candidate.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(candidate.shape)} and {tuple(reference.shape)}")
    c = candidate.detach().to(device="cpu", dtype=torch.float64)
    r = reference.detach().to(device="cpu", dtype=torch.float64)
    same_infinity = torch.isinf(r) & (c == r)
    if bool(same_infinity.any()):
        c, r = c[~same_infinity], r[~same_infinity]
    difference = torch.linalg.vector_norm(c - r).item()
    scale = torch.linalg.vector_norm(r).item()
    if scale == 0.0:
        return 0.0 if difference == 0.0 else difference * float("inf")
    return float(difference / scale)


def noise_bound(dtype: torch.dtype, own_error: float = 0.0) -> float:
    """Return the largest error that rounding explains: 4 · max(eps(dtype), own_error).

    Args:
        dtype: the floating dtype the candidate computes in.
        own_error: rel-L2 error of the *original* in that dtype and backend against its float64 run;
            NaN (the original itself breaks in that dtype) gives a NaN bound, which nothing passes.
            In float64, where nothing wider can judge, it is the original's response to a change of
            its input by one ulp, and the bound is never below 1e-12. Above a ceiling (1e-2 in float32,
            0.1 in half precision) the bound is NaN too: `unprovable` says so.

    >>> noise_bound(torch.float32) == 4 * torch.finfo(torch.float32).eps
    True
    >>> noise_bound(torch.float32, 1e-3)
    0.004
    """
    eps = torch.finfo(dtype).eps
    if unprovable(dtype, own_error):
        return float("nan")
    bound = NOISE_FACTOR * max(eps, own_error)
    return max(bound, FLOAT64_FLOOR) if dtype == torch.float64 else bound


def unprovable(dtype: torch.dtype, own_error: float) -> str:
    """Say why an original is no yardstick in a dtype; empty where it is one.

    >>> unprovable(torch.float32, 0.5)
    'the original itself is off by 0.5 from its float64 run: nothing can be proved in float32'
    >>> unprovable(torch.float32, 1e-6)
    ''
    """
    if own_error <= _CEILINGS.get(dtype, _CEILING):
        return ""
    name = str(dtype).removeprefix("torch.")
    return (
        f"the original itself is off by {own_error:.2g} from its float64 run: nothing can be proved "
        f"in {name}"
    )

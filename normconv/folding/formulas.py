"""The values of torch's own reparametrisations in float64, where torch computes NaN too."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normed", "spectrally_normed", "wide"]


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, or complex128; integers and masks as they are."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


@torch.no_grad()
def normed(g: Tensor, v: Tensor, dim: int | None) -> tuple[Tensor, str]:
    """Return g · v / ‖v‖ in float64, 0 where ‖v‖ = 0, and what is to be said about those slices.

    Args:
        g: one gain a slice.
        v: the direction.
        dim: the axis that is not summed over; None or -1 takes the norm of the whole tensor, as torch
            does.

    Source: Salimans & Kingma 2016, equation 2.
    """
    v = wide(v)
    if dim is None or dim == -1:
        norms = torch.linalg.vector_norm(v)
    else:
        axes = [axis for axis in range(v.dim()) if axis != dim % v.dim()]
        norms = torch.linalg.vector_norm(v, dim=axes, keepdim=True) if axes else v.abs()
    zero = norms == 0
    factor = wide(g).reshape(norms.shape) / torch.where(zero, torch.ones_like(norms), norms)
    rows = 0 if zero.is_meta else int(zero.sum())
    return v * factor, f"{rows} rows without direction became 0" if rows else ""


@torch.no_grad()
def spectrally_normed(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> tuple[Tensor, str]:
    """Return W / (uᵀ W v) in float64 with the vectors as they are, 0 where W is 0.

    Args:
        weight: W, whose axis `dim` comes first as a matrix.
        u: left singular vector, as far as training has found it.
        v: right singular vector.
        dim: the axis of the rows.

    Source: Miyato et al. 2018, "Spectral Normalization", equation 9.
    """
    weight = wide(weight)
    matrix = weight.movedim(dim, 0)
    matrix = matrix.reshape(matrix.shape[0], -1)  # a vector too
    length = torch.vdot(wide(u), matrix @ wide(v))
    if not weight.is_meta and not bool(weight.any()):
        return weight, "a weight of spectral norm 0 became 0"
    return weight / length, ""

"""The values of torch's own reparametrisations in float64, where torch computes NaN too."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_another", "normed", "nudged", "spectrally_normed", "wide"]

_ROUNDINGS = 16  # that a formula may add up


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


def nudged(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers, wide, moved by about what one rounding to a dtype moves them.

    >>> bool((nudged(torch.ones(2).double(), torch.float32) - 1).abs().max() < 1e-6)
    True
    """
    if tensor.is_meta or not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    return wide(tensor) * (1 + torch.finfo(dtype).eps * noise)


def is_another(own: Tensor, value: Tensor, moved: Tensor, dtype: torch.dtype) -> bool:
    """Say whether a value in its own dtype is more than rounding away from that in float64.

    Then the formula asks for the dtype. Rounding is as much as the formula makes of one rounding of what
    it starts from.

    Args:
        own: computed in `dtype`.
        value: computed in float64.
        moved: computed in float64 from `nudged` numbers.
        dtype: of the model.
    """
    if own.is_meta or not dtype.is_floating_point or own.shape != value.shape:
        return False
    length = torch.linalg.vector_norm(value)
    rounding = torch.linalg.vector_norm(moved.nan_to_num() - value)
    bound = _ROUNDINGS * torch.maximum(length * torch.finfo(dtype).eps, rounding)
    return bool(torch.linalg.vector_norm(wide(own) - value) > bound) and bool(own.isfinite().all())

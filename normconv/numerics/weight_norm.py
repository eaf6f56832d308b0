"""Weight normalization, w = g · v / ‖v‖, as pure tensor maths.

Source: Salimans & Kingma 2016, "Weight Normalization", equation 2. The gain is signed here, so that a
normalization with γ <= 0 folds into it exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normconv.numerics.rows import (
    RowLayout,
    fill_rows_,
    leading_rows,
    scale_rows_,
    trailing_rows,
    weight_of_leading,
    weight_of_trailing,
    wide_dtype,
    wide_row_norms,
)

__all__ = [
    "GainDirection",
    "LogGains",
    "log_gains",
    "normed_weight",
    "split_weight",
    "split_weight_",
    "true_weight",
]


class GainDirection(NamedTuple):
    """A weight split in two.

    Args:
        g: signed gain, one a row, in the layout's row shape.
        v: direction, the weight's own shape; its length carries no meaning.
    """

    g: Tensor
    v: Tensor


def normed_weight(g: Tensor, v: Tensor, layout: RowLayout) -> Tensor:
    """Return w = g · v / ‖v‖ row by row, differentiable in g and v.

    torch's fused kernel takes rows along the first or the last axis of a contiguous tensor, and the norm
    of half and bfloat16 rows in float32. Rows along axis 0 are there where they lie; those of transposed
    convolutions are laid along the last axis, a copy but in channels-last memory. Rows of v must not be
    zero (see `split_weight`).

    Args:
        g: the layout's row shape.
        v: (O, I/groups, *K), or (I, O/groups, *K) when transposed.
        layout: where the output channels are.

    Returns:
        The weight in v's shape, dtype and memory format.

    >>> normed_weight(torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]]), RowLayout())
    tensor([[6., 8.]])
    """
    if not layout.transposed:
        return weight_of_leading(_normed(leading_rows(v), g.reshape(-1, 1), 0), v)
    return weight_of_trailing(_normed(trailing_rows(v, layout), g.reshape(1, -1), 1), v, layout)


def _normed(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """The weight of a matrix whose rows are numbered along `dim`, by the cheapest way that is right."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _plainly(v, g, dim)  # the fused kernel knows neither vmap nor forward mode
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return torch._weight_norm(v, g, dim)
    weight: Tensor = _FusedNorm.apply(v.contiguous(), g.contiguous(), dim)
    return weight


def _plainly(v: Tensor, g: Tensor, dim: int) -> Tensor:
    wide = v.to(wide_dtype(v.dtype))
    norms = torch.linalg.vector_norm(wide, dim=1 - dim, keepdim=True)
    weight: Tensor = wide * (g.to(wide.dtype) / norms)
    return weight.to(v.dtype)


class _FusedNorm(torch.autograd.Function):
    """torch's fused kernels, with a backward pass that can itself be differentiated.

    That of `torch._weight_norm` takes ‖v‖ for a constant there: its second derivatives by v are wrong.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dim: int) -> Tensor:
        weight, norms = torch._weight_norm_interface(v, g, dim)
        ctx.save_for_backward(v, g, norms)
        ctx.dim = dim
        return weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        v, g, norms = ctx.saved_tensors
        if not torch.is_grad_enabled():
            by_v, by_g = torch.ops.aten._weight_norm_interface_backward(
                grad.contiguous(), v, g, norms, ctx.dim
            )
            return by_v, by_g, None
        wide = wide_dtype(v.dtype)
        rows, gains, grads = v.to(wide), g.to(wide), grad.to(wide)
        lengths = torch.linalg.vector_norm(rows, dim=1 - ctx.dim, keepdim=True)
        units = rows / lengths
        along = (grads * units).sum(1 - ctx.dim, keepdim=True)
        by_v = (gains / lengths) * (grads - along * units)
        return by_v.to(v.dtype), along.to(g.dtype), None


def true_weight(g: Tensor, v: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor]:
    """Return the float64 value of g · v / ‖v‖ rounded once to v's dtype, and which rows were zero.

    A row with ‖v‖ = 0 has no direction (torch's kernel gives NaN): its weight is 0 here.

    Returns:
        (weight in v's shape, dtype and memory format; bool tensor (O,), True where ‖v‖ = 0).

    >>> weight, repaired = true_weight(torch.ones(2, 1), torch.tensor([[0.0], [2.0]]), RowLayout())
    >>> weight.flatten().tolist(), repaired.tolist()
    ([0.0, 1.0], [True, False])
    """
    norms = wide_row_norms(v, layout)
    zero = norms == 0
    factor = g.detach().double().reshape(-1) / torch.where(zero, torch.ones_like(norms), norms)
    weight = v.detach().clone()  # preserve_format: strides follow v
    return scale_rows_(weight, factor, layout), zero


def split_weight(weight: Tensor, factor: Tensor | None, layout: RowLayout) -> GainDirection:
    """Split factor · w into gain and direction: v = w as it is, g = ‖w‖ · factor, signed.

    Keeping v raw means that a row with factor 0 keeps its direction and can train away from 0. A row
    with ‖w‖ = 0 has no direction: it gets v = 1/√n and g = 0, which is exact, finite in both passes
    and trainable.

    Args:
        weight: the plain weight in the layout's shape.
        factor: (O,) float64 multiplier of the rows (γ/σ of a folded normalization), None for 1.
        layout: where the output channels are.

    Returns:
        g computed in float64 and rounded once to the weight's dtype, and v.

    >>> g, v = split_weight(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), None, RowLayout())
    >>> g.flatten().tolist(), v[1].tolist()
    ([5.0, 0.0], [0.7071067690849304, 0.7071067690849304])
    """
    return split_weight_(weight.detach().clone(), factor, layout)


def split_weight_(weight: Tensor, factor: Tensor | None, layout: RowLayout) -> GainDirection:
    """Do as `split_weight` does and let the weight itself be v: rows without direction are set in it.

    Besides g, one number a row, it needs a bounded scratch whatever the weight's size.

    >>> weight = torch.tensor([[3.0, 4.0]])
    >>> split_weight_(weight, None, RowLayout()).v is weight
    True
    """
    norms = wide_row_norms(weight, layout)
    gain = norms if factor is None else norms * factor.double()
    g = gain.to(weight.dtype).reshape(layout.row_shape(weight))
    zero = norms == 0
    fan = weight.numel() // max(1, layout.channels(weight))
    if fan and not weight.is_meta and bool(zero.any()):
        fill_rows_(weight, zero, fan**-0.5, layout)
    return GainDirection(g, weight)


class LogGains(NamedTuple):
    """Signed gains as g = sign · e^(c·s).

    Args:
        s: log|g| / c, (O,) float64.
        sign: ±1, (O,) float64.
        floored: where g was 0, (O,) bool.
    """

    s: Tensor
    sign: Tensor
    floored: Tensor


def log_gains(g: Tensor, c: float, dtype: torch.dtype) -> LogGains:
    """Split signed gains into sign and logarithm, s = log|g| / c.

    A gain of 0 has no logarithm. It becomes eps / √O of the largest, O gains in all: together such rows
    are no more than the rounding of one number.

    Args:
        g: (O,) float64, not all 0.
        c: not 0.
        dtype: what weights are rounded to: its eps counts.

    Source: Salimans & Kingma 2016, section 2 (g = e^s).

    >>> s, sign, floored = log_gains(torch.tensor([-1.0, 0.0]).double(), 1.0, torch.float32)
    >>> sign.tolist(), floored.tolist(), bool(s[1].exp() < 1e-7)
    ([-1.0, 1.0], [False, True], True)
    """
    size, floored = g.abs(), g == 0
    if g.numel():
        floor = size.max() * torch.finfo(dtype).eps / g.numel() ** 0.5
        size = torch.where(floored, floor, size)
    return LogGains(
        size.log() / c, torch.where(g < 0, -torch.ones_like(g), torch.ones_like(g)), floored
    )

"""Multiplying a per-channel affine map into the layer before it or the layer after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.layers.operators import layout_of
from normconv.layers.reparametrised import Reparametrised
from normconv.layers.weight_norm import weight_norm_
from normconv.numerics import Affine, response_to_shift, scale_columns_, scale_rows_

__all__ = ["absorb_affine_", "absorb_input_affine_"]


def absorb_affine_(
    layer: nn.Module,
    affine: Affine,
    *,
    weight_norm: bool = False,
    bias_trainable: bool | None = None,
) -> None:
    """Make the layer compute affine(layer(x)), in place.

    w ← scale · w (row by row) and b ← scale · b + shift, in float64, rounded once. With `weight_norm`
    the scale goes into a signed gain instead and the direction stays w.

    Args:
        layer: Linear, Conv1d-3d or ConvTranspose1d-3d (or a subclass) with a plain weight, or one of
            our reparametrised ones, whose gain takes the scale.
        affine: scale and shift, (O,) float64.
        weight_norm: leave the layer weight-normed.
        bias_trainable: `requires_grad` of the bias afterwards; None keeps the bias's own, or the
            weight's where there was no bias.

    Raises:
        UsageError: the layer cannot hold it (another class, no plain weight).

    >>> layer = nn.Linear(1, 1, bias=False); _ = nn.init.ones_(layer.weight)
    >>> absorb_affine_(layer, Affine(torch.tensor([2.0]).double(), torch.tensor([3.0]).double()))
    >>> layer(torch.tensor([[1.0]])).item()
    5.0
    """
    layout = layout_of(layer)
    reparametrised = layer if isinstance(layer, Reparametrised) else None
    weight = layer._parameters.get(reparametrised.computed_from[1] if reparametrised else "weight")
    if layout is None or weight is None:
        raise UsageError(
            Problem(type(layer).__name__, "has no plain weight to absorb an affine map")
        )
    bias = layer._parameters.get("bias")
    if bias_trainable is None:
        bias_trainable = (bias if bias is not None else weight).requires_grad
    with torch.no_grad():
        weight.grad = None  # it was the gradient of another weight
        value = affine.shift if bias is None else affine.scale * bias.double() + affine.shift
        _set_bias(layer, value, like=weight, trainable=bias_trainable)
        if reparametrised:
            reparametrised.multiply_rows_(affine.scale)
        elif weight_norm:
            weight_norm_(layer, affine.scale)
        else:
            scale_rows_(weight, affine.scale, layout)


def absorb_input_affine_(
    layer: nn.Module,
    affine: Affine,
    *,
    center: Tensor | None = None,
    weight_norm: bool = False,
    bias_trainable: bool | None = None,
) -> None:
    """Make the layer compute layer(affine(x)), in place.

    w ← w · scale (column by column) and b ← b + w · shift, in float64, rounded once. With
    `weight_norm` the layer is weight-normed afterwards, v the scaled weight.

    Where |x| is large against what affine(x) is, the rounding of w · scale, times x, is the error that
    counts, and it is nearly the same for every x. With a `center` m the bias takes it out:
    b ← b + w · affine(m) − round(w · scale) · m.

    Args:
        layer: Linear or Conv1d-3d (or a subclass) with a plain weight, without zero padding.
        affine: scale and shift, (I,) float64, one an input feature.
        center: a typical input, (I,); 0 for None.
        weight_norm: leave the layer weight-normed.
        bias_trainable: `requires_grad` of a bias that the layer did not have; None takes the weight's.

    Raises:
        UsageError: the layer cannot hold it (another class, no plain weight).

    >>> layer = nn.Linear(1, 1, bias=False); _ = nn.init.ones_(layer.weight)
    >>> two, three = torch.tensor([2.0]).double(), torch.tensor([3.0]).double()
    >>> absorb_input_affine_(layer, Affine(two, three)); layer(torch.tensor([[1.0]])).item()
    5.0
    """
    layout, weight = layout_of(layer), layer._parameters.get("weight")
    if layout is None or layout.transposed or weight is None:
        raise UsageError(
            Problem(type(layer).__name__, "has no plain weight to absorb a map of its input")
        )
    groups = layer.groups if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1
    bias = layer._parameters.get("bias")
    trainable = weight.requires_grad if bias_trainable is None else bias_trainable
    with torch.no_grad():
        weight.grad = None  # it was the gradient of another weight
        middle = torch.zeros_like(affine.shift) if center is None else center.double()
        value = response_to_shift(weight, affine.scale * middle + affine.shift, groups)
        scale_columns_(weight, affine.scale, groups)
        value = value - response_to_shift(weight, middle, groups)
        if bias is not None:
            value, trainable = value + bias.double(), trainable or bias.requires_grad
        _set_bias(layer, value, like=weight, trainable=trainable)
        if weight_norm:
            weight_norm_(layer)


def _set_bias(layer: nn.Module, value: Tensor, *, like: Tensor, trainable: bool) -> None:
    bias = layer._parameters.get("bias")
    if bias is None:
        rounded = value.to(dtype=like.dtype, device=like.device)
        layer.bias = nn.Parameter(rounded, requires_grad=trainable)
    else:
        bias.copy_(value)
        bias.grad = None
        bias.requires_grad_(trainable)

"""Multiplying a per-channel affine map into the layer that feeds it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.layers.operators import layout_of
from normconv.layers.reparametrised import weight_norm_
from normconv.numerics import Affine, scale_rows

__all__ = ["absorb_affine_"]


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
        layer: Linear, Conv1d-3d or ConvTranspose1d-3d (or a subclass) with a plain weight.
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
    weight = layer._parameters.get("weight")
    if layout is None or weight is None:
        raise UsageError(
            Problem(type(layer).__name__, "has no plain weight to absorb an affine map")
        )
    bias = layer._parameters.get("bias")
    if bias_trainable is None:
        bias_trainable = (bias if bias is not None else weight).requires_grad
    with torch.no_grad():
        value = affine.shift if bias is None else affine.scale * bias.double() + affine.shift
        _set_bias(layer, value, like=weight, trainable=bias_trainable)
        if weight_norm:
            weight_norm_(layer, affine.scale)
        else:
            weight.copy_(scale_rows(weight.double(), affine.scale, layout))


def _set_bias(layer: nn.Module, value: Tensor, *, like: Tensor, trainable: bool) -> None:
    bias = layer._parameters.get("bias")
    if bias is None:
        rounded = value.to(dtype=like.dtype, device=like.device)
        layer.bias = nn.Parameter(rounded, requires_grad=trainable)
    else:
        bias.copy_(value)
        bias.requires_grad_(trainable)

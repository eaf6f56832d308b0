"""Which layers weight standardization leaves alone by default, and why."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from normconv.layers import unfit_for_weight_standardization

__all__ = ["why_not_standardized"]

_FEW = 4  # input channels of a stem: grey, RGB, RGB with depth


def why_not_standardized(layers: Iterable[nn.Module]) -> str:
    """Say why the layers' filters should keep their mean; empty where they may lose it.

    The mean of a filter is its response to a constant input. A stem reads brightness by it, a depthwise
    filter passes a channel on by it, and a linear layer has no patch to take it over.

    >>> why_not_standardized([nn.Conv2d(16, 32, 3)]), why_not_standardized([nn.Conv2d(3, 32, 3)])
    ('', 'a stem (3 input channels): its filters read brightness by their mean')
    """
    for layer in layers:
        if unfit := unfit_for_weight_standardization(layer):
            return unfit
        if isinstance(layer, nn.Linear):
            return "a linear layer: it has no patches"
        channels, groups = getattr(layer, "in_channels", 0), getattr(layer, "groups", 1)
        if groups > 1 and groups == channels:
            return "a depthwise convolution: its filters pass a channel on by their mean"
        if channels <= _FEW:
            return f"a stem ({channels} input channels): its filters read brightness by their mean"
    return ""

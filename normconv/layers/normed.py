"""A layer with a norm after it, in the layer's place."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

__all__ = ["Normed"]


class Normed(nn.Sequential):
    """A layer and a norm of what it puts out: their names begin with ``layer`` and ``norm``.

    >>> list(Normed.of(nn.Linear(2, 4), nn.GroupNorm(1, 4)).state_dict())
    ['layer.weight', 'layer.bias', 'norm.weight', 'norm.bias']
    """

    @classmethod
    def of(cls, layer: nn.Module, norm: nn.Module) -> Normed:
        """Put a norm after a layer; the layer's mode is kept."""
        made = cls(OrderedDict(layer=layer, norm=norm))
        made.training = norm.training = layer.training
        return made

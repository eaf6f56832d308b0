"""A copy of an activation, for code that writes into what a layer put out."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["Clone", "Cloned"]


class Clone(nn.Module):
    """y = x in memory of its own.

    Hooks on the backward pass hand out a layer's output as a view that nothing may write into. The copy
    may be written into.

    >>> import torch
    >>> x = torch.ones(2)
    >>> Clone()(x).add_(1), x
    (tensor([2., 2.]), tensor([1., 1.]))
    """

    def forward(self, input: Tensor) -> Tensor:
        """Copy any tensor."""
        return input.clone()


class Cloned(nn.Sequential):
    """A layer with a copy after it, in the layer's place: its names begin with ``layer``."""

    @classmethod
    def of(cls, layer: nn.Module) -> Cloned:
        """Put a copy after a layer; the layer's mode is kept."""
        made = cls(OrderedDict(layer=layer, clone=Clone()))
        made.training = layer.training
        return made

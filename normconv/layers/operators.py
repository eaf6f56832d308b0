"""The linear operators whose weights are rewritten, and where their output channels are."""

from __future__ import annotations

from torch import nn

from normconv.numerics import RowLayout

__all__ = ["OPERATORS", "kind_of", "layout_of"]

_DIRECT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OPERATORS = _DIRECT + _TRANSPOSED
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.ConvTranspose1d, "conv_transpose1d"),
    (nn.ConvTranspose2d, "conv_transpose2d"),
    (nn.ConvTranspose3d, "conv_transpose3d"),
)


def layout_of(layer: nn.Module) -> RowLayout | None:
    """Return where the rows of the layer's weight are; None for a layer that is no such operator.

    >>> layout_of(nn.ConvTranspose1d(4, 6, 3, groups=2))
    RowLayout(transposed=True, groups=2)
    """
    if isinstance(layer, _TRANSPOSED):
        return RowLayout(transposed=True, groups=layer.groups)
    if isinstance(layer, _DIRECT):
        return RowLayout()
    return None


def kind_of(layer: nn.Module) -> str:
    """Return the operator's kind, ``conv2d`` for any `nn.Conv2d`; ``none`` for no such operator.

    >>> kind_of(nn.Linear(2, 2)), kind_of(nn.ReLU())
    ('linear', 'none')
    """
    return next((kind for family, kind in _KINDS if isinstance(layer, family)), "none")

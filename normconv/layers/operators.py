"""The layers whose weights are rewritten, and where the rows of those are."""

from __future__ import annotations

from typing import Any

from torch import nn

from normconv.numerics import RowLayout

__all__ = ["FAMILIES", "OPERATORS", "kind_of", "layout_of", "row_layouts"]

_DIRECT = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
OPERATORS = _DIRECT + _TRANSPOSED
FAMILIES = (*OPERATORS, nn.Embedding, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_KINDS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Conv1d, "conv1d"),
    (nn.Conv2d, "conv2d"),
    (nn.Conv3d, "conv3d"),
    (nn.ConvTranspose1d, "conv_transpose1d"),
    (nn.ConvTranspose2d, "conv_transpose2d"),
    (nn.ConvTranspose3d, "conv_transpose3d"),
    (nn.Embedding, "embedding"),
    (nn.LSTM, "lstm"),
    (nn.GRU, "gru"),
    (nn.RNNBase, "rnn"),
    (nn.LSTMCell, "lstm_cell"),
    (nn.GRUCell, "gru_cell"),
    (nn.RNNCellBase, "rnn_cell"),
    (nn.MultiheadAttention, "attention"),
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


def row_layouts(layer: nn.Module) -> dict[str, RowLayout]:
    """Return where the rows of each of a layer's own weights are, by name; empty for other layers.

    A row is what one output is computed with: a filter, a unit of a gate, a row of a projection, the
    vector of one token.

    >>> list(row_layouts(nn.LSTM(2, 3, bias=False)))
    ['weight_ih_l0', 'weight_hh_l0']
    >>> list(row_layouts(nn.MultiheadAttention(4, 2)))
    ['in_proj_weight']
    """
    if (layout := layout_of(layer)) is not None:
        return {"weight": layout}
    return dict.fromkeys(_names(layer), RowLayout())


def _names(layer: Any) -> tuple[str, ...]:
    if isinstance(layer, nn.Embedding):
        return ("weight",)
    if isinstance(layer, nn.RNNBase):
        names: list[str] = layer._flat_weights_names
        return tuple(name for name in names if name.startswith("weight_"))
    if isinstance(layer, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if isinstance(layer, nn.MultiheadAttention):
        one: bool = layer._qkv_same_embed_dim
        return ("in_proj_weight",) if one else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ()


def kind_of(layer: nn.Module) -> str:
    """Return a layer's kind, ``conv2d`` for any `nn.Conv2d`; ``none`` for a layer of no known family.

    >>> kind_of(nn.Linear(2, 2)), kind_of(nn.ReLU())
    ('linear', 'none')
    """
    return next((kind for family, kind in _KINDS if isinstance(layer, family)), "none")

"""One layer at a time."""

from __future__ import annotations

import copy
from typing import Literal, TypeVar

from torch import Tensor, nn

from normconv.calibration import initialise
from normconv.calibration.batches import Source
from normconv.errors import Problem, UsageError
from normconv.layers import layout_of, wrap_

__all__ = ["wrap"]

Layer = TypeVar("Layer", bound=nn.Module)


def wrap(
    layer: Layer,
    to: Literal["wn", "ws"] = "wn",
    *,
    scale: Literal["linear", "exp"] = "linear",
    c: float = 1.0,
    dialect: str = "timm",
    init: Tensor | Source | None = None,
) -> Layer:
    """Reparametrise one layer in place, all of its weights, and return it.

    ``wn``: w = g · v / ‖v‖ row by row, v = w as it is and g = ‖w‖: the function stays. With
    ``scale="exp"`` the gain is g = e^(c·s). ``ws``: w = gain · s · (v − mean(v)) / d(v): the function
    changes by what the means of the rows were (`normconv.layers.mean_share`), and stays where they are 0.

    The layer stays an instance of its class; `nc.fold` brings back plain weights. A weight that other
    layers hold too is shared no longer: those go on with v. `nc.convert` keeps tied layers tied.

    Args:
        layer: Linear, Conv1d-3d, ConvTranspose1d-3d (rows: output channels), Embedding (one row a
            token), RNN, LSTM, GRU or a cell of them (one row a unit of a gate), MultiheadAttention (its
            projections, `out_proj` included), or a subclass.
        to: ``wn`` or ``ws``.
        scale: ``wn``: what the gain is a function of.
        c: ``scale="exp"``: how fast the gain follows s.
        dialect: ``ws``: see `normconv.numerics.DIALECTS`.
        init: ``wn``: inputs of the layer, a batch or several; g and b are then set so that each channel
            of what it puts out has mean 0 and deviation 1 on them, see `initialise`.

    Raises:
        UsageError: a layer without such a weight, lazy, reparametrised already by normconv or torch, of
            integer or quantized weights; no such option; `init` for a layer that has no such start
            (recurrent, attention, embedding). The layer is as it was.
        CheckFailed: `init`: some channel is not standard afterwards, see `initialise`; the layer is as it
            was.

    Source: Salimans & Kingma 2016, equations 2, 5 and 6 and section 2; Qiao et al. 2019, equation 6.

    >>> import torch
    >>> import normconv as nc
    >>> lstm, x = nn.LSTM(3, 4), torch.randn(5, 1, 3)
    >>> before = lstm(x)[0]
    >>> nc.wrap(lstm) is lstm, isinstance(lstm, nn.LSTM), torch.allclose(lstm(x)[0], before)
    (True, True, True)
    >>> [name for name, _ in lstm.named_parameters()][:2]
    ['weight_ih_l0_g', 'weight_ih_l0_v']
    """
    if init is None:
        return wrap_(layer, to, scale=scale, c=c, dialect=dialect)
    if to != "wn":
        raise UsageError(Problem("init", "only to='wn' has such a start", "leave init out"))
    data = [init] if isinstance(init, Tensor) else init
    twin = wrap_(copy.deepcopy(layer), scale=scale, c=c, dialect=dialect)
    if layout_of(twin) is None:
        what = (
            f"{type(layer).__name__} has no data-dependent start, only Linear and convolutions have"
        )
        raise UsageError(Problem("init", what, "leave init out"))
    started = initialise(twin, data, fresh=True).model
    wrap_(layer, scale=scale, c=c).load_state_dict(started.state_dict())
    return layer

"""The optimizers by name, and the choice of one by the optimizer that a model has."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from normconv.errors import Problem, UsageError
from normconv.training.optimizers.row_optimizer import RowOptimizer
from normconv.training.optimizers.rules import ADAM, SGD

__all__ = ["WNSGD", "WSSGD", "WNAdam", "WNAdamW", "WSAdam", "WSAdamW", "reparametrise"]


class WNSGD(RowOptimizer, torch.optim.SGD):
    """SGD on (g, v) of weight norm, for a model of plain weights.

    Without momentum it keeps two numbers a row; with it, what torch's SGD keeps besides.

    Args:
        params: parameters or groups of them, as torch takes them. A group may have a ``form`` of its own:
            ``wn``, ``ws``, or ``plain`` for the step of torch.
        model: says which parameters are weights, and where their rows are.
        fused: how rows are stepped: ``compile``, ``foreach``, ``loop``, or ``auto`` to compile where the
            weights are many and a compiler works.
        max_norm: the largest ‖v‖ of a row, see `bound_directions_`.
        gain_weight_decay: weight decay of g; None for that of the group.
        **options: those of `torch.optim.SGD`. Weight decay acts on g and on v.

    Raises:
        UsageError: an option that is none, or a weight that has no such form; nothing is changed.

    Source: Salimans & Kingma 2016, equation 3.

    >>> net = nn.Linear(2, 1, bias=False); _ = net.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = WNSGD(net.parameters(), net, lr=1.0)
    >>> net(torch.tensor([[5.0, 0.0]])).sum().backward(); optimizer.step()
    >>> optimizer.state[net.weight]["gain"], net.weight.norm().item()
    (tensor([2.]), 2.0)
    """

    rule, form = SGD, "wn"


class WNAdam(RowOptimizer, torch.optim.Adam):
    """Adam on (g, v) of weight norm, for a model of plain weights; see `WNSGD`."""

    rule, form = ADAM, "wn"


class WNAdamW(RowOptimizer, torch.optim.AdamW):
    """AdamW on (g, v) of weight norm, for a model of plain weights; see `WNSGD`."""

    rule, form = ADAM, "wn"


class WSSGD(WNSGD):
    """SGD on (gain, v) of weight standardization, for a model of plain weights.

    The mean of each row is taken off the weights when the optimizer is made: a model whose rows have a
    mean computes something else from then on, as it would with standardized layers.

    Args:
        params: see `WNSGD`.
        model: see `WNSGD`.
        dialect: the denominator and the scale, a name of `normconv.numerics.DIALECTS`.
        fused: see `WNSGD`.
        gain_weight_decay: weight decay of the gain; None for that of the group.
        **options: those of `torch.optim.SGD`.

    Source: Qiao et al. 2019, "Weight Standardization", equation 6.

    >>> net = nn.Conv1d(1, 2, 3)
    >>> optimizer = WSSGD(net.parameters(), net, lr=0.1)
    >>> bool(net.weight.mean((1, 2)).abs().max() < 1e-7)
    True
    """

    form = "ws"


class WSAdam(WNAdam):
    """Adam on (gain, v) of weight standardization, for a model of plain weights; see `WSSGD`."""

    form = "ws"


class WSAdamW(WNAdamW):
    """AdamW on (gain, v) of weight standardization, for a model of plain weights; see `WSSGD`."""

    form = "ws"


_CLASSES: dict[tuple[type[Optimizer], str], type[RowOptimizer]] = {
    (torch.optim.SGD, "wn"): WNSGD,
    (torch.optim.Adam, "wn"): WNAdam,
    (torch.optim.AdamW, "wn"): WNAdamW,
    (torch.optim.SGD, "ws"): WSSGD,
    (torch.optim.Adam, "ws"): WSAdam,
    (torch.optim.AdamW, "ws"): WSAdamW,
}


def reparametrise(
    optimizer: Optimizer,
    model: nn.Module,
    to: Literal["wn", "ws"] = "wn",
    *,
    dialect: str = "timm",
    max_norm: float | None = None,
    gain_weight_decay: float | None = None,
    fused: str = "auto",
) -> RowOptimizer:
    """Return an optimizer that steps the weights of a plain model as weight norm would be trained.

    Weights of linear, convolutional, recurrent and attention layers are stepped as (g, v), or (gain, v)
    of weight standardization; the other parameters as before. Groups keep their options. What was bound
    to the optimizer given, such as a learning rate scheduler, has to be made for the new one.

    Args:
        optimizer: `torch.optim.SGD`, `Adam` or `AdamW`, before its first step.
        model: whose parameters it has, with plain weights.
        to: ``wn`` or ``ws``; a group with a ``form`` of its own keeps it.
        dialect: of weight standardization.
        max_norm: see `WNSGD`.
        gain_weight_decay: see `WNSGD`.
        fused: see `WNSGD`.

    Raises:
        UsageError: another optimizer, one that has taken steps, or as `WNSGD`; nothing is changed.

    >>> net = nn.Linear(2, 1)
    >>> type(reparametrise(torch.optim.Adam(net.parameters(), lr=1e-3), net)).__name__
    'WNAdam'
    """
    chosen = _CLASSES.get((type(optimizer), to))
    name = type(optimizer).__name__
    if chosen is None:
        if to not in ("wn", "ws"):
            raise UsageError(Problem("to", f"{to!r} is neither 'wn' nor 'ws'"))
        what = f"there is no form of {name} for rows"
        raise UsageError(Problem("optimizer", what, "use torch.optim.SGD, Adam or AdamW"))
    if any(optimizer.state.values()):
        what = "it has taken steps, and remembers gradients of other parameters than (g, v)"
        raise UsageError(Problem(name, what, "reparametrise it before the first step"))
    # The one kernel that torch calls fused scales gradients itself, and that of rows alone could not.
    groups: list[dict[str, Any]] = [{**group, "fused": None} for group in optimizer.param_groups]
    made = chosen(
        groups,
        model,
        dialect=dialect,
        max_norm=max_norm,
        gain_weight_decay=gain_weight_decay,
        fused=fused,
    )
    made.defaults = {**optimizer.defaults, **made._own_defaults, "fused": None}
    return made

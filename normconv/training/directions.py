"""The directions v of weight-normed layers: how long they are, and making them shorter.

The gradient of g · v / ‖v‖ by v is orthogonal to v, so that every step makes v longer, and its relative
steps shorter. The length carries no meaning: v may be multiplied by α > 0 at any time. What an optimizer
remembers of the gradient, which is 1/α of what it was then, has to follow. α is a power of two here:
that changes exponents alone, and weight and gradients stay what they are bit for bit.

Source: Salimans & Kingma 2016, section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from normconv.errors import Problem, UsageError
from normconv.layers import WeightNormed
from normconv.numerics import RowLayout, row_norms, scale_rows_, wide_dtype, wide_row_norms

__all__ = [
    "bound_directions_",
    "direction_growth",
    "direction_norms",
    "keep_directions_bounded",
]

_ADAM = {"exp_avg": -1, "exp_avg_sq": -2, "max_exp_avg_sq": -2}
# For each optimizer of torch: by which power of α each of its tensors goes.
_POWERS: tuple[tuple[type[Optimizer], Mapping[str, int]], ...] = (
    (torch.optim.SGD, {"momentum_buffer": -1}),
    (torch.optim.Adam, _ADAM),
    (torch.optim.AdamW, _ADAM),
    (torch.optim.NAdam, _ADAM),
    (torch.optim.RAdam, _ADAM),
    (torch.optim.Adamax, {"exp_avg": -1, "exp_inf": -1}),
    (torch.optim.RMSprop, {"square_avg": -2, "grad_avg": -1, "momentum_buffer": 0}),
    (torch.optim.Adagrad, {"sum": -2}),
    (torch.optim.Adadelta, {"square_avg": -2, "acc_delta": 2}),
)


def direction_norms(model: nn.Module) -> dict[str, Tensor]:
    """Return ‖v‖ of each row of every weight-normed weight, by the weight's name.

    Args:
        model: read only.

    Returns:
        (O,) float64 for each weight; a weight that several layers share is there once.

    >>> from normconv.layers import weight_norm_
    >>> layer = nn.Linear(2, 1); _ = nn.init.constant_(layer.weight, 1.0)
    >>> direction_norms(nn.Sequential(weight_norm_(layer)))
    {'0.weight': tensor([1.4142], dtype=torch.float64)}
    """
    found = _directions(model)
    return {name: wide_row_norms(v.detach(), layout) for name, (v, layout) in found.items()}


def direction_growth(model: nn.Module, since: Mapping[str, Tensor]) -> dict[str, float]:
    """Return for each weight how much longer its v is than it was, √(Σ‖v‖² / Σ‖v_then‖²).

    Effective steps of SGD are shorter by the square of this, those of Adam by itself.

    Args:
        model: read only.
        since: `direction_norms` of an earlier time, such as that of wrapping.

    Raises:
        UsageError: the model has other weight-normed weights than then.

    >>> from normconv.layers import weight_norm_
    >>> net = nn.Sequential(weight_norm_(nn.Linear(2, 1)))
    >>> start = direction_norms(net)
    >>> with torch.no_grad(): _ = net[0].weight_v.mul_(4)
    >>> direction_growth(net, start)
    {'0.weight': 4.0}
    """
    now = direction_norms(model)
    if {n: len(t) for n, t in now.items()} != {n: len(t) for n, t in since.items()}:
        other = sorted(now.keys() ^ since.keys()) or sorted(now)
        what = f"it has other weight-normed weights than those norms are of: {', '.join(other)}"
        raise UsageError(Problem(type(model).__name__, what, "take direction_norms of this model"))
    lengths = {name: (_length(now[name]), _length(then)) for name, then in since.items()}
    return {name: new / old for name, (new, old) in lengths.items()}


def _length(norms: Tensor) -> float:
    return float(torch.linalg.vector_norm(norms.cpu()))


def keep_directions_bounded(
    model: nn.Module,
    optimizer: Optimizer,
    max_norm: float,
    *,
    powers: Mapping[str, int] | None = None,
) -> RemovableHandle:
    """Call `bound_directions_` after every step of an optimizer.

    Args:
        model: with weight-normed layers.
        optimizer: of its parameters.
        max_norm: the largest ‖v‖ of a row.
        powers: see `bound_directions_`.

    Returns:
        A handle whose `remove()` ends it.

    Raises:
        UsageError: as `bound_directions_`; before any step where that can be told.

    >>> from normconv.layers import weight_norm_
    >>> net = nn.Sequential(weight_norm_(nn.Linear(2, 1)))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=100.0, momentum=0.9)
    >>> handle = keep_directions_bounded(net, optimizer, max_norm=1.0)
    >>> net(torch.ones(1, 2)).sum().backward(); optimizer.step()
    >>> bool(direction_norms(net)["0.weight"] <= 1.0)
    True
    """
    bound_directions_(model, max_norm, optimizer=optimizer, powers=powers)

    def after_step(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]) -> None:
        bound_directions_(model, max_norm, optimizer=stepped, powers=powers)

    return optimizer.register_step_post_hook(after_step)


@torch.no_grad()
def bound_directions_(
    model: nn.Module,
    max_norm: float,
    *,
    optimizer: Optimizer | None = None,
    powers: Mapping[str, int] | None = None,
) -> int:
    """Shorten rows of v that are longer than a bound, in place: v ← α v, α the largest 2⁻ᵏ that does it.

    The weights stay bit for bit. Gradients and what the optimizer remembers follow: first moments by
    1/α, second ones by 1/α².

    Args:
        model: with weight-normed layers.
        max_norm: the largest ‖v‖ of a row.
        optimizer: whose state follows; None where there is none.
        powers: for an optimizer that torch does not have: by which power of α each of its tensors goes.

    Returns:
        How many rows were shortened.

    Raises:
        UsageError: the bound is no positive number, or nobody said how a tensor of the optimizer goes;
            nothing is changed.

    >>> from normconv.layers import weight_norm_
    >>> layer = nn.Linear(1, 1); _ = nn.init.constant_(layer.weight, 5.0)
    >>> bound_directions_(weight_norm_(layer), 3.0), layer.weight_v.item(), layer.weight.item()
    (1, 2.5, 5.0)
    """
    if isinstance(max_norm, bool) or not 0 < max_norm < math.inf:
        raise UsageError(Problem("max_norm", f"{max_norm!r} is no positive number"))
    known = {} if optimizer is None else _powers_of(optimizer, powers)
    plan = []
    for name, (v, layout) in _directions(model).items():
        norms = row_norms(v.detach().to(wide_dtype(v.dtype)), layout).double()
        long = norms > max_norm
        if bool(long.any()):
            halvings = torch.where(long, (norms / max_norm).log2().ceil(), torch.zeros_like(norms))
            follow = [] if optimizer is None else list(_following(name, v, optimizer, known))
            plan.append((v, layout, torch.exp2(-halvings), follow, int(long.sum())))
    for v, layout, factor, follow, _ in plan:
        scale_rows_(v, factor, layout)
        for tensor, power in follow:
            scale_rows_(tensor, factor**power, layout)
        if v.grad is not None:
            scale_rows_(v.grad, 1 / factor, layout)
    return sum(rows for *_, rows in plan)


def _directions(model: nn.Module) -> dict[str, tuple[nn.Parameter, RowLayout]]:
    found: dict[str, tuple[nn.Parameter, RowLayout]] = {}
    seen = set()
    for path, layer in model.named_modules():
        if isinstance(layer, WeightNormed):
            for name in layer.weights:
                v: Any = layer.gain_and_v(name)[1]
                if id(v) not in seen:
                    seen.add(id(v))
                    found[f"{path}.{name}".lstrip(".")] = (v, layer.row_layout(name))
    return found


def _powers_of(optimizer: Optimizer, powers: Mapping[str, int] | None) -> Mapping[str, int]:
    if powers is not None:
        return powers
    for kind, known in _POWERS:
        if isinstance(optimizer, kind):
            return known
    what = f"how the state of {type(optimizer).__name__} goes with the length of v is not known"
    raise UsageError(Problem("optimizer", what, 'say it: powers={"exp_avg": -1, …}'))


def _following(
    name: str, v: nn.Parameter, optimizer: Optimizer, powers: Mapping[str, int]
) -> Iterator[tuple[Tensor, int]]:
    """The optimizer's tensors of v's shape, and by which power of α they go."""
    for key, tensor in optimizer.state.get(v, {}).items():
        if isinstance(tensor, Tensor) and tensor.shape == v.shape:
            if key not in powers:
                what = f"{type(optimizer).__name__} keeps {key!r} of {name}'s v"
                way_out = f"say by which power of α it goes: powers={{'{key}': …}}"
                raise UsageError(Problem("optimizer", what, way_out))
            if powers[key]:
                yield tensor, powers[key]

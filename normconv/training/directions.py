"""The directions v of weight-normed layers: how long they are, and making them shorter.

The gradient of g · v / ‖v‖ by v is orthogonal to v, so that every step makes v longer, and its relative
steps shorter. The length carries no meaning: v may be multiplied by α > 0 at any time. What an optimizer
remembers of the gradient, which is 1/α of what it was then, has to follow. α is a power of two here:
that changes exponents alone, and weight and gradients stay what they are bit for bit.

SGD with momentum needs more than that. Its buffer m is not orthogonal to v, since v has moved: after long
steps v is little else than −lr · m. Multiplied by 1/α such an m makes the next v longer by 1/α² than this
one, without end. No gradient has that component, and it moves no weight; the rows that are shortened lose
it. What is left of m is orthogonal to v, and a step v' = v − lr · m keeps ‖v‖ · ‖m‖ of it (as of angular
momentum): with ‖v‖ held, ‖m‖ is. Optimizers that divide by a second moment take steps of bounded length,
and keep theirs.

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
from normconv.numerics import (
    RowLayout,
    row_norms,
    scale_rows,
    scale_rows_,
    wide_dtype,
    wide_row_norms,
)
from normconv.numerics.rows import row_axes

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
        UsageError: as `bound_directions_`, before any step where that can be told; the model has no
            weight norm, or the optimizer holds none of its v.

    >>> from normconv.layers import weight_norm_
    >>> net = nn.Sequential(weight_norm_(nn.Linear(2, 1)))
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9)
    >>> handle = keep_directions_bounded(net, optimizer, max_norm=1.0)
    >>> net(torch.ones(1, 2)).sum().backward(); optimizer.step()
    >>> bool(direction_norms(net)["0.weight"] <= 1.0)
    True
    """
    _check_holds(optimizer, model)
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
    1/α, second ones by 1/α². A first moment without a second one, the momentum of SGD, also loses its
    component along v in these rows: scaled with the rest it would make v longer without end.

    Args:
        model: with weight-normed layers.
        max_norm: the largest ‖v‖ of a row.
        optimizer: whose state follows; None where there is none.
        powers: for an optimizer that torch does not have: by which power of α each of its tensors goes.

    Returns:
        How many rows were shortened.

    Raises:
        UsageError: the bound is no positive number, some v holds NaN or infinity, or nobody said how a
            tensor of the optimizer goes; nothing is changed.

    >>> from normconv.layers import weight_norm_
    >>> layer = nn.Linear(1, 1); _ = nn.init.constant_(layer.weight, 5.0)
    >>> bound_directions_(weight_norm_(layer), 3.0), layer.weight_v.item(), layer.weight.item()
    (1, 2.5, 5.0)
    """
    _check_arguments(model, max_norm, optimizer)
    known = {} if optimizer is None else _powers_of(optimizer, powers)
    plan = []
    for name, (v, layout) in _directions(model).items():
        norms = row_norms(v.detach().to(wide_dtype(v.dtype)), layout).double()
        if not bool(norms.isfinite().all()):
            way_out = "lower the learning rate, or raise max_norm"
            raise UsageError(Problem(name, "its v holds NaN or infinity", way_out))
        long = norms > max_norm
        if bool(long.any()):
            halvings = torch.where(long, (norms / max_norm).log2().ceil(), torch.zeros_like(norms))
            follow = [] if optimizer is None else list(_following(name, v, optimizer, known))
            plan.append((v, layout, torch.exp2(-halvings), follow, int(long.sum())))
    alone = sum(power < 0 for power in known.values()) == 1  # no second moment beside the first
    for v, layout, factor, follow, _ in plan:
        scale_rows_(v, factor, layout)
        for tensor, power in follow:
            if power == -1 and alone:
                _remove_component_(tensor, v, factor < 1, layout)
            scale_rows_(tensor, factor**power, layout)
        if v.grad is not None:
            scale_rows_(v.grad, 1 / factor, layout)
    return sum(rows for *_, rows in plan)


def _remove_component_(m: Tensor, v: Tensor, rows: Tensor, layout: RowLayout) -> None:
    """Do m ← m − (m · v / ‖v‖²) v to some rows, in place; computed in float64."""
    wide, along = m.double(), v.double()
    units = scale_rows(along, 1 / row_norms(along, layout).clamp_min(1e-300), layout)
    axes = row_axes(layout.split(m) if layout.transposed else m, layout)
    products = wide * units
    dots = (layout.split(products) if layout.transposed else products).sum(axes).flatten()
    taken = torch.where(rows, dots, torch.zeros_like(dots))
    m.copy_(wide - scale_rows(units, taken, layout))


def _check_arguments(model: object, max_norm: Any, optimizer: object) -> None:
    problems = []
    if not isinstance(model, nn.Module):
        problems.append(Problem("model", f"a {type(model).__name__} is no module"))
    number = isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool)
    if not number or not 0 < max_norm < math.inf:
        problems.append(Problem("max_norm", f"{max_norm!r} is no positive number"))
    if not isinstance(optimizer, Optimizer | None):
        what = f"a {type(optimizer).__name__} is no torch.optim.Optimizer"
        problems.append(Problem("optimizer", what))
    if problems:
        raise UsageError(problems)


def _check_holds(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse a pair of which one has nothing to do with the other."""
    _check_arguments(model, 1.0, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = _directions(model)
    if not found:
        what, way_out = "it has no weight-normed layers", "nc.wrap or nc.convert makes some"
        raise UsageError(Problem(type(model).__name__, what, way_out))
    if not any(id(v) in held for v, _ in found.values()):
        what = "it holds no v of the model"
        way_out = "make it of model.parameters() after the layers are weight-normed"
        raise UsageError(Problem("optimizer", what, way_out))


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

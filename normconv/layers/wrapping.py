"""One layer weight-normed or weight-standardized, in place, once all that could stop it is checked."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from normconv.errors import Problem, UsageError
from normconv.layers.operators import row_layouts
from normconv.layers.reparametrised import Reparametrised, unfit_for
from normconv.layers.weight_norm import WeightNormed, log_gain_, weight_norm_
from normconv.layers.weight_standardization import (
    unfit_for_weight_standardization,
    weight_standardize_,
)
from normconv.numerics import DIALECTS, RowLayout, all_finite, log_gains, wide_row_norms

__all__ = ["check_scale", "obstacle_to", "wrap_"]

Layer = TypeVar("Layer", bound=nn.Module)


def wrap_(
    layer: Layer,
    to: Literal["wn", "ws"] = "wn",
    *,
    scale: Literal["linear", "exp"] = "linear",
    c: float = 1.0,
    dialect: str = "timm",
) -> Layer:
    """Reparametrise one layer in place, all of its weights, and return it: `normconv.wrap` without init.

    Raises:
        UsageError: as there; the layer is as it was.

    >>> layer = nn.Linear(3, 2)
    >>> wrap_(layer) is layer, [name for name, _ in layer.named_parameters()]
    (True, ['weight_g', 'weight_v', 'bias'])
    """
    problems = _option_problems(to, scale, c, dialect)
    if not problems:
        for name, part in _parts(layer).items():
            if found := obstacle_to(to, part, scale=scale, c=c):
                problems.append(Problem(name, *found))
    if problems:
        raise UsageError(problems)
    for part in _parts(layer).values():
        if to == "ws":
            weight_standardize_(part, dialect=dialect)
        else:
            weight_norm_(part)
            if scale == "exp":
                log_gain_(part, c)
    return layer


def _parts(layer: nn.Module) -> dict[str, nn.Module]:
    """The layer, and the layer inside it that holds a weight of its function."""
    name = type(layer).__name__
    if isinstance(layer, nn.MultiheadAttention):
        return {name: layer, f"{name}.out_proj": layer.out_proj}
    return {name: layer}


def _option_problems(to: object, scale: object, c: Any, dialect: str) -> list[Problem]:
    problems = []
    if to not in ("wn", "ws"):
        problems.append(Problem("to", f"a layer becomes 'wn' or 'ws', not {to!r}"))
    if reason := check_scale(scale, c):
        problems.append(Problem("scale", reason))
    if to == "ws" and (scale, c) != ("linear", 1.0):
        problems.append(Problem("scale", "only to='wn' has scale and c"))
    if not isinstance(dialect, str) or dialect not in DIALECTS:
        problems.append(Problem("dialect", f"{dialect!r} is none of {', '.join(DIALECTS)}"))
    elif to == "wn" and dialect != "timm":
        problems.append(Problem("dialect", "only to='ws' has dialects"))
    return problems


def check_scale(scale: object, c: Any) -> str:
    """Say what is wrong with the options of the gain; empty where nothing is.

    >>> check_scale("exp", 1.0), check_scale("exp", 0.0)
    ('', 'c=0.0 is no positive number')
    """
    if scale not in ("linear", "exp"):
        return f"{scale!r} is neither 'linear' nor 'exp'"
    if isinstance(c, bool) or not isinstance(c, (int, float)) or not 0 < c < math.inf:
        return f"c={c!r} is no positive number"
    return "" if scale == "exp" or c == 1 else f"c={c!r} goes with scale='exp'"


_FOLD = "fold it first: nc.fold(model) folds every weight norm"
_NEEDS = "takes Linear, convolution, Embedding, recurrent and MultiheadAttention layers"


def obstacle_to(
    kind: str, layer: nn.Module, *, scale: str = "linear", c: float = 1.0
) -> tuple[str, str] | None:
    """Say why a layer's own weights cannot be reparametrised, and the way out; None where they can.

    Args:
        kind: ``wn`` or ``ws``.
        layer: read only.
        scale: as in `wrap_`.
        c: as in `wrap_`.

    >>> obstacle_to("wn", nn.Linear(2, 2)) is None, obstacle_to("wn", nn.LazyLinear(2))[0]
    (True, 'LazyLinear is lazy and has no parameters yet')
    """
    name, layouts = type(layer).__name__, row_layouts(layer)
    if isinstance(layer, Reparametrised):
        return f"it has {layer.what} already", _FOLD
    if parametrize.is_parametrized(layer):
        chains: Any = layer.parametrizations
        return f"torch computes its {', '.join(chains)} from other parameters", _FOLD
    if not layouts:
        return f"{name} has no weight that a row norm could be taken of", f"it {_NEEDS}"
    for weight_name in layouts:
        weight: Any = layer._parameters.get(weight_name)
        if weight is None:
            return f"its {weight_name} is no plain parameter (a hook computes it)", _FOLD
        if is_lazy(weight):
            return f"{name} is lazy and has no parameters yet", "call it once first"
        if found := _unfit_weight(weight_name, weight):
            return found
        most = torch.finfo(weight.dtype).max
        if not weight.is_meta and bool((wide_row_norms(weight, layouts[weight_name]) > most).any()):
            return (
                f"a row of its {weight_name} is longer than its dtype can say",
                "take .float() of it",
            )
        if scale == "exp" and not weight.is_meta and not bool(weight.any()):
            what = f"its {weight_name} is 0, and no gain of 0 is e^(c·s)"
            return what, "use scale='linear' there"
        if scale == "exp" and not weight.is_meta and _out_of_range(weight, layouts[weight_name], c):
            what = f"log|g| / c of its {weight_name} is beyond {weight.dtype} with c={c!r}"
            return what, "take c nearer to 1, or scale='linear'"
    weights = [id(layer._parameters[weight_name]) for weight_name in layouts]
    if len(set(weights)) < len(weights):
        return "two of its weights are the same parameter", "leave this layer plain"
    return _unfit_layer(kind, layer)


def _out_of_range(weight: torch.Tensor, layout: RowLayout, c: float) -> bool:
    """Say whether s = log|g| / c overflows or vanishes in the weight's dtype: e^(c·s) were another g."""
    s = log_gains(wide_row_norms(weight, layout), c, weight.dtype).s
    off = (s.to(weight.dtype).double() - s).abs()
    return not bool((off * c <= torch.finfo(weight.dtype).eps * (1 + (s * c).abs())).all())


def _unfit_weight(name: str, weight: Any) -> tuple[str, str] | None:
    plain = "leave this layer plain"
    if type(weight) is not nn.Parameter:  # a DTensor, or quantized
        return f"its {name} is a {type(weight).__name__}, no plain tensor", plain
    if not weight.is_floating_point() or weight.element_size() < 2:
        kind = str(weight.dtype).removeprefix("torch.")
        return f"its {name} is {kind}, which holds no product", plain
    if not weight.numel():
        return f"its {name} has no elements", plain
    if not all_finite(weight):
        return f"its {name} holds NaN or infinity", "load sound weights first"
    return None


def _unfit_layer(kind: str, layer: nn.Module) -> tuple[str, str] | None:
    plain = "leave this layer plain"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "it renormalizes its table in place (max_norm)", "make it with max_norm=None"
    if isinstance(layer, nn.Embedding) and layer.sparse:
        return "its gradients are sparse, those of a norm are not", "make it with sparse=False"
    own = unfit_for_weight_standardization(layer) if kind == "ws" else ""
    if reason := own or unfit_for(WeightNormed.kind, layer):
        return reason, plain
    return None

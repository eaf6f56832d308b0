"""Layers whose weight is computed from other parameters: dynamic subclasses of the user's own class.

`WNConv2d` is made once per class, as a subclass of (WeightNormed, Conv2d): `isinstance(m, nn.Conv2d)`
holds, the class keeps its own `forward`, and whatever reads `m.weight` gets the computed weight.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, fx, nn

from normconv.errors import Problem, UsageError
from normconv.layers.operators import OPERATORS, layout_of
from normconv.numerics import RowLayout, normed_weight, split_weight_, true_weight

__all__ = [
    "Reparametrised",
    "WeightNormed",
    "fold_layer_",
    "rebuild_layer",
    "unfit_for_weight_norm",
    "weight_norm_",
]

Layer = TypeVar("Layer", bound=nn.Module)


class Reparametrised:
    """What every reparametrised layer is: a user's layer class with a computed `weight`."""

    kind: ClassVar[str]
    computed_from: ClassVar[tuple[str, ...]]
    plain_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the recipe for it instead of the class.
        state = super().__reduce_ex__(2)[2]
        return rebuild_layer, (self.kind, self.plain_class, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # As the default does, so that hooks or attributes that lead back to the layer may stay.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        _set_state(twin, copy.deepcopy(super().__reduce_ex__(2)[2], memo))
        return twin

    def true_weight(self) -> tuple[Tensor, Tensor]:
        """Return the float64 weight rounded once, and which rows were repaired, (O,) bool."""
        raise NotImplementedError


class WeightNormed(Reparametrised):
    """A layer with weight = g · v / ‖v‖ over the parameters `weight_g` (signed) and `weight_v`.

    Source: Salimans & Kingma 2016, equation 2.
    """

    kind = "wn"
    computed_from = ("weight_g", "weight_v")
    weight_g: nn.Parameter
    weight_v: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """The computed weight: same shape, dtype and memory format as `weight_v`."""
        layout = self._layout
        return _normed_weight(self.weight_g, self.weight_v, layout.transposed, layout.groups)

    @property
    def _layout(self) -> RowLayout:
        layout = layout_of(cast(nn.Module, self))
        assert layout is not None
        return layout

    def true_weight(self) -> tuple[Tensor, Tensor]:
        """Return the float64 weight rounded once, and which rows have ‖v‖ = 0, (O,) bool."""
        return true_weight(self.weight_g.detach(), self.weight_v.detach(), self._layout)


@fx.wrap
def _normed_weight(g: Tensor, v: Tensor, transposed: bool, groups: int) -> Tensor:
    """One call in the eyes of any `torch.fx` tracer, with plain values for the layout."""
    return normed_weight(g, v, RowLayout(transposed, groups))


_MIXINS: dict[str, type[Reparametrised]] = {"wn": WeightNormed}
_PREFIX = {"wn": "WN"}
_made: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {}


def _class_for(kind: str, plain_class: type[nn.Module]) -> type[nn.Module]:
    key = (kind, plain_class)
    if key not in _made:
        name = _PREFIX[kind] + plain_class.__name__
        namespace = {
            "plain_class": plain_class,
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{plain_class.__name__} with a reparametrised weight ({kind}).",
        }
        _made[key] = type(name, (_MIXINS[kind], plain_class), namespace)
    return _made[key]


def rebuild_layer(kind: str, plain_class: type[nn.Module], state: Any) -> nn.Module:
    """Make a reparametrised layer from its pickle. Runs no constructor.

    Args:
        kind: which reparametrisation, ``"wn"``.
        plain_class: the user's layer class.
        state: the layer's attributes.

    Raises:
        UsageError: the kind is unknown, or the class is no linear operator of torch's families.
    """
    is_operator = isinstance(plain_class, type) and issubclass(plain_class, OPERATORS)
    if kind not in _MIXINS or not is_operator:
        raise UsageError(
            Problem(str(plain_class), f"no reparametrised layer {kind!r} of this class")
        )
    made = _class_for(kind, plain_class)
    layer = made.__new__(made)
    _set_state(layer, state)
    return layer


def _set_state(layer: Any, state: Any) -> None:
    # nn.Module always has __setstate__; a class of the user may have its own and is asked first.
    layer.__setstate__(state)


def weight_norm_(layer: Layer, factor: Tensor | None = None) -> Layer:
    """Turn a layer, in place, into its weight-normed form with weight factor · w.

    v = w as it is and g = ‖w‖ · factor, so that a factor of 0 keeps the direction. `weight_g` and
    `weight_v` take the place of `weight` in the order of parameters and inherit its `requires_grad`.
    `weight_v` is the very parameter that `weight` was: nothing of the layer's size is copied.

    Args:
        layer: Linear, Conv1d-3d or ConvTranspose1d-3d (or a subclass) with a plain weight.
        factor: (O,) float64 multiplier of the rows, None for 1.

    Raises:
        UsageError: the layer is of another class, or has no plain weight.

    >>> layer = weight_norm_(nn.Linear(3, 2))
    >>> isinstance(layer, nn.Linear), [name for name, _ in layer.named_parameters()]
    (True, ['weight_g', 'weight_v', 'bias'])
    """
    layout = layout_of(layer)
    weight = layer._parameters.get("weight")
    if layout is None or weight is None:
        raise UsageError(
            Problem(
                type(layer).__name__,
                "weight norm needs a Linear or convolution with a plain weight",
            )
        )
    g, _ = split_weight_(weight.detach(), factor, layout)
    weight.grad = None  # it was the gradient of another weight
    gain = nn.Parameter(g, requires_grad=weight.requires_grad)
    _exchange(layer, ("weight",), {"weight_g": gain, "weight_v": weight})
    module: Any = layer
    module.__class__ = _class_for("wn", type(layer))
    return layer


def unfit_for_weight_norm(layer: nn.Module) -> str:
    """Say why `weight_norm_` could not change the layer's class; empty where it can. Nothing is changed.

    >>> unfit_for_weight_norm(nn.Linear(1, 1))
    ''
    """
    empty: Any = object.__new__(type(layer))
    try:
        empty.__class__ = _class_for("wn", type(layer))
    except Exception as reason:  # the class is the user's, and so is what it does when subclassed
        return f"{type(layer).__name__} cannot be subclassed as weight norm needs it ({reason})"
    return ""


def fold_layer_(
    layer: nn.Module, done: dict[tuple[int, ...], nn.Parameter] | None = None
) -> Tensor:
    """Turn one of our reparametrised layers, in place, into its plain class.

    Args:
        layer: folded.
        done: weights made so far, by the identities of what they were computed from: layers that
            shared those will share the weight.

    Returns:
        Which rows were repaired (no direction, folded to 0), (O,) bool.
    """
    assert isinstance(layer, Reparametrised)
    with torch.no_grad():
        value, repaired = layer.true_weight()
    names = layer.computed_from
    trainable = any(getattr(layer, name).requires_grad for name in names)
    weight = nn.Parameter(value, requires_grad=trainable)
    if done is not None:
        weight = done.setdefault(tuple(id(getattr(layer, name)) for name in names), weight)
    module: Any = layer
    module.__class__ = layer.plain_class
    _exchange(module, names, {"weight": weight})
    return repaired


def _exchange(layer: nn.Module, old: tuple[str, ...], new: dict[str, nn.Parameter]) -> None:
    """Put new parameters where the old ones were in the layer's order."""
    order: dict[str, nn.Parameter | None] = {}
    for name, parameter in layer._parameters.items():
        if name == old[0]:
            order.update(new)
        if name not in old:
            order[name] = parameter
    layer._parameters.clear()
    layer._parameters.update(order)

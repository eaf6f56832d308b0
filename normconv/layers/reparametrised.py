"""Layers whose weight is computed from other parameters: dynamic subclasses of the user's own class.

`WNConv2d` is made once per class, as a subclass of (WeightNormed, Conv2d): `isinstance(m, nn.Conv2d)`
holds, the class keeps its own `forward`, and whatever reads `m.weight` gets the computed weight. Each
way to compute one is a kind, a mixin in a module of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.layers.operators import OPERATORS, layout_of
from normconv.numerics import Pullback, RowLayout

__all__ = [
    "Reparametrised",
    "fold_layer_",
    "on_each_class",
    "rebuild_layer",
    "reparametrise_",
    "unfit_for",
]

Layer = TypeVar("Layer", bound=nn.Module)
Mixin = TypeVar("Mixin", bound="type[Reparametrised]")


class Reparametrised:
    """What every reparametrised layer is: a user's layer class with a computed `weight`.

    Attributes:
        kind: its name in pickles.
        prefix: what its classes' names begin with.
        what: its name in reports.
        computed_from: the gain, one number a row, and the parameter that has the weight's shape.
        own_attributes: plain attributes that the kind keeps on a layer.
        plain_class: the user's class.
    """

    kind: ClassVar[str]
    prefix: ClassVar[str]
    what: ClassVar[str]
    computed_from: ClassVar[tuple[str, str]]
    own_attributes: ClassVar[tuple[str, ...]] = ()
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

    @property
    def _layout(self) -> RowLayout:
        layout = layout_of(cast(nn.Module, self))
        assert layout is not None
        return layout

    def true_weight(self) -> tuple[Tensor, Tensor]:
        """Return the float64 weight rounded once, and which rows were repaired, (O,) bool."""
        raise NotImplementedError

    def pullback(self) -> Pullback:
        """Return the map from gradients of the weight to those of what it is computed from."""
        raise NotImplementedError


_MIXINS: dict[str, type[Reparametrised]] = {}
_made: dict[tuple[str, type[nn.Module]], type[nn.Module]] = {}
_observers: list[Callable[[type[nn.Module]], None]] = []


def a_kind(mixin: Mixin) -> Mixin:
    """Enter a mixin under its kind."""
    _MIXINS[mixin.kind] = mixin
    return mixin


def _class_for(kind: str, plain_class: type[nn.Module]) -> type[nn.Module]:
    key = (kind, plain_class)
    if key not in _made:
        mixin = _MIXINS[kind]
        name = mixin.prefix + plain_class.__name__
        namespace = {
            "plain_class": plain_class,
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{plain_class.__name__} with a reparametrised weight ({kind}).",
        }
        made = type(name, (mixin, plain_class), namespace)
        _made[key] = made
        for observer in _observers:
            observer(made)
    return _made[key]


def on_each_class(observer: Callable[[type[nn.Module]], None]) -> None:
    """Call an observer with every class made so far and, from now on, with every one to come.

    Other packages keep tables by exact class, and these classes are made as they are needed.
    """
    if observer not in _observers:
        _observers.append(observer)
    for made in list(_made.values()):
        observer(made)


def rebuild_layer(kind: str, plain_class: type[nn.Module], state: Any) -> nn.Module:
    """Make a reparametrised layer from its pickle. Runs no constructor.

    Args:
        kind: which reparametrisation: ``"wn"`` or ``"ws"``.
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


def plain_weight(layer: nn.Module, what: str) -> tuple[nn.Parameter, RowLayout]:
    """Return a layer's plain weight and where its rows are.

    Raises:
        UsageError: the layer is of another class, or has no plain weight.
    """
    layout, weight = layout_of(layer), layer._parameters.get("weight")
    if layout is None or weight is None:
        raise UsageError(
            Problem(
                type(layer).__name__, f"{what} needs a Linear or convolution with a plain weight"
            )
        )
    return weight, layout


def reparametrise_(
    layer: Layer, kind: str, gain: Tensor, attributes: dict[str, Any] | None = None
) -> Layer:
    """Give a layer, in place, the class of a kind; its weight is the parameter of that shape.

    Args:
        layer: with a plain weight.
        kind: which reparametrisation.
        gain: one number a row, in the row shape and dtype of the weight.
        attributes: plain attributes of the kind.
    """
    weight = layer._parameters["weight"]
    assert weight is not None
    weight.grad = None  # it was the gradient of another weight
    made = _class_for(kind, type(layer))
    names = _MIXINS[kind].computed_from
    parameter = nn.Parameter(gain, requires_grad=weight.requires_grad)
    _exchange(layer, ("weight",), {names[0]: parameter, names[1]: weight})
    module: Any = layer
    module.__class__ = made
    module.__dict__.update(attributes or {})
    return layer


def unfit_for(kind: str, layer: nn.Module) -> str:
    """Say why a layer could not get the class of a kind; empty where it can. Nothing is changed."""
    empty: Any = object.__new__(type(layer))
    try:
        empty.__class__ = _class_for(kind, type(layer))
    except Exception as reason:  # the class is the user's, and so is what it does when subclassed
        what = _MIXINS[kind].what
        return f"{type(layer).__name__} cannot be subclassed as {what} needs it ({reason})"
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
    for name in layer.own_attributes:
        module.__dict__.pop(name, None)
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

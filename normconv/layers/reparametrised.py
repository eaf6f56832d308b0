"""Layers whose weights are computed from other parameters: dynamic subclasses of the user's own class.

`WNConv2d` is made once per class, as a subclass of (WeightNormed, Conv2d): `isinstance(m, nn.Conv2d)`
holds, the class keeps its own `forward`, and whatever reads `m.weight` gets the computed weight. A layer
of several weights, such as an LSTM, has all of them computed. Each way to compute one is a kind, a mixin
in a module of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from normconv.errors import Problem, UsageError
from normconv.layers.attention import computing_once
from normconv.layers.operators import FAMILIES, OPERATORS, row_layouts
from normconv.layers.recurrent import ComputedFlatWeights
from normconv.numerics import Pullback, RowLayout

__all__ = [
    "Reparametrised",
    "fold_layer_",
    "on_each_class",
    "plain_weights",
    "rebuild_layer",
    "rekind_",
    "reparametrise_",
    "share_parts_",
    "unfit_for",
]

Layer = TypeVar("Layer", bound=nn.Module)
Mixin = TypeVar("Mixin", bound="type[Reparametrised]")


class Reparametrised:
    """What every reparametrised layer is: a user's layer class with computed weights.

    Attributes:
        kind: its name in pickles.
        prefix: what its classes' names begin with.
        what: its name in reports.
        computed_from: what a `weight` is computed from: the gain, one number a row, and the parameter
            that has the weight's shape. Other weights have the same endings, see `parts`.
        own_attributes: plain attributes that the kind keeps on a layer.
        plain_class: the user's class.
        weights: the names of the computed weights.
    """

    kind: ClassVar[str]
    prefix: ClassVar[str]
    what: ClassVar[str]
    computed_from: ClassVar[tuple[str, str]]
    own_attributes: ClassVar[tuple[str, ...]] = ()
    plain_class: ClassVar[type[nn.Module]]
    weights: ClassVar[tuple[str, ...]]

    @classmethod
    def parts(cls, name: str) -> tuple[str, str]:
        """Return the names of the two parameters that a weight is computed from."""
        gain, v = cls.computed_from
        return name + gain.removeprefix("weight"), name + v.removeprefix("weight")

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

    def row_layout(self, name: str = "weight") -> RowLayout:
        """Return where the rows of a weight are."""
        return row_layouts(cast(nn.Module, self))[name]

    def gain_and_v(self, name: str = "weight") -> tuple[Tensor, Tensor]:
        """Return what a weight is computed from."""
        gain, v = self.parts(name)
        return getattr(self, gain), getattr(self, v)

    def computed(self, name: str = "weight") -> Tensor:
        """Return a weight, differentiable: same shape, dtype and memory format as its v."""
        raise NotImplementedError

    def true_weight(self, name: str = "weight") -> tuple[Tensor, Tensor]:
        """Return a float64 weight rounded once, and which rows were repaired, (O,) bool."""
        raise NotImplementedError

    def pullback(self, name: str = "weight") -> Pullback:
        """Return the map from gradients of a weight to those of what it is computed from."""
        raise NotImplementedError

    def multiply_rows_(self, factor: Tensor, name: str = "weight") -> None:
        """Multiply the rows of a weight, (O,) float64, by way of its gain."""
        gain, _ = self.gain_and_v(name)
        gain.copy_(gain.double() * factor.reshape(gain.shape))


_MIXINS: dict[str, type[Reparametrised]] = {}
_made: dict[tuple[str, type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}
_observers: list[Callable[[type[nn.Module]], None]] = []


def a_kind(mixin: Mixin) -> Mixin:
    """Enter a mixin under its kind."""
    _MIXINS[mixin.kind] = mixin
    return mixin


def _class_for(
    kind: str, plain_class: type[nn.Module], weights: tuple[str, ...]
) -> type[nn.Module]:
    key = (kind, plain_class, weights)
    if key not in _made:
        mixin = _MIXINS[kind]
        name = mixin.prefix + plain_class.__name__
        namespace: dict[str, Any] = {
            "plain_class": plain_class,
            "weights": weights,
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{plain_class.__name__} with reparametrised weights ({kind}).",
            **{weight: _computed_property(weight) for weight in weights},
        }
        cached = (ComputedFlatWeights,) if issubclass(plain_class, nn.RNNBase) else ()
        if issubclass(plain_class, nn.MultiheadAttention):
            namespace["forward"] = computing_once(plain_class)
        made = type(name, (mixin, *cached, plain_class), namespace)
        _made[key] = made
        for observer in _observers:
            observer(made)
    return _made[key]


def _computed_property(name: str) -> property:
    def weight(self: Reparametrised) -> Tensor:
        return self.computed(name)

    return property(weight, doc="The computed weight.")


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
        UsageError: the kind is unknown, or the class is of none of the families in
            `normconv.layers.operators`.
    """
    weights: tuple[str, ...] = ()
    if kind in _MIXINS and isinstance(plain_class, type) and issubclass(plain_class, FAMILIES):
        weights = ("weight",) if issubclass(plain_class, OPERATORS) else _computed_in(kind, state)
    if not weights:
        raise UsageError(
            Problem(str(plain_class), f"no reparametrised layer {kind!r} of this class")
        )
    made = _class_for(kind, plain_class, weights)
    layer = made.__new__(made)
    _set_state(layer, state)
    return layer


def _computed_in(kind: str, state: Any) -> tuple[str, ...]:
    """The weights that the parameters of a pickled layer are the parts of, in their order."""
    parameters = state.get("_parameters", {}) if isinstance(state, Mapping) else {}
    gain, v = _MIXINS[kind].parts("")
    names = [name.removesuffix(gain) for name in parameters if name.endswith(gain)]
    return tuple(name for name in names if name + v in parameters)


def _set_state(layer: Any, state: Any) -> None:
    # nn.Module always has __setstate__; a class of the user may have its own and is asked first.
    layer.__setstate__(state)


def plain_weights(layer: nn.Module, what: str) -> dict[str, nn.Parameter]:
    """Return a layer's own weights by name.

    Raises:
        UsageError: the layer is of no known family, or some weight is not plain.
    """
    found = {name: layer._parameters.get(name) for name in row_layouts(layer)}
    plain = {name: weight for name, weight in found.items() if weight is not None}
    if not found or len(plain) < len(found):
        families = "a Linear, convolution, Embedding, recurrent or attention layer"
        raise UsageError(
            Problem(type(layer).__name__, f"{what} needs {families} with a plain weight")
        )
    return plain


def reparametrise_(
    layer: Layer, kind: str, gains: Mapping[str, Tensor], attributes: dict[str, Any] | None = None
) -> Layer:
    """Give a layer, in place, the class of a kind; each weight becomes the parameter of its shape.

    Args:
        layer: with plain weights.
        kind: which reparametrisation.
        gains: for each weight one number a row, in its row shape and dtype.
        attributes: plain attributes of the kind.
    """
    made = _class_for(kind, type(layer), tuple(gains))
    mixin = _MIXINS[kind]
    for name, gain in gains.items():
        weight = layer._parameters[name]
        assert weight is not None
        weight.grad = None  # it was the gradient of another weight
        parameter = nn.Parameter(gain, requires_grad=weight.requires_grad)
        parts = mixin.parts(name)
        _exchange(layer, (name,), {parts[0]: parameter, parts[1]: weight})
    _become(layer, made)
    layer.__dict__.update(attributes or {})
    return layer


def rekind_(
    layer: nn.Module, kind: str, gains: Mapping[str, Tensor], attributes: dict[str, Any]
) -> None:
    """Give a reparametrised layer, in place, the class of another kind with the same v.

    Args:
        layer: reparametrised.
        kind: which reparametrisation it becomes.
        gains: for each weight the gain of that kind.
        attributes: plain attributes of that kind.
    """
    assert isinstance(layer, Reparametrised)
    module: Any = layer
    made = _class_for(kind, layer.plain_class, layer.weights)
    for name, gain in gains.items():
        old, new = layer.parts(name), _MIXINS[kind].parts(name)
        was, v = layer.gain_and_v(name)
        parameter = nn.Parameter(gain, requires_grad=was.requires_grad)
        _exchange(module, old, {new[0]: parameter, new[1]: cast(nn.Parameter, v)})
    _become(module, made)
    module.__dict__.update(attributes)


def share_parts_(layer: nn.Module, leader: nn.Module) -> None:
    """Compute a layer's weight, in place, from the very parameters of another's.

    Args:
        layer: with a plain `weight`, the one that the leader had.
        leader: reparametrised.
    """
    assert isinstance(leader, Reparametrised)
    module: Any = layer
    made = _class_for(leader.kind, type(layer), leader.weights)
    for name in leader.weights:
        parts = zip(leader.parts(name), leader.gain_and_v(name), strict=True)
        _exchange(module, (name,), {part: cast(nn.Parameter, value) for part, value in parts})
    _become(module, made)
    module.__dict__.update({name: getattr(leader, name) for name in leader.own_attributes})


def unfit_for(kind: str, layer: nn.Module) -> str:
    """Say why a layer could not get the class of a kind; empty where it can. Nothing is changed."""
    empty: Any = object.__new__(type(layer))
    try:
        empty.__class__ = _class_for(kind, type(layer), tuple(row_layouts(layer)))
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
        Which rows were repaired (no direction, folded to 0), (O,) bool, those of all weights in a row.
    """
    assert isinstance(layer, Reparametrised)
    module: Any = layer
    made, all_repaired = {}, []
    for name in layer.weights:
        with torch.no_grad():
            value, repaired = layer.true_weight(name)
        parts = layer.gain_and_v(name)
        trainable = any(part.requires_grad for part in parts)
        weight = nn.Parameter(value, requires_grad=trainable)
        if done is not None:
            weight = done.setdefault(tuple(id(part) for part in parts), weight)
        made[name] = (layer.parts(name), weight)
        all_repaired.append(repaired)
    for name in layer.own_attributes:
        module.__dict__.pop(name, None)
    for name, (parts_of, weight) in made.items():
        _exchange(module, parts_of, {name: weight})
    _become(module, layer.plain_class)
    return torch.cat(all_repaired)


def _become(layer: Any, made: type[nn.Module]) -> None:
    """Change the class; what a recurrent layer caches of its weights follows."""
    recurrent = isinstance(layer, nn.RNNBase)
    if recurrent:
        layer.__dict__.pop("_flat_weights", None)
    layer.__class__ = made
    if recurrent:
        layer._init_flat_weights()


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

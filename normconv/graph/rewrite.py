"""The edits of a norm's slot: its map somewhere else, another norm in its place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from normconv.errors import PlanError, Problem
from normconv.graph.families import NormState, norm_state, trailing_of
from normconv.layers import ChannelAffine, absorb_affine_, absorb_input_affine_
from normconv.numerics import Affine
from normconv.plan import Span

__all__ = [
    "absorb_norm_",
    "affine_norm_",
    "empty_slot_",
    "move_hooks_",
    "normalizer_name",
    "replace_module_",
    "replace_norm_",
]


def absorb_norm_(
    root: nn.Module,
    names: Sequence[str],
    producers: Sequence[str] = (),
    *,
    consumers: Sequence[str] = (),
    spans: Sequence[str] = (),
    weight_norm: bool = False,
) -> None:
    """Fold a norm into the layers before or after it and leave in its slot what it does besides.

    In place. Of two norms around one layer the one before it must be folded first.

    Args:
        root: the model.
        names: all names of the norm.
        producers: layers before it; every call of the norm is fed by some of them.
        consumers: layers after it; with these there are no producers.
        spans: for each of the layers which channel each of its features is, see `normconv.plan.Span`;
            empty for one to one.
        weight_norm: leave the layers weight-normed.

    Raises:
        PlanError: the norm has no eval statistics, or a layer cannot hold the map.
    """
    norm = root.get_submodule(names[0])
    state = _readable(norm, names[0])
    trained = state.bias_trainable
    for layer, features in _features(root, producers or consumers, spans, state):
        affine, center = state.affine.at(features), state.mean[features]
        if producers:
            absorb_affine_(layer, affine, weight_norm=weight_norm, bias_trainable=trained)
        else:
            absorb_input_affine_(
                layer, affine, center=center, weight_norm=weight_norm, bias_trainable=trained
            )
    replace_module_(root, names, _slot(norm, {}))


def replace_norm_(
    root: nn.Module,
    names: Sequence[str],
    norm: nn.Module,
    before: Affine | None,
    producers: Sequence[str] = (),
    *,
    spans: Sequence[str] = (),
    weight_norm: bool = False,
) -> None:
    """Put another norm into the slot of one, and in front of it the map that it takes for granted.

    In place. The layers before it absorb the map; without such layers a `ChannelAffine` of the name
    ``affine`` stands before the new norm, whose name is then ``norm``.

    Args:
        root: the model.
        names: all names of the norm that was there.
        norm: what takes its place.
        before: the map, float64; None for none.
        producers: layers before it; every call of the norm is fed by some of them.
        spans: for each of them which channel each of its features is; empty for one to one.
        weight_norm: leave those layers weight-normed.

    Raises:
        PlanError: the norm that was there has no eval statistics.
    """
    was = root.get_submodule(names[0])
    parts = {"norm": norm}
    if before is None:
        replace_module_(root, names, _slot(was, parts))
        return
    state = _readable(was, names[0])
    if producers:
        for layer, features in _features(root, producers, spans, state):
            absorb_affine_(layer, before.at(features), weight_norm=weight_norm)
    else:
        trainable = state.weight is None or state.weight.requires_grad
        affine = ChannelAffine.of(before, trainable=trainable, dtype=state.dtype, center=state.mean)
        parts = {"affine": affine, "norm": norm}
    replace_module_(root, names, _slot(was, parts))


def normalizer_name(root: nn.Module, site: str) -> str:
    """Return the name of the norm that `replace_norm_` put into a slot."""
    slot = root.get_submodule(site)
    return f"{site}.norm".lstrip(".") if isinstance(slot, nn.Sequential) else site


def _features(
    root: nn.Module, layers: Sequence[str], spans: Sequence[str], state: NormState
) -> Iterator[tuple[nn.Module, Tensor]]:
    """The layers, each with the channels that its features are."""
    for place, name in enumerate(layers):
        channels = Span.read(spans[place]).channels if spans else range(state.channels)
        yield root.get_submodule(name), torch.tensor(channels, device=state.mean.device)


def affine_norm_(root: nn.Module, names: Sequence[str], *, trainable: bool | None = None) -> None:
    """Put a `ChannelAffine` with the norm's eval map into its slot, in place.

    Args:
        root: the model.
        names: all names of the norm.
        trainable: whether scale and shift are Parameters; None gives Parameters with γ's and β's own
            `requires_grad` (without γ and β: not trained).
    """
    norm = root.get_submodule(names[0])
    state = _readable(norm, names[0])
    layer = ChannelAffine.of(
        state.affine, trainable=trainable is not False, dtype=state.dtype, center=state.mean
    )
    if trainable is None:
        for parameter, source in ((layer.scale, state.weight), (layer.shift, state.bias)):
            parameter.requires_grad_(source is not None and source.requires_grad)
    replace_module_(root, names, _slot(norm, {"affine": layer}))


def empty_slot_(root: nn.Module, names: Sequence[str]) -> None:
    """Put an Identity into the slot of a norm that is never called, in place."""
    replace_module_(root, names, nn.Identity())


def _readable(norm: nn.Module, name: str) -> NormState:
    state = norm_state(norm)
    if isinstance(state, str):
        raise PlanError(Problem(name, state))
    return state


def _slot(norm: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """What stands in the norm's place: new parts, then what the norm did after normalizing.

    The modules keep their names inside (`bn.act` stays `bn.act`), and the norm's hooks and flags move.
    A single part stands there itself.
    """
    trailing = trailing_of(norm)
    slot: nn.Module
    if trailing or len(parts) > 1:
        slot = nn.Sequential(OrderedDict({**parts, **trailing}))
    else:
        slot = next(iter(parts.values()), None) or nn.Identity()
    for module in (slot, *parts.values()):
        module.training = norm.training
    move_hooks_(norm, slot)
    _carry_attributes(norm, slot)
    return slot


def move_hooks_(source: nn.Module, target: nn.Module) -> None:
    """Give the module that takes another's place the other's hooks, in place."""
    for hooks in _HOOKS:
        getattr(target, hooks).update(getattr(source, hooks))


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_OF_THE_NORM = frozenset(
    # The last two are how the norm itself is called, compiled in place or patched.
    [
        "num_features",
        "eps",
        "momentum",
        "affine",
        "track_running_stats",
        "_compiled_call_impl",
        "forward",
    ]
)


def _carry_attributes(norm: nn.Module, slot: nn.Module) -> None:
    """Move what the user hung on the norm (`bn.tag = ...`); what describes the norm goes with it."""
    taken = {*slot.__dict__, *slot._parameters, *slot._buffers, *slot._modules}
    usual = nn.Module().__dict__.keys() | taken | _OF_THE_NORM
    for name, value in norm.__dict__.items():
        if name not in usual:
            setattr(slot, name, value)


def replace_module_(root: nn.Module, names: Sequence[str], module: nn.Module) -> None:
    """Put `module` at every name, in place; order of submodules is kept.

    Raises:
        PlanError: the norm is the model itself, which nothing holds.
    """
    for name in names:
        if not name:
            raise PlanError(
                Problem("", "the model itself is a norm", "wrap it: nn.Sequential(model)")
            )
        parent, _, child = name.rpartition(".")
        root.get_submodule(parent)._modules[child] = module

"""The one edit that every exact target makes: a norm out of its slot, its map somewhere else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from normconv.errors import PlanError, Problem
from normconv.graph.families import NormState, norm_state, trailing_of
from normconv.layers import ChannelAffine, absorb_affine_, absorb_input_affine_
from normconv.plan import Span

__all__ = ["absorb_norm_", "affine_norm_", "empty_slot_", "replace_module_"]


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
    for place, name in enumerate(producers or consumers):
        layer, affine, center = root.get_submodule(name), state.affine, state.mean
        if spans:
            features = torch.tensor(Span.read(spans[place]).channels, device=center.device)
            affine, center = affine.at(features), center[features]
        trained = state.bias_trainable
        if producers:
            absorb_affine_(layer, affine, weight_norm=weight_norm, bias_trainable=trained)
        else:
            absorb_input_affine_(
                layer, affine, center=center, weight_norm=weight_norm, bias_trainable=trained
            )
    replace_module_(root, names, _slot(norm, None))


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
    replace_module_(root, names, _slot(norm, layer))


def empty_slot_(root: nn.Module, names: Sequence[str]) -> None:
    """Put an Identity into the slot of a norm that is never called, in place."""
    replace_module_(root, names, nn.Identity())


def _readable(norm: nn.Module, name: str) -> NormState:
    state = norm_state(norm)
    if isinstance(state, str):
        raise PlanError(Problem(name, state))
    return state


def _slot(norm: nn.Module, affine: ChannelAffine | None) -> nn.Module:
    """What stands in the norm's place: the affine map, then what the norm did after normalizing.

    The modules keep their names inside (`bn.act` stays `bn.act`), and the norm's hooks and flags move.
    """
    trailing = trailing_of(norm)
    slot: nn.Module
    if trailing:
        first = {} if affine is None else {"affine": affine}
        slot = nn.Sequential(OrderedDict({**first, **trailing}))
    else:
        slot = affine if affine is not None else nn.Identity()
    for module in (slot, affine):
        if module is not None:
            module.training = norm.training
    for hooks in _HOOKS:
        getattr(slot, hooks).update(getattr(norm, hooks))
    _carry_attributes(norm, slot)
    return slot


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
